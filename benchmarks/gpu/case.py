"""What a block of the run is made of: cases with a label, each on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Found = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """Where the cases run.

    Attributes:
        device: a GPU, a CPU (to test the program), or ``meta``, where every case runs in full size and computes
            nothing: that is how the launches of a run are known before it.
        small: the smallest shapes alone.
    """

    device: torch.device
    small: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether something can be timed on a GPU."""
        return self.device.type == "cuda"

    @property
    def is_drawn(self) -> bool:
        """Whether meta tensors stand for the GPU's."""
        return self.device.type == "meta"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is timed first: half precision where there are instructions for it."""
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One thing to check or to time.

    Attributes:
        label: unique in its block.
        run: gives records: checks have a ``check`` and ``ok``, figures a ``figure`` and ``value``, tables a ``table``
            and ``rows``; everything else is a record as ``python -m dla_fast bench`` writes it.
        seconds: how long it is expected to take on an H100; a case that takes many times that is ended.
        prepare: does whatever may be done beforehand and be found again in a cache: compiling the peers.
        launches: whether its launches can be known beforehand. A case whose work follows from other cases' results
            compiles for itself.
    """

    label: str
    run: Callable[[], Found]
    seconds: float = 1.0
    prepare: Callable[[], object] | None = None
    launches: bool = True


def passed(label: str, ok: bool, detail: str = "") -> Found:
    """A check as a case gives it."""
    return [{"check": label, "ok": ok, "detail": detail}]


def measured(label: str, value: float, unit: str, **more: Any) -> Found:
    """A figure as a case gives it."""
    return [{"figure": label, "value": value, "unit": unit, **more}]
