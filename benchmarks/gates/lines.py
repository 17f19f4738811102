"""What a prediction is held to: the share of its floor that is aimed at, and the one that must hold.

A line is what the kernels that ship are predicted at, less 3 %, rounded down: a change that makes one slower fails the
gate.
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
    ("inference", "channels_last"): ((56, 0.85, 0.94), (28, 0.85, 0.87), (14, 0.75, 0.53), (0, 0.75, 0.47)),
    ("inference", "contiguous"): ((14, 0.60, 0.50), (0, 0.60, 0.20)),
    ("forward", "channels_last"): ((56, 0.85, 0.91), (28, 0.85, 0.78), (14, 0.75, 0.50), (0, 0.75, 0.37)),
    ("forward", "contiguous"): ((14, 0.60, 0.45), (0, 0.60, 0.16)),
    ("backward", "channels_last"): ((56, 0.75, 0.80), (28, 0.75, 0.62), (14, 0.60, 0.48), (0, 0.60, 0.46)),
    ("backward", "contiguous"): ((14, 0.60, 0.48), (0, 0.60, 0.42)),
    ("merge", "channels_last"): ((128, 0.80, 0.49), (64, 0.80, 0.74), (0, 0.80, 0.66)),
    ("tail", "channels_last"): (
        (56, 0.85, 0.95),
        (32, 0.85, 0.96),
        (28, 0.85, 0.93),
        (14, 0.85, 0.89),
        (0, 0.85, 0.82),
    ),
    ("tail", "contiguous"): ((32, 0.85, 0.96), (14, 0.85, 0.89), (0, 0.85, 0.82)),
    ("apply", "channels_last"): ((32, 0.85, 0.96), (14, 0.85, 0.82), (0, 0.85, 0.71)),
    ("apply", "contiguous"): ((32, 0.85, 0.96), (14, 0.85, 0.88), (0, 0.85, 0.71)),
    ("reduce", "channels_last"): (
        (56, 0.85, 0.90),
        (32, 0.85, 0.88),
        (28, 0.85, 0.86),
        (14, 0.85, 0.79),
        (0, 0.85, 0.55),
    ),
    ("reduce", "contiguous"): ((32, 0.85, 0.96), (14, 0.85, 0.73), (0, 0.85, 0.32)),
    ("moments", "channels_last"): ((0, 0.85, 0.94),),
    ("moments", "contiguous"): ((0, 0.85, 0.95),),
    ("upsample", "channels_last"): ((0, 0.85, 0.67),),
    ("upsample", "contiguous"): ((0, 0.85, 0.75),),
    ("upsample_add", "channels_last"): ((0, 0.85, 0.65),),
    ("upsample_add", "contiguous"): ((0, 0.85, 0.89),),
    ("upsample_backward", "channels_last"): ((0, 0.85, 0.42),),
    ("upsample_backward", "contiguous"): ((0, 0.85, 0.36),),
}


def line_of(what: str, layout: str, height: int) -> Line | None:
    """What a pass is held to; None where nothing is asked."""
    for least, goal, line in LINES.get((what, layout), ()):
        if height >= least:
            return Line(goal, line)
    return None
