"""Imports inside dla_fast, and includes inside csrc/cpu, run one way: from the command line down, never up."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dla_fast"
# From the top: a module imports from its own line and from those below.
LINES = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("tasks",),
    ("bench",),
    ("proof",),
    ("__init__",),
    ("models", "swap"),
    ("nn",),
    ("functional",),
    ("arguments",),
    ("backend",),
    ("kernels", "ops"),
    ("checks", "reference", "_extension", "_extras", "_starting", "_timm", "_version", "_build"),
)
LINE = {name: i for i, names in enumerate(LINES) for name in names}


def imported(path: Path) -> set[str]:
    """The parts of dla_fast that a file imports, inside functions too; a public name stands for the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for first, *rest in (name.split(".") for name in names):
            if first == "dla_fast":
                found.add(rest[0] if rest and rest[0] in LINE else "__init__")
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_part_has_its_line():
    assert {part_of(path) for path in PACKAGE.rglob("*.py")} <= set(LINE)


@pytest.mark.parametrize("part", LINE)
def test_imports_run_down(part):
    for path in PACKAGE.rglob("*.py"):
        if part_of(path) == part:
            up = {name for name in imported(path) if LINE[name] < LINE[part]}
            assert not up, f"{path.relative_to(PACKAGE)} imports {sorted(up)}"


# The rooms of the CPU kernels: a file includes its own room, and those that come after.
ROOMS = {"operators": {"passes", "products", "shared"}, "passes": {"shared"}, "products": {"shared"}, "shared": set()}
CSRC = PACKAGE.parent / "csrc" / "cpu"


def included(path: Path) -> set[str]:
    """The rooms whose files a file includes."""
    found = re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
    return {(path.parent / name).resolve().relative_to(CSRC).parts[0] for name in found}


def test_includes_run_down():
    paths = [path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h")]
    assert {path.relative_to(CSRC).parts[0] for path in paths} == set(ROOMS)
    for path in paths:
        room = path.relative_to(CSRC).parts[0]
        assert included(path) <= ROOMS[room] | {room}, path
    # Tensors are for operators: nothing else is compiled against them.
    for path in paths:
        if path.relative_to(CSRC).parts[0] != "operators":
            assert "Tensor.h>" not in path.read_text(encoding="utf-8"), path
