"""What an instruction costs a Hopper: cycles of its pipe and until its result is there, bytes and bank conflicts."""

from __future__ import annotations

from typing import Any

from benchmarks.gates.registers import LANES, Registers, lift
from benchmarks.gates.sass import Instruction

# Cycles of a Hopper until a result is there (microbenchmarks of Luo et al. 2024, Abdelkhalik et al. 2022, rounded).
ON_CHIP = {
    "LDS": 30, "LDSM": 33, "SHFL": 25, "MUFU": 22, "F2F": 22, "F2I": 22, "I2F": 22, "LDC": 35, "ULDC": 35, "S2R": 25,
    "S2UR": 25, "R2UR": 12, "DADD": 16, "DMUL": 16, "DFMA": 16, "DSETP": 16, "DMMA": 34, "HMMA": 33, "IMMA": 33,
    "STS": 12, "STSM": 16, "STG": 20, "LDGSTS": 20,
}  # fmt: skip
DEFAULT = 20
# Cycles of a load that the first-level cache answers.
FIRST_LEVEL = 38
# Cycles that a barrier takes when everyone is there.
BARRIER = 20
# Cycles of a pipe that one instruction of a warp takes (CUDA programming guide, throughput of arithmetic instructions
# at 9.0: 128 float32, 64 integer, logic, compare and conversion results a cycle and processor, 16 of the function unit
# and of conversions that involve 64 bits, 64 of float64).
_FLOAT = ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2")
_FUNCTION = ("MUFU",)
_DOUBLE = ("DADD", "DMUL", "DFMA", "DSETP")
_CONVERT = ("F2F", "F2I", "I2F", "FCHK")
_FREE = (
    "NOP", "BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "BAR", "MOV", "S2R",
    "LDC", "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS", "HGMMA", "HMMA", "CS2R", "WARPSYNC",
)  # fmt: skip
MOVES = ("LDG", "STG", "LDGSTS", "LD", "ST", "RED", "ATOMG")
SHARED = ("LDS", "STS", "LDSM", "STSM", "SHFL")
SECTOR, LINE = 32, 128


def pipe_of(ins: Instruction) -> tuple[str, float]:
    """(pipe of a scheduler, its cycles for one warp)."""
    if ins.op in _FLOAT or ins.op in _FREE or ins.op.startswith("U"):
        return "issue", 1.0
    if ins.op in _FUNCTION:
        return "function", 8.0
    if ins.op in _CONVERT:
        return "function", 8.0 if any("64" in m for m in ins.mods) else 2.0
    if ins.op in _DOUBLE:
        return "double", 2.0
    if ins.op == "IMAD":
        return "multiply", 2.0
    return "integer", 2.0


def matrix_cycles(ins: Instruction) -> float:
    """Cycles of a processor's tensor cores (HGMMA: of a warpgroup; HMMA: of one warp, on one of the four)."""
    if ins.op == "HGMMA":
        _, n, k = (int(part) for part in ins.mods[0].split("x"))
        return n / 2 * (k / (8 if any("TF32" in m for m in ins.mods) else 16))
    if ins.op == "DMMA":
        return 16.0
    # 16 x 8 x 16 in half precision: the older instructions reach about 62 % of the rate.
    shape = next((m for m in ins.mods if m.isdigit()), "16816")
    k = int(shape[3:]) if shape.startswith("168") else 16
    return k / (8 if any("TF32" in m for m in ins.mods) else 16) * 6.5


# Operands are told apart by their address: each has 2^40 bytes of its own.
SPACE = 40


def _active(w: Registers, ins: Instruction) -> list[bool]:
    """Threads for which an access happens."""
    allowed: Any = w.guard
    if ins.op == "LDGSTS" and ins.operands[-1].kind == "P":
        # Where its predicate does not hold, zeros are written without a read.
        allowed = lift(lambda a, b: a and b, allowed, w.predicate(ins.operands[-1]))
    if allowed is None or isinstance(allowed, bool):
        return [allowed is not False] * LANES
    return [a is not False for a in allowed]


def access(w: Registers, ins: Instruction) -> tuple[int, int, int | set[int], int]:
    """(operand, threads, sectors or how many there are at least, lines) of an access to global memory."""
    place = next(o for o in ins.operands if o.text.startswith("desc["))
    addresses, active = w.address(place), _active(w, ins)
    threads, width = sum(active), ins.width
    if addresses is None or not threads:
        return -1, threads, -(-threads * width // SECTOR), -(-threads * width // LINE)
    each = addresses if isinstance(addresses, tuple) else (addresses,) * LANES
    bytes_of = [a for a, on in zip(each, active, strict=True) if on and a is not None]
    if not bytes_of:
        return -1, threads, -(-threads * width // SECTOR), -(-threads * width // LINE)
    sectors = {b // SECTOR for a in bytes_of for b in (a, a + width - 1)}
    return bytes_of[0] >> SPACE, threads, sectors, len({s * SECTOR // LINE for s in sectors})


def conflicts(w: Registers, ins: Instruction) -> float:
    """Cycles of shared memory for an access: 32 banks of 4 bytes."""
    if ins.op == "SHFL":
        return 1.0
    words = ins.width // 4 or 1
    if ins.op in ("LDSM", "STSM"):
        return float(ins.mods[-1]) if ins.mods[-1] in ("2", "4") else 1.0
    place = next((o for o in ins.operands if o.text.startswith("[")), None)
    addresses = None if place is None else w.address(place)
    active = _active(w, ins)
    if not isinstance(addresses, tuple):
        return float(words) if addresses is None else 1.0
    # Threads of a wider access take turns: a quarter warp of 16 bytes, half a warp of 8.
    cycles, group = 0, LANES // words
    for start in range(0, LANES, group):
        banks: dict[int, set[int]] = {}
        for a, on in zip(addresses[start : start + group], active[start : start + group], strict=True):
            if on and a is not None:
                for word in range(words):
                    banks.setdefault((a // 4 + word) % 32, set()).add(a // 4 + word)
        cycles += max((len(v) for v in banks.values()), default=0)
    return float(max(cycles, 1))
