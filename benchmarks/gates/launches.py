"""A recorded launch as the device sees it: machine code, arguments in the constant bank, sizes of its operands."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gates import compiled, effects, emulate, pipes, registers, sass
from benchmarks.gates.compiled import TARGETS, source
from benchmarks.gates.emulate import Memory, Moved, Trace
from benchmarks.gates.pipes import SECTOR, SPACE
from dla_fast.kernels import launch

# Where a kernel's parameters begin in bank 0 of a GPU of architecture 9.0, behind the launch's sizes.
PARAMETERS = 0x210
# An operand that all programs together ask for so many times over comes from the second-level cache, and
REPEATED = 4
# one of so few bytes was left there by the launch before, a twelfth of the cache.
LEFT_BEHIND = 4_000_000
# Programs along a dimension that are followed where they differ.
SAMPLES = 4
# Threads of a warp.
_WARP = 32


@dataclass
class Features:
    """What decides a launch's time.

    Attributes:
        kernel: its name.
        programs: in all dimensions.
        warps: of a program.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        resident: programs that fit on a processor.
        cycles: of one program with a processor to itself.
        issued: instructions of a warp.
        pipes: cycles of a scheduler's pipes that a warp takes, beside its issue slots.
        matrix: cycles of a processor's tensor cores that a warp takes.
        banks: cycles of shared memory that it takes.
        lines: cycles of the first-level cache that it takes.
        asked: bytes of the second-level cache that the launch asks for and writes.
        bytes: distinct bytes that it reads and writes.
        torn: bytes of sectors that one store writes in part, as often as one does.
        wide: share of its accesses to global memory, by bytes, that are 128 bits a thread.
        loops: (times, instructions each time, accesses of 128 bits, accesses to global memory) of its loops.
        counts: instructions of a warp by kind.
    """

    kernel: str
    programs: int
    warps: int
    registers: int
    shared: int
    resident: int
    cycles: float
    issued: int
    pipes: dict[str, float]
    matrix: float
    banks: float
    lines: float
    asked: float
    bytes: float
    torn: float
    wide: float
    loops: list[list[float]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def _flat(value: Any, annotation: str) -> Iterator[tuple[str, Any]]:
    """(format, value) of an argument's parameters; what is compiled in has none."""
    if isinstance(value, tuple):
        for one in value:
            yield from _flat(one, annotation)
    elif isinstance(value, Tensor):
        yield "Q", value
    elif isinstance(value, bool):
        yield "?", value
    elif isinstance(value, int):
        if value != 1:
            yield ("i" if -(2**31) <= value < 2**31 else "q"), value
    elif isinstance(value, float):
        yield ("d" if annotation == "fp64" else "f"), value
    elif value is not None:
        raise TypeError(f"no parameter is known for {type(value).__name__}")


def constants(one: launch.Launch) -> tuple[bytes, list[int]]:
    """Bank 0 as a launch fills it, and the bytes of each operand in order.

    Operand i, counted from 1, lies at address i * 2^40; every parameter is aligned to its own size, scratch pointers of
    Triton's own follow and are null.
    """
    grid = (*one.grid, 1, 1)[:3]
    bank = bytearray(PARAMETERS)
    struct.pack_into("<6I", bank, 0, _WARP * one.config.num_warps, 1, 1, *grid)
    operands: list[int] = []
    params = [p for p in one.kernel.params if not p.is_constexpr]
    for param, argument in zip(params, one.args, strict=True):
        for kind, value in _flat(argument, param.annotation_type):
            bank += bytes(-(len(bank) - PARAMETERS) % struct.calcsize(f"<{kind}"))
            if kind == "Q":
                operands.append(value.numel() * value.itemsize)
                value = len(operands) << SPACE
            bank += struct.pack(f"<{kind}", value)
    return bytes(bank) + bytes(-len(bank) % 8 + 32), operands


@dataclass(frozen=True)
class Code:
    """A compiled kernel: its disassembly, registers of a thread, bytes of shared memory."""

    text: str
    registers: int
    shared: int


_codes: dict[str, tuple[Code, list[sass.Instruction]]] = {}


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def code_of(s: launch.Specialisation, target: str) -> tuple[Code, list[sass.Instruction]]:
    """Compile a specialisation, once in a process."""
    name = _hash(source(s).hash(), s.options, target)
    if name not in _codes:
        made = triton.compile(source(s), target=TARGETS[target].gpu(), options=s.options)
        cubin = made.asm["cubin"]
        code = Code(sass.disassembly(cubin), compiled.cuda_resources(cubin)[0], int(made.metadata.shared))
        _codes[name] = code, sass.parse(code.text)
    return _codes[name]


def gathered(trace: Trace, code: Code, one: launch.Launch, operands: list[int], target: str) -> Features:
    """A launch's features, from what one warp of it did."""
    warps, programs = one.config.num_warps, math.prod(one.grid)
    asked = distinct = torn = 0.0
    for operand, moved in trace.moved.items():
        total = float(moved.sectors * SECTOR * warps * programs)
        asked += total
        if operand > 0:
            distinct += min(total, operands[operand - 1])
            # No byte is written twice: where the warps seem to, most of them are masked out. What is small stays in the
            # cache until its sectors are whole.
            written = moved.stored * warps * programs
            once = min(1.0, operands[operand - 1] / written) if written else 0.0
            torn += once * moved.torn * SECTOR * warps * programs if operands[operand - 1] > LEFT_BEHIND else 0.0
    by_width = {int(k.partition(".")[2]): 0 for k in trace.counts if k.startswith(("load.", "store."))}
    for kind, count in trace.counts.items():
        if kind.startswith(("load.", "store.")):
            by_width[int(kind.partition(".")[2])] += count
    whole = sum(width * count for width, count in by_width.items())
    gpu = TARGETS[target]
    return Features(
        kernel=str(one.kernel.fn.__name__),
        programs=programs,
        warps=warps,
        registers=code.registers,
        shared=code.shared,
        resident=round(gpu.occupancy(code.registers, code.shared, warps) * gpu.warps / warps),
        cycles=round(trace.cycles, 1),
        issued=trace.issued,
        pipes={k: round(v, 1) for k, v in trace.pipes.items() if k != "issue"},
        matrix=round(trace.matrix, 1),
        banks=trace.shared,
        lines=trace.lines,
        asked=asked,
        bytes=distinct,
        torn=torn,
        wide=round(16 * by_width.get(16, 0) / whole, 4) if whole else 1.0,
        loops=[[*loop] for loop in trace.trips()],
        counts=dict(trace.counts),
    )


def cached_operands(trace: Trace, operands: list[int], threads: int) -> frozenset[int]:
    """Operands whose loads the second-level cache answers; ``threads``: warps of all programs."""
    return frozenset(
        i
        for i, moved in trace.moved.items()
        if i > 0 and (moved.sectors * SECTOR * threads >= REPEATED * operands[i - 1] or operands[i - 1] <= LEFT_BEHIND)
    )


def spread(n: int) -> list[int]:
    """Numbers below n, evenly spaced."""
    return sorted({(2 * i + 1) * n // (2 * SAMPLES) for i in range(SAMPLES)})


def mean_of(traces: list[Trace]) -> Trace:
    """The first of some programs, with the time and the traffic of their mean."""
    n = len(traces)
    every = [t.moved for t in traces]
    moved = {
        operand: Moved(*(sum(getattr(m[operand], f.name) for m in every if operand in m) / n for f in fields(Moved)))
        for operand in sorted({o for m in every for o in m})
    }
    return replace(traces[0], moved=moved, cycles=sum(t.cycles for t in traces) / n)


def features(
    one: launch.Launch, dtype: torch.dtype, memory: Memory, cache: Path | None = None, target: str = "sm_90"
) -> Features:
    """What decides the time of a launch, kept under a folder by all that it follows from.

    Raises:
        benchmarks.gates.emulate.UnknownBranch: the kernel's way depends on values in memory.
    """
    s = launch.specialisation("", dtype, one)
    bank, operands = constants(one)
    path = None
    if cache is not None:
        modules = (compiled, effects, emulate, pipes, registers, sass)
        readers = [Path(str(m.__file__)).read_text(encoding="utf-8") for m in modules] + [
            Path(__file__).read_text(encoding="utf-8")
        ]
        key = _hash(source(s).hash(), s.options, one.grid, bank, operands, triton.__version__, target, memory, readers)
        path = cache / f"{key}.json"
        try:
            return Features(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            pass
    code, instructions = code_of(s, target)
    x, y, z = (*one.grid, 1, 1)[:3]
    grid = (x, y, z)
    first = emulate.run(instructions, bank, grid, one.config.num_warps, memory)
    known = cached_operands(first, operands, one.config.num_warps * math.prod(grid))
    memory = replace(memory, cached=known)
    # Where a grid has two dimensions, one of them chooses between inputs, or groups that are not alike.
    at = [(x // 2, y // 2)]
    if x > 1 and y > 1:
        at = [(i, j) for i in spread(x) for j in spread(y)]
    trace = mean_of(
        [emulate.run(instructions, bank, grid, one.config.num_warps, memory, (i, j, z // 2)) for i, j in at]
    )
    found = gathered(trace, code, one, operands, target)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(found.to_dict()), encoding="utf-8")
        beside.replace(path)
    return found
