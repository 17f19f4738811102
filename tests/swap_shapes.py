"""The shapes that swap_ is held to, a row each, and the table of them in docs/swapping.md.

``PYTHONPATH=. python tests/swap_shapes.py`` writes the table.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "swapping.md"
FILES = ("shapes_ladders", "shapes_roots", "shapes_beyond")
BEGIN, END = "<!-- shapes -->\n", "<!-- end of shapes -->\n"


class Row(NamedTuple):
    """A module as people have it, and what is to become of it."""

    make: Callable[[], nn.Module]  # fresh, float32, randomly initialised
    inputs: Callable[[torch.dtype], list]  # the arguments of a call, lists of tensors among them; copied before each
    swapped: dict[str, str]  # paths that have to be swapped: a part of the remark in the report
    skipped: dict[str, str] = {}  # paths that stay: a part of the reason
    ops: dict[str, int] = {}  # seen in a call in evaluation without gradients, on the CPU's kernels
    onnx: bool = True


def collect() -> dict[str, Row]:
    """Every row by its name; the files are looked up now, since they import this one."""
    found: dict[str, Row] = {}
    for name in FILES:
        if importlib.util.find_spec(name) is None:
            continue
        rows = importlib.import_module(name).ROWS
        assert not found.keys() & rows.keys(), f"{name}: {sorted(found.keys() & rows.keys())} are there already"
        found |= rows
    return found


def _paths(entries: dict[str, str]) -> str:
    """Paths of a row as a cell; the empty one is the module itself."""
    cells = []
    for path, remark in entries.items():
        named = f"`{path}`" if path else "itself"
        cells.append(f"{named} ({remark})" if remark else named)
    return ", ".join(cells[:4]) + (f" and {len(cells) - 4} more" if len(cells) > 4 else "") or "–"


def line(name: str, row: Row) -> str:
    """A row of the table; every tick is a test of that row."""
    ops = ", ".join(f"{count} {op}" for op, count in row.ops.items() if count) or "–"
    ticks = ["✓"] * 5 + ["✓" if row.onnx else "–"]
    return f"| {' | '.join([name, _paths(row.swapped), _paths(row.skipped), ops, *ticks])} |"


def table() -> str:
    """The table as the document has it."""
    head = ["shape", "swapped", "stays", "fused ops of a call", "evaluation", "training", "keys, undo", "compile"]
    head += ["export", "ONNX"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(line(name, row) for name, row in collect().items())]) + "\n"


def rewritten(text: str) -> str:
    """The document with the table of today."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {DOCUMENT}")
