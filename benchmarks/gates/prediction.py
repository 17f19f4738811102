"""What is predicted of a pass, as it is printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gates.launches import Features
from benchmarks.gates.model import Time


@dataclass(frozen=True)
class Prediction:
    """A predicted time beside its floor.

    Attributes:
        op: the op and its shapes.
        kernels: what is launched, in order; the library's kernels in brackets.
        what: the pass: ``"forward"``, ``"backward"``, ``"inference"``, ``"merge"``, ``"tail"``, ``"apply"``,
            ``"reduce"``, ``"moments"``, ``"upsample"``, ``"upsample_backward"``; ``"forward: stage_kernel"`` for a part
            without a line of its own.
        layout: ``"channels_last"`` or ``"contiguous"``.
        dtype: ``"bfloat16"`` and so on.
        batch: images.
        height: rows of the output.
        share: floor over time.
        us: microseconds.
        floor_us: of the floor; of a 3 x 3 merge the bare convolution's.
        bound: what the longest of its launches waits for.
        library: whether the library does part of it.
        goal: the share that is aimed at, None where none is.
        line: the share that must hold.
    """

    op: str
    kernels: list[str]
    what: str
    layout: str
    dtype: str
    batch: int
    height: int
    share: float
    us: float
    floor_us: float
    bound: str
    library: bool
    goal: float | None
    line: float | None

    @property
    def under(self) -> bool:
        """Whether it is under its line."""
        return self.line is not None and self.share < self.line

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: ``pass`` for ``what``."""
        found = asdict(self)
        found["pass"] = found.pop("what")
        return found


@dataclass(frozen=True)
class Predicted:
    """A step of a pass: what it is, its features where it is a launch, its time."""

    name: str
    features: Features | None
    time: Time


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of words."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
