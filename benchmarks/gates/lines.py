"""What a prediction is held to: the share of its floor that is aimed at, and the one that must hold.

A line is what the kernels that ship are predicted at, rounded down: a change that makes one slower fails the gate.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """Shares of the floor: ``goal`` is aimed at, ``line`` must hold."""

    goal: float
    line: float


# (pass, layout) -> (height from which on, goal, line), the tallest first.
LINES: dict[tuple[str, str], tuple[tuple[int, float, float], ...]] = {
    ("inference", "channels_last"): ((28, 0.85, 0.0), (0, 0.75, 0.0)),
    ("forward", "channels_last"): ((28, 0.85, 0.0), (0, 0.75, 0.0)),
    ("backward", "channels_last"): ((28, 0.75, 0.0), (0, 0.60, 0.0)),
    ("inference", "contiguous"): ((0, 0.60, 0.0),),
    ("forward", "contiguous"): ((0, 0.60, 0.0),),
    ("backward", "contiguous"): ((0, 0.60, 0.0),),
    ("merge", "channels_last"): ((0, 0.80, 0.0),),
}


def line_of(what: str, layout: str, height: int) -> Line | None:
    """What a pass is held to; None where nothing is asked."""
    for least, goal, line in LINES.get((what, layout), ()):
        if height >= least:
            return Line(goal, line)
    return None
