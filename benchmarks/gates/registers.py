"""Registers and predicates of a warp's 32 threads, as far as they are known without its memory.

A value is an integer where all threads agree, a tuple of 32 where they do not, and None where it is not known, as all
that comes from memory or from floating point is. What follows from an unknown value is unknown.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from benchmarks.gates.sass import Instruction, Operand, address_parts

LANES = 32
WORD, LONG = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
Value = Any


def lift(function: Callable[..., Any], *values: Value) -> Value:
    """A function of integers, thread by thread."""
    if None in values:
        return None
    if not any(isinstance(v, tuple) for v in values):
        return function(*values)
    threads = zip(*[v if isinstance(v, tuple) else (v,) * LANES for v in values], strict=True)
    found = tuple([None if None in one else function(*one) for one in threads])
    return found[0] if found.count(found[0]) == LANES else found


def signed(value: int, bits: int = 32) -> int:
    """A two's complement number."""
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


class Registers:
    """Registers, uniform registers and predicates of a warp, and the constants that it sees.

    Args:
        constants: bank 0, with the launch's sizes and arguments.
        special: special registers by name: numbers, or tuples of 32.
    """

    def __init__(self, constants: bytes, special: dict[str, Value]) -> None:
        self.constants = constants
        self.special = special
        self.files: dict[str, list[Value]] = {
            "R": [None] * 256,
            "UR": [None] * 64,
            "P": [None] * 8,
            "UP": [None] * 8,
        }
        self.guard: Value = True

    def predicate(self, o: Operand) -> Value:
        """Whether a predicate holds."""
        value = True if o.index < 0 else self.files[o.kind][o.index]
        return lift(lambda v: not v, value) if o.negative else value

    def raw(self, o: Operand, high: int = 0) -> Value:
        """32 bits of an operand as it lies, those ``high`` words above."""
        if o.kind in ("R", "UR"):
            return 0 if o.index < 0 else self.files[o.kind][min(o.index + high, len(self.files[o.kind]) - 1)]
        if o.kind == "number":
            return (o.index >> 32 * high) & WORD
        if o.kind == "constant":
            base = self.files[o.base.rstrip("0123456789")][int(o.base.lstrip("UR"))] if o.base else 0
            return lift(lambda b: self.constant(b + o.index + 4 * high), base)
        if o.kind in ("P", "UP"):
            return lift(int, self.predicate(o))
        return None

    def constant(self, offset: int) -> int | None:
        """A word of bank 0; None outside of what is known."""
        if not 0 <= offset <= len(self.constants) - 4:
            return None
        return int(struct.unpack_from("<I", self.constants, offset)[0])

    def value(self, o: Operand) -> Value:
        """A 32-bit operand."""
        value = self.raw(o)
        if o.magnitude:
            value = lift(lambda v: abs(signed(v)) & WORD, value)
        if o.inverted:
            value = lift(lambda v: ~v & WORD, value)
        return lift(lambda v: -v & WORD, value) if o.negative and o.kind not in ("P", "UP") else value

    def wide(self, o: Operand) -> Value:
        """A 64-bit operand."""
        value = lift(lambda low, high: high << 32 | low, self.raw(o), self.raw(o, 1))
        if o.inverted:
            value = lift(lambda v: ~v & LONG, value)
        return lift(lambda v: -v & LONG, value) if o.negative else value

    def address(self, o: Operand) -> Value:
        """The sum that an address is."""
        total: Value = 0
        for name, mod in address_parts(o.text):
            if not name.lstrip("U").startswith("R"):
                part: Value = int(name, 16)
            elif name.endswith("Z"):
                part = 0
            else:
                file, at = name.rstrip("0123456789"), int(name.lstrip("UR"))
                part = self.files[file][at]
                if mod == "64":
                    part = lift(lambda low, high: high << 32 | low, part, self.files[file][at + 1])
                elif mod == "":
                    part = lift(signed, part)
            total = lift(lambda a, b: a + b, total, part)
        return total

    def put(self, file: str, index: int, value: Value) -> None:
        """Write a register in the threads that the guard lets through."""
        if index < 0:
            return
        registers = self.files[file]
        if self.guard is True:
            registers[index] = value
        elif self.guard is None:
            registers[index] = None
        elif isinstance(self.guard, tuple):
            guards = self.guard
            old = registers[index] if isinstance(registers[index], tuple) else (registers[index],) * LANES
            new = value if isinstance(value, tuple) else (value,) * LANES
            mixed = tuple([n if g else o for g, n, o in zip(guards, new, old, strict=True)])
            registers[index] = mixed[0] if mixed.count(mixed[0]) == LANES else mixed

    def write(self, o: Operand, value: Value, words: int = 1) -> None:
        """Write a register and those above it."""
        for word in range(words):
            self.put(o.kind, o.index + word if o.index >= 0 else -1, lift(lambda v, w=word: v >> 32 * w & WORD, value))

    def forget(self, ins: Instruction) -> None:
        """The results of an instruction whose effect is not known."""
        for place, o in enumerate(ins.operands[:3]):
            if o.kind in ("P", "UP") and o.index >= 0 and not o.negative and place < 2:
                self.put(o.kind, o.index, None)
            elif o.kind in ("R", "UR"):
                for word in range(words_of(ins)):
                    self.put(o.kind, o.index + word if o.index >= 0 else -1, None)
                return
            elif o.kind not in ("P", "UP"):
                return


def words_of(ins: Instruction) -> int:
    """Registers of a result that is not known."""
    if ins.op in ("LDG", "LDS", "LDC", "ULDC", "LD", "LDL"):
        return max(1, ins.width // 4)
    if ins.op == "LDSM":
        return int(ins.mods[-1]) if ins.mods[-1] in ("2", "4") else 1
    if ins.op == "HGMMA":
        return int(ins.mods[0].split("x")[1]) // 2
    if ins.op in ("HMMA", "IMMA"):
        return 4
    return 2 if ins.op in ("DADD", "DMUL", "DFMA", "DMMA", "CS2R") or "F64" in ins.mods[:1] else 1
