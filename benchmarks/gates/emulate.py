"""One program of a launch, followed through its machine code: what it executes, moves and waits for.

Triton's kernels branch alike in every warp, so one warp stands for the program: :func:`run` follows it with the
launch's real arguments, counts what it issues, and keeps its time by the assembler's own schedule
(:mod:`benchmarks.gates.sass`).
The other warps of the program do the same at the same time, so what is shared between them (issue slots, the pipes, the
load and store unit, tensor cores) costs them all their turn. Other programs of a processor are the model's business.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.gates.effects import step
from benchmarks.gates.pipes import (
    BARRIER,
    DEFAULT,
    FIRST_LEVEL,
    LINE,
    MOVES,
    ON_CHIP,
    SECTOR,
    SHARED,
    access,
    conflicts,
    matrix_cycles,
    pipe_of,
)
from benchmarks.gates.registers import LANES, Registers, lift
from benchmarks.gates.sass import NO_BARRIER, Instruction


@dataclass
class Moved:
    """Accesses of one warp to one operand.

    Attributes:
        requests: instructions.
        sectors: of 32 bytes, those of the threads that the predicate lets through; without what the first-level cache
            has from an access before.
        asked: bytes.
        stored: of them, those written.
        torn: sectors of which a store writes a part; each time they are written as a whole.
    """

    requests: float = 0
    sectors: float = 0
    asked: float = 0
    stored: float = 0
    torn: float = 0


@dataclass
class Trace:
    """What a warp did.

    Attributes:
        cycles: from its first instruction to its last, with the program alone on its processor.
        issued: instructions.
        pipes: cycles of each pipe, of a scheduler.
        counts: instructions by kind: ``"load.128"`` (bytes of a thread), ``"barrier"``, ``"HGMMA"`` ...
        matrix: cycles of tensor cores.
        shared: cycles of shared memory, bank conflicts included.
        lines: lines of 128 bytes that its loads and stores of global memory touch, cycles of the first-level cache.
        moved: by operand, -1 where the address was not known.
        loops: (first, last address of a loop) -> times that it was gone back.
        executed: times that each instruction was.
        accesses: of 128 bits, and of any width, by the instruction's address.
    """

    cycles: float = 0.0
    issued: int = 0
    pipes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: Counter[str] = field(default_factory=Counter)
    matrix: float = 0.0
    shared: float = 0.0
    lines: float = 0.0
    moved: dict[int, Moved] = field(default_factory=dict)
    loops: Counter[tuple[int, int]] = field(default_factory=Counter)
    executed: Counter[int] = field(default_factory=Counter)
    accesses: dict[int, tuple[int, int]] = field(default_factory=dict)

    def trips(self) -> list[tuple[float, ...]]:
        """(times, instructions each time, accesses of 128 bits, accesses) of each loop, in order."""
        found: list[tuple[float, ...]] = []
        for (first, last), times in sorted(self.loops.items()):
            inside = [(a, n / self.executed[last]) for a, n in self.executed.items() if first <= a <= last]
            wide = sum(n * self.accesses.get(a, (0, 0))[0] for a, n in inside)
            every = sum(n * self.accesses.get(a, (0, 0))[1] for a, n in inside)
            found.append((float(times), round(sum(n for _, n in inside), 1), round(wide, 1), round(every, 1)))
        return found


# Bytes of code within which a division's slow path is called and returned from.
SLOW_PATH = 0x200


class UnknownBranch(RuntimeError):
    """A branch depends on a value that only the device knows."""


@dataclass(frozen=True)
class Memory:
    """What a processor sees of the memory.

    Attributes:
        far: cycles until a load from DRAM is answered.
        near: cycles until the second-level cache answers.
        port: bytes a cycle between that cache and a processor.
        cached: operands that are expected in it.
    """

    far: float
    near: float
    port: float = 64.0
    cached: frozenset[int] = frozenset()

    def latency(self, operand: int) -> float:
        """Of an operand."""
        return self.near if operand in self.cached else self.far


class Emulator:
    """A warp on its way through a program.

    Args:
        code: its instructions.
        registers: with the constants and special registers of the launch.
        warps: of a program.
        memory: latencies.
    """

    def __init__(self, code: Sequence[Instruction], registers: Registers, warps: int, memory: Memory) -> None:
        self.code, self.w, self.warps, self.memory = code, registers, warps, memory
        self.places = {ins.address: i for i, ins in enumerate(code)}
        self.trace = Trace()
        self.share = max(1.0, warps / 4)
        self.now = 0.0
        self.barriers = [0.0] * 6
        self.unit = {"shared": 0.0, "lines": 0.0, "matrix": 0.0, "function": 0.0, "double": 0.0, "port": 0.0}
        self.pending = 0.0
        self.held: set[int] = set()
        self.groups: list[float] = []
        self.products: list[float] = []
        self.product = 0.0
        # Arms that hold a call: the slow path of a division or a root.
        self.calls = [ins.address for ins in code if ins.op == "CALL"]

    def take(self, unit: str, cycles: float) -> float:
        """When a shared unit is done with this and the other warps' like instructions."""
        self.unit[unit] = max(self.now, self.unit[unit]) + cycles
        return self.unit[unit]

    def finished(self, ins: Instruction) -> float:
        """When the result of an instruction is there; counts what it does."""
        trace, op = self.trace, ins.op
        if op in MOVES and any(o.text.startswith("desc[") for o in ins.operands):
            operand, threads, sectors, lines = access(self.w, ins)
            moved = trace.moved.setdefault(operand, Moved())
            moved.requests += 1
            store = op in ("STG", "ST", "RED")
            fresh = sectors if isinstance(sectors, int) else len(sectors)
            if isinstance(sectors, set) and op == "LDG":
                # What a thread beside asked for lies in the first-level cache; asynchronous copies pass it by.
                fresh = len(sectors - self.held)
                self.held |= sectors
            trace.accesses[ins.address] = (int(ins.width == 16), 1)
            moved.sectors += fresh
            moved.asked += threads * ins.width
            if store:
                moved.stored += threads * ins.width
                # Threads that write a sector in part leave the rest to another store.
                moved.torn += max(0, fresh - threads * ins.width // SECTOR)
            trace.counts[f"{'store' if store else 'load'}.{ins.width}"] += 1
            cycles = max(float(lines), threads * ins.width / LINE, 1.0)
            trace.lines += cycles
            done = self.take("lines", cycles * self.warps)
            # Bytes queue for the processor's port, behind those of the other warps.
            sent = max(done, self.take("port", fresh * SECTOR * self.warps / self.memory.port))
            if store:
                return done + ON_CHIP["STG"]
            arrived = sent + (0.0 if not threads else self.memory.latency(operand) if fresh else FIRST_LEVEL)
            if op == "LDGSTS":
                self.pending = max(self.pending, arrived)
                return done + ON_CHIP["LDGSTS"]
            return arrived
        if op in SHARED:
            trace.counts["shuffle" if op == "SHFL" else "shared"] += 1
            cycles = conflicts(self.w, ins)
            trace.shared += cycles
            return self.take("shared", cycles * self.warps) + ON_CHIP.get(op, DEFAULT)
        if op in ("HGMMA", "HMMA", "DMMA", "IMMA"):
            trace.counts[op] += 1
            cycles = matrix_cycles(ins)
            # Of a processor: a warpgroup's own, or one of four schedulers'.
            whole = cycles / 4
            trace.matrix += whole
            done = self.take("matrix", whole * self.warps)
            if op == "HGMMA":
                self.product = done + 32
            return done + ON_CHIP["HMMA"]
        pipe, cycles = pipe_of(ins)
        trace.pipes[pipe] += cycles
        if pipe in ("function", "double"):
            return self.take(pipe, cycles * self.share) + ON_CHIP.get(op, DEFAULT)
        return self.now + ON_CHIP.get(op, DEFAULT)

    def waits(self, ins: Instruction) -> None:
        """What an instruction waits for before it starts, and what it closes."""
        for i in range(6):
            if ins.wait >> i & 1:
                self.now = max(self.now, self.barriers[i])
        if ins.op == "LDGDEPBAR":
            self.groups.append(max(self.pending, self.groups[-1] if self.groups else 0.0))
            self.pending = 0.0
        elif ins.op == "DEPBAR" and ins.operands:
            left = ins.operands[-1].index if ins.operands[-1].kind == "number" else 0
            if len(self.groups) > left:
                self.now = max(self.now, self.groups[len(self.groups) - 1 - left])
        elif ins.op == "WARPGROUP" and ins.mods[:1] == ("DEPBAR",):
            left = ins.operands[-1].index if ins.operands[-1].kind == "number" else 0
            if len(self.products) > left:
                self.now = max(self.now, self.products[len(self.products) - 1 - left])
        elif ins.op == "BAR":
            self.trace.counts["barrier"] += 1
            self.now += BARRIER

    def run(self, most: int = 2_000_000) -> Trace:
        """Follow the warp to its end.

        Raises:
            UnknownBranch: a branch depends on what memory holds, or does not end.
        """
        at, trace, w = 0, self.trace, self.w
        while at < len(self.code):
            ins = self.code[at]
            self.waits(ins)
            w.guard = True if ins.guard is None else w.predicate(ins.guard)
            trace.issued += 1
            trace.executed[ins.address] += 1
            if trace.issued > most:
                raise UnknownBranch(f"no end after {most} instructions")
            on = w.guard is True or w.guard is None or (isinstance(w.guard, tuple) and True in w.guard)
            done = self.finished(ins) if on else self.now
            if ins.op == "HGMMA" and any(o.text == "gsb0" for o in ins.operands):
                self.products.append(self.product)
            if ins.write != NO_BARRIER:
                self.barriers[ins.write] = max(self.barriers[ins.write], done)
            if ins.read != NO_BARRIER:
                self.barriers[ins.read] = max(self.barriers[ins.read], self.now + 12)
            pipe = self.share * (pipe_of(ins)[1] if pipe_of(ins)[0] in ("integer", "multiply") else 1.0)
            self.now += max(float(ins.stall), pipe, 1.0)
            target = self.jump(ins, on)
            if target is None:
                break
            if target >= 0:
                if target <= ins.address:
                    trace.loops[target, ins.address] += 1
                at = self.places[target]
            else:
                if on and ins.op not in ("BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK"):
                    step(w, ins)
                at += 1
        trace.cycles = max(self.now, *self.barriers)
        return trace

    def jump(self, ins: Instruction, on: bool) -> int | None:
        """Where the warp goes: an address, -1 for the next instruction, None for the end."""
        if ins.op not in ("BRA", "EXIT", "CALL", "RET"):
            return -1
        guard = self.w.guard
        if ins.op == "EXIT":
            # Threads that have left do nothing, which counts as little as they did.
            return None if guard is True else -1
        if not on:
            return -1
        if ins.op == "RET":
            value = self.w.value(next(o for o in ins.operands if o.kind == "R" or o.text.startswith("R")))
            if not isinstance(value, int):
                raise UnknownBranch(f"{ins}: where it returns to is not known")
            return value
        if ins.mods[:1] == ("DIV",):
            return -1
        for o in ins.operands[:-1]:
            if o.kind in ("P", "UP"):
                guard = lift(lambda a, b: a and b, guard, self.w.predicate(o))
        target = ins.operands[-1].index
        if isinstance(guard, tuple):
            # Threads that part ways meet again; the first one's way stands for both.
            guard = guard[0]
        if guard is None:
            return self.slow_path(ins, target)
        return target if guard else -1

    def slow_path(self, ins: Instruction, target: int) -> int:
        """A branch on a value that is not known: around a division's slow path, which is not taken.

        Raises:
            UnknownBranch: neither way is one.
        """
        here = ins.address
        if target > here:
            # No more than that: a whole loop that holds one of them is not skipped.
            skipped = target - here < SLOW_PATH and any(here < c < target for c in self.calls)
            # A slow path that lies behind the function's end is followed by a jump back.
            beyond = any(target <= c < target + 0x400 for c in self.calls)
            if skipped:
                return target
            if beyond:
                return -1
        raise UnknownBranch(f"{ins}: it depends on a value that is not known")


def run(
    code: Sequence[Instruction], constants: bytes, grid: tuple[int, int, int], warps: int, memory: Memory,
    program: tuple[int, int, int] | None = None,
) -> Trace:  # fmt: skip
    """Follow the first warp of a program, by default of one in the middle of the grid.

    Args:
        code: instructions of the kernel.
        constants: bank 0, see :func:`benchmarks.gates.launches.constants`.
        grid: programs in each dimension.
        warps: of a program.
        memory: latencies.
        program: its indices.
    """
    x, y, z = program or tuple(n // 2 for n in grid)
    lanes = tuple(range(LANES))
    special = {
        "SR_TID.X": lanes, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_CTAID.X": x, "SR_CTAID.Y": y, "SR_CTAID.Z": z,
        "SR_CgaCtaId": 0, "SR_LANEID": lanes, "SR_NCTAID.X": grid[0], "SR_NTID.X": 32 * warps, "SR_VIRTID": 0,
    }  # fmt: skip
    return Emulator(code, Registers(constants, special), warps, memory).run()
