"""What this process is doing: a few words that whoever does the work leaves here, and whoever watches reads.

One record for the process, as there is one main thread. Imports nothing, so that every room may leave a sign.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Sign:
    """The last sign of life."""

    phase: str = "set up"
    step: int = 0
    """As in metrics.jsonl: the one being worked on."""
    beats: int = 0
    """Grows with everything that gets done."""


NOW = Sign()


def at(phase: str, step: int) -> None:
    """A phase of a step begins."""
    NOW.phase, NOW.step = phase, step
    NOW.beats += 1


def alive() -> None:
    """Something got done within a phase."""
    NOW.beats += 1
