"""What a transfer is: how patient, of what, into what, and how it fails. The words that all kinds of places share."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from clip_train.errors import DataError

PIPE = "pipe:"


@dataclass(frozen=True)
class Transfer:
    """How patient a transfer is. All times in seconds."""

    timeout: float = 30.0
    """Longest silence, also in the middle of a body (commands: four times this)."""
    attempts: int = 6
    """Failures in a row, after which it is given up."""
    backoff: float = 0.5
    """Pause after the first failure; it doubles with each, up to 30 s."""

    def pause(self, failures: int, who: str) -> float:
        """Pause after so many failures: up to a quarter shorter, so that not all processes ask at once again."""
        jitter = random.Random(f"{who} {failures}").random()  # its own generator: nobody else's numbers move
        return min(30.0, self.backoff * 2 ** (failures - 1)) * (1 - jitter / 4)

    @property
    def patience(self) -> float:
        """Longer than a process that fetches can be silent."""
        return self.attempts * (4 * self.timeout + min(30.0, self.backoff * 2**self.attempts))


class Found(NamedTuple):
    """What the other side says a shard is."""

    size: int | None
    """Bytes; None where it cannot tell."""
    version: str
    """ETag, time of change or the like; empty where it has none."""

    def agrees(self, other: Found) -> bool:
        """Whether nothing that both know differs."""
        sizes_agree = None in (self.size, other.size) or self.size == other.size
        return sizes_agree and (not self.version or not other.version or self.version == other.version)


class Sink(Protocol):
    """Where fetched bytes go."""

    done: int
    """Bytes so far."""

    def write(self, data: bytes) -> None: ...

    def restart(self) -> None:
        """Forget all bytes so far."""
        ...


class Temporary(Exception):
    """A failure that may pass. Never leaves this package."""


class Absent(Exception):
    """There is no such thing, or nobody may see it; the text is why. Never leaves this package."""


def changed(shard: str, expected: Found, now: Found) -> DataError:
    """The error for a shard that is another one by now."""
    return DataError(
        f"{shard}: changed on the server: {_describe(expected)} was expected and {_describe(now)} is there. "
        "Put the old file back, or start anew."
    )


def _describe(found: Found) -> str:
    size = "an unknown number of" if found.size is None else str(found.size)
    return f"{size} bytes" + (f" of version {found.version}" if found.version else "")
