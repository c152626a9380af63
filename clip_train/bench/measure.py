"""Timing two things fairly: interleaved, warmed up, medians, ratios pair by pair, the machine named."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1, device: torch.device | None = None
) -> dict[str, Times]:
    """Run the sides in turn, A B A B …: a machine that slows down slows both."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if device is not None and device.type == "cuda":
                import torch

                torch.cuda.synchronize(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def median_ratio(peer: Times, ours: Times) -> float:
    """Median over rounds of the peer's time over ours: how many times faster we are."""
    return statistics.median(a / b for a, b in zip(peer.seconds, ours.seconds, strict=True))


def machine(device: torch.device | None = None) -> str:
    """One line that names the machine, for tables."""
    if device is not None and device.type == "cuda":
        import torch

        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
        model = (names[0] if names else model) + "".join(
            f" with {feature}" for feature in ("amx_bf16", "avx512_bf16") if feature in text
        )
    return f"{os.cpu_count()} cores of {model}, torch {version('torch')}"


def conclude(ratio: float, bar: float | None, console: Console) -> int:
    """The last line, and the exit code."""
    failed = bar is not None and ratio < bar
    if failed:
        console.print(f"below the bar of {bar:.2f}")
    print(f"ratio {ratio:.2f}", flush=True)
    return int(failed)
