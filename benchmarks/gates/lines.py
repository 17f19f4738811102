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


# (pass, layout) -> (rows of the output from which on, goal, line), the tallest first.
LINES: dict[tuple[str, str], tuple[tuple[int, float, float], ...]] = {
    ("inference", "channels_last"): ((56, 0.85, 0.54), (28, 0.85, 0.35), (14, 0.75, 0.31), (0, 0.75, 0.34)),
    ("inference", "contiguous"): ((14, 0.60, 0.20), (0, 0.60, 0.20)),
    ("forward", "channels_last"): ((56, 0.85, 0.52), (28, 0.85, 0.53), (14, 0.75, 0.32), (0, 0.75, 0.26)),
    ("forward", "contiguous"): ((14, 0.60, 0.22), (0, 0.60, 0.16)),
    ("backward", "channels_last"): ((56, 0.75, 0.43), (28, 0.75, 0.40), (14, 0.60, 0.42), (0, 0.60, 0.42)),
    ("backward", "contiguous"): ((14, 0.60, 0.43), (0, 0.60, 0.42)),
    ("merge", "channels_last"): ((128, 0.80, 0.44), (64, 0.80, 0.58), (0, 0.80, 0.62)),
    ("tail", "channels_last"): (
        (56, 0.85, 0.87),
        (32, 0.85, 0.88),
        (28, 0.85, 0.85),
        (14, 0.85, 0.82),
        (0, 0.85, 0.77),
    ),
    ("tail", "contiguous"): ((32, 0.85, 0.96), (14, 0.85, 0.59), (0, 0.85, 0.49)),
    ("apply", "channels_last"): ((0, 0.85, 0.63),),
    ("apply", "contiguous"): ((0, 0.85, 0.96),),
    ("reduce", "channels_last"): (
        (56, 0.85, 0.56),
        (32, 0.85, 0.57),
        (28, 0.85, 0.44),
        (14, 0.85, 0.43),
        (0, 0.85, 0.36),
    ),
    ("reduce", "contiguous"): ((32, 0.85, 0.91), (14, 0.85, 0.52), (0, 0.85, 0.41)),
    ("moments", "channels_last"): ((0, 0.85, 0.55),),
    ("moments", "contiguous"): ((0, 0.85, 0.85),),
    ("upsample", "channels_last"): ((0, 0.85, 0.22),),
    ("upsample", "contiguous"): ((0, 0.85, 0.27),),
    ("upsample_add", "channels_last"): ((0, 0.85, 0.38),),
    ("upsample_add", "contiguous"): ((0, 0.85, 0.39),),
    ("upsample_backward", "channels_last"): ((0, 0.85, 0.13),),
    ("upsample_backward", "contiguous"): ((0, 0.85, 0.06),),
}


def line_of(what: str, layout: str, height: int) -> Line | None:
    """What a pass is held to; None where nothing is asked."""
    for least, goal, line in LINES.get((what, layout), ()):
        if height >= least:
            return Line(goal, line)
    return None
