"""What a warp's integer instructions do to its registers; of all others the result is not known."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from benchmarks.gates.registers import LANES, LONG, WORD, Registers, Value, lift, signed
from benchmarks.gates.sass import Instruction, Operand


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def _rounded_up(value: int) -> int:
    """Bits of the float32 not below an integer."""
    bits = _bits(float(value))
    return bits + 1 if _float(bits) < value else bits


def _split(operands: tuple[Operand, ...]) -> tuple[list[Operand], list[Operand]]:
    """(predicates, others) among operands."""
    predicates = [o for o in operands if o.kind in ("P", "UP")]
    return predicates, [o for o in operands if o.kind not in ("P", "UP")]


def _carries(ins: Instruction) -> tuple[Operand, list[Operand], list[Operand], list[Operand]]:
    """(result, predicates written, numbers, predicates read) of an addition."""
    target, rest = ins.operands[0], ins.operands[1:]
    out: list[Operand] = []
    while rest and rest[0].kind in ("P", "UP"):
        out.append(rest[0])
        rest = rest[1:]
    predicates, numbers = _split(rest)
    return target, out, numbers, predicates


def _add(w: Registers, ins: Instruction) -> None:
    target, out, numbers, into = _carries(ins)
    values = [w.value(o) for o in numbers]
    extended = "X" in ins.mods
    if extended:
        # A negated operand of an extended addition is inverted; the carry completes it.
        values = [
            lift(lambda v: ~v & WORD, w.raw(o)) if o.negative else v for o, v in zip(numbers, values, strict=True)
        ]
        values += [lift(int, w.predicate(o)) for o in into]
    elif out and any(o.negative for o in numbers):
        # -x as ~x + 1, so that the carry is that of an unsigned subtraction.
        values = [
            lift(lambda v: (~v & WORD) + 1, w.raw(o)) if o.negative else v for o, v in zip(numbers, values, strict=True)
        ]
    if "64" in ins.mods:
        w.write(target, lift(lambda *v: sum(v) & LONG, *[w.wide(o) for o in numbers]), 2)
        return
    total = lift(lambda *v: sum(v), *values)
    w.write(target, lift(lambda v: v & WORD, total))
    for times, o in enumerate(out, start=1):
        w.put(o.kind, o.index, lift(lambda v, n=times: v >> 32 >= n, total))


def _multiply(w: Registers, ins: Instruction) -> None:
    target, out, numbers, into = _carries(ins)
    a, b = w.value(numbers[0]), w.value(numbers[1])
    if "U32" not in ins.mods:
        a, b = lift(signed, a), lift(signed, b)
    wide, high = "WIDE" in ins.mods, "HI" in ins.mods
    c = w.wide(numbers[2]) if wide or high else w.value(numbers[2])
    carry = lift(int, w.predicate(into[-1])) if "X" in ins.mods and into else 0
    if wide or high:
        total = lift(lambda x, y, z, k: (x * y & LONG) + z + k, a, b, c, carry)
        if high:
            # The third operand of a high product is its upper word's addend, given as a pair.
            w.write(target, lift(lambda v: v >> 32 & WORD, total))
        else:
            w.write(target, lift(lambda v: v & LONG, total), 2)
        for o in out:
            w.put(o.kind, o.index, lift(lambda v: v > LONG, total))
        return
    total = lift(lambda x, y, z, k: (x * y & WORD) + z + k, a, b, c, carry)
    w.write(target, lift(lambda v: v & WORD, total))
    for o in out:
        w.put(o.kind, o.index, lift(lambda v: v > WORD, total))


def _scaled(w: Registers, ins: Instruction) -> None:
    """LEA: a shifted left, plus b."""
    target, out, numbers, into = _carries(ins)
    shift = numbers[-1].index if numbers[-1].kind == "number" and len(numbers) > 2 else 0
    low, b = w.value(numbers[0]), w.value(numbers[1])
    carry = lift(int, w.predicate(into[-1])) if "X" in ins.mods and into else 0
    if "HI" in ins.mods:
        if "SX32" in ins.mods:
            part = lift(lambda v: signed(v) >> (32 - shift) & WORD, low)
        else:
            above = w.value(numbers[2]) if len(numbers) > 3 else 0
            part = lift(lambda v, h: (h << 32 | v) << shift >> 32 & WORD, low, above)
    else:
        part = lift(lambda v: v << shift & WORD, low)
    total = lift(lambda p, q, k: p + q + k, part, b, carry)
    w.write(target, lift(lambda v: v & WORD, total))
    for o in out:
        w.put(o.kind, o.index, lift(lambda v: v > WORD, total))


def _shift(w: Registers, ins: Instruction) -> None:
    target, low, by, high = ins.operands[0], *(w.value(o) for o in ins.operands[1:4])
    # The half that a shift does not read need not be known.
    single = any(m in ("U32", "S32") for m in ins.mods)
    upper, is_signed = "HI" in ins.mods, any(m in ("S32", "S64") for m in ins.mods)
    left = "L" in ins.mods
    if single and not (left and upper):
        low, high = (low, 0) if left else (0 if upper else low, high)

    def shifted(a: int, s: int, c: int) -> int:
        both = c << 32 | a
        s = s & 63 if "W" in ins.mods else min(s, 64)
        moved = both << s if left else (signed(both, 64) if is_signed else both) >> s
        return (moved >> 32 if upper else moved) & WORD

    w.write(target, lift(shifted, low, by, high))


def _logic(w: Registers, ins: Instruction) -> None:
    """LOP3: any function of three bits."""
    target, out, rest = ins.operands[0], [], list(ins.operands)
    if target.kind in ("P", "UP"):
        out, rest = [target], rest[1:]
        target = rest[0]
    a, b, c, table = rest[1:5]
    lut = table.index
    values = [w.value(o) for o in (a, b, c)]
    # Unknown inputs that the table does not read do not matter.
    reads = [any((lut >> i & 1) != (lut >> (i ^ bit) & 1) for i in range(8)) for bit in (4, 2, 1)]
    values = [v if used else 0 for v, used in zip(values, reads, strict=True)]

    def combined(x: int, y: int, z: int) -> int:
        total = 0
        for i in range(8):
            if lut >> i & 1:
                total |= (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
        return total & WORD

    found = lift(combined, *values)
    w.write(target, found)
    for o in out:
        w.put(o.kind, o.index, lift(lambda v: v != 0, found))


def _predicate_logic(w: Registers, ins: Instruction) -> None:
    first, second, *inputs, table, table2 = ins.operands
    for target, lut in ((first, table.index), (second, table2.index)):
        if target.index >= 0:
            values = [w.predicate(o) for o in inputs]
            reads = [any((lut >> i & 1) != (lut >> (i ^ bit) & 1) for i in range(8)) for bit in (4, 2, 1)]
            values = [v if used else False for v, used in zip(values, reads, strict=True)]
            found = lift(lambda a, b, c, t=lut: bool(t >> (4 * a + 2 * b + c) & 1), *values)
            w.put(target.kind, target.index, found)


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _both(a: Value, b: Value) -> Value:
    """And: false where either is known to be."""
    return False if a is False or b is False else lift(lambda x, y: x and y, a, b)


def _either(a: Value, b: Value) -> Value:
    return True if a is True or b is True else lift(lambda x, y: x or y, a, b)


def _compare(w: Registers, ins: Instruction) -> None:
    first, second, a, b, with_, *low = ins.operands
    x, y = w.value(a), w.value(b)
    if "U32" not in ins.mods:
        x, y = lift(signed, x), lift(signed, y)
    kind = ins.mods[0]
    found = lift(_COMPARE[kind], x, y)
    if "EX" in ins.mods:
        strict = _COMPARE[kind[0] + "T"] if kind in ("LE", "GE") else _COMPARE[kind]
        rest, same = w.predicate(low[0]), lift(lambda p, q: p == q, x, y)
        if kind == "NE":
            found = _either(found, rest)
        elif kind == "EQ":
            found = _both(found, rest)
        else:
            found = _either(lift(strict, x, y), _both(same, rest))
    other = w.predicate(with_)
    join = {"AND": _both, "OR": _either}.get(next((m for m in ins.mods if m in ("AND", "OR", "XOR")), "AND"))
    opposite = lift(lambda v: not v, found)
    for target, value in ((first, found), (second, opposite)):
        if target.index >= 0:
            w.put(target.kind, target.index, join(value, other) if join else lift(lambda p, q: p != q, value, other))


def _select(w: Registers, ins: Instruction) -> None:
    target, a, b, p = ins.operands
    w.write(target, lift(lambda c, x, y: x if c else y, w.predicate(p), w.value(a), w.value(b)))


def _extreme(w: Registers, ins: Instruction) -> None:
    """The smaller of two where the predicate holds, else the larger."""
    target, a, b, p = ins.operands[0], ins.operands[1], ins.operands[2], ins.operands[-1]
    read = (lambda v: v) if "U32" in ins.mods else signed
    found = lift(lambda c, x, y: (min if c else max)(read(x), read(y)) & WORD, w.predicate(p), w.value(a), w.value(b))
    w.write(target, found)


def _add_extreme(w: Registers, ins: Instruction) -> None:
    """The extreme of a + b and c."""
    target, a, b, c, p = ins.operands
    read = (lambda v: v) if "U32" in ins.mods else signed
    values = (w.predicate(p), w.value(a), w.value(b), w.value(c))
    w.write(target, lift(lambda k, x, y, z: (min if k else max)(read(x + y & WORD), read(z)) & WORD, *values))


def _permute(w: Registers, ins: Instruction) -> None:
    target, a, selector, b = ins.operands

    def bytes_of(x: int, s: int, y: int) -> int:
        source, total = y << 32 | x, 0
        for i in range(4):
            pick = s >> 4 * i & 15
            byte = source >> 8 * (pick & 7) & 255
            total |= (255 if byte >> 7 else 0 if pick & 8 else byte) << 8 * i if pick & 8 else byte << 8 * i
        return total

    w.write(target, lift(bytes_of, w.value(a), w.value(selector), w.value(b)))


def _sign_extend(w: Registers, ins: Instruction) -> None:
    target, a, bits = ins.operands
    if "U32" in ins.mods:
        w.write(target, lift(lambda v, n: v & ((1 << n) - 1), w.value(a), w.value(bits)))
    else:
        w.write(target, lift(lambda v, n: signed(v & ((1 << n) - 1), n) & WORD, w.value(a), w.value(bits)))


def _absolute(w: Registers, ins: Instruction) -> None:
    w.write(ins.operands[0], lift(lambda v: abs(signed(v)) & WORD, w.value(ins.operands[1])))


def _move(w: Registers, ins: Instruction) -> None:
    w.write(ins.operands[0], w.value(ins.operands[1]))


def _load_constant(w: Registers, ins: Instruction) -> None:
    target, source = ins.operands[:2]
    for word in range(max(1, ins.width // 4)):
        w.put(target.kind, target.index + word if target.index >= 0 else -1, w.raw(source, word))


def _to_uniform(w: Registers, ins: Instruction) -> None:
    value = w.value(ins.operands[-1])
    w.write(ins.operands[0], value[0] if isinstance(value, tuple) else value)


def _special(w: Registers, ins: Instruction) -> None:
    source = ins.operands[1].text
    words = 2 if ins.op == "CS2R" and "32" not in ins.mods else 1
    w.write(ins.operands[0], 0 if source == "SRZ" else w.special.get(source), words)


def _from_integer(w: Registers, ins: Instruction) -> None:
    if ins.mods != ("RP",) and ins.mods != ("U32", "RP"):
        w.forget(ins)
        return
    read = signed if ins.mods == ("RP",) else int
    w.write(ins.operands[0], lift(lambda v: _rounded_up(read(v)), w.value(ins.operands[1])))


def _to_integer(w: Registers, ins: Instruction) -> None:
    if "TRUNC" not in ins.mods or "U32" not in ins.mods or "F64" in ins.mods:
        w.forget(ins)
        return
    found = lift(_float, w.value(ins.operands[1]))
    w.write(ins.operands[0], lift(lambda v: 0 if math.isnan(v) else int(min(max(v, 0.0), float(WORD))), found))


def _function_unit(w: Registers, ins: Instruction) -> None:
    if ins.mods != ("RCP",):
        w.forget(ins)
        return
    found = lift(lambda v: 1.0 / _float(v) if _float(v) else math.inf, w.value(ins.operands[1]))
    w.write(ins.operands[0], lift(_bits, found))


def _packed_constant(w: Registers, ins: Instruction) -> None:
    """HFMA2 of zeros is how a constant is made of two halves."""
    target, a, b, *rest = ins.operands
    if a.index >= 0 or b.index >= 0 or a.kind != "R" or b.kind != "R" or len(rest) != 2:
        w.forget(ins)
        return
    try:
        high, low = (struct.unpack("<H", struct.pack("<e", float(o.text.replace("+", ""))))[0] for o in rest)
    except (ValueError, OverflowError):
        w.forget(ins)
        return
    w.write(target, high << 16 | low)


def _shuffle(w: Registers, ins: Instruction) -> None:
    found, target, value, lane, _ = ins.operands
    w.put(found.kind, found.index, True)
    values, lanes = w.value(value), w.value(lane)
    if values is None or not isinstance(lanes, int) or not isinstance(values, tuple):
        # What every thread has alike stays so.
        w.write(target, values if isinstance(values, int) else None)
        return
    sources = {
        "IDX": lambda i: lanes,
        "BFLY": lambda i: i ^ lanes,
        "UP": lambda i: i - lanes,
        "DOWN": lambda i: i + lanes,
    }
    pick = sources[ins.mods[0]]
    moved = tuple([values[pick(i)] if 0 <= pick(i) < LANES else values[i] for i in range(LANES)])
    w.write(target, moved[0] if moved.count(moved[0]) == LANES else moved)


def _pack_predicates(w: Registers, ins: Instruction) -> None:
    mask = w.value(ins.operands[-1])
    held = w.value(ins.operands[2]) if len(ins.operands) > 3 else 0
    if not isinstance(mask, int):
        w.forget(ins)
        return
    bits = [lift(lambda v, i=i: int(v) << i, w.files["P"][i]) for i in range(7) if mask >> i & 1]
    w.write(ins.operands[0], lift(lambda h, *b: (h & ~mask & WORD) | sum(b), held, *bits))


def _unpack_predicates(w: Registers, ins: Instruction) -> None:
    value, mask = w.value(ins.operands[1]), w.value(ins.operands[-1])
    for i in range(7):
        if not isinstance(mask, int) or mask >> i & 1:
            w.put("P", i, lift(lambda v, i=i: bool(v >> i & 1), value))


def _ready(w: Registers, ins: Instruction) -> None:
    """What waits for memory, or asks who is first, is answered at once."""
    for o in ins.operands[:1]:
        if o.kind in ("P", "UP"):
            w.put(o.kind, o.index, True)


def _vote(w: Registers, ins: Instruction) -> None:
    """Whether a predicate holds in any thread, or in all."""
    *targets, asked = ins.operands
    value = w.predicate(asked)
    values = value if isinstance(value, tuple) else (value,)
    agreed = any if "ANY" in ins.mods else all
    for o in targets:
        if o.kind in ("P", "UP"):
            w.put(o.kind, o.index, None if None in values else agreed(values))
        else:
            w.write(o, None)


EFFECTS: dict[str, Callable[[Registers, Instruction], None]] = {
    "IADD3": _add, "VIADD": _add, "IMAD": _multiply, "LEA": _scaled, "SHF": _shift, "LOP3": _logic,
    "PLOP3": _predicate_logic, "ISETP": _compare, "SEL": _select, "IMNMX": _extreme, "VIMNMX": _extreme,
    "VIADDMNMX": _add_extreme, "PRMT": _permute, "SGXT": _sign_extend, "IABS": _absolute, "MOV": _move,
    "LDC": _load_constant, "R2UR": _to_uniform, "S2R": _special, "S2UR": _special, "CS2R": _special,
    "I2F": _from_integer, "F2I": _to_integer, "MUFU": _function_unit, "HFMA2": _packed_constant, "SHFL": _shuffle,
    "P2R": _pack_predicates, "R2P": _unpack_predicates, "SYNCS": _ready, "ELECT": _ready,
    "VOTE": _vote, "VOTEU": _vote,
}  # fmt: skip
_STATELESS = (
    "STG",
    "STS",
    "RED",
    "ST",
    "STL",
    "STSM",
    "BAR",
    "BRA",
    "NOP",
    "WARPGROUP",
    "DEPBAR",
    "LDGDEPBAR",
    "LDGSTS",
)


def step(w: Registers, ins: Instruction) -> None:
    """The effect of an instruction that does not jump."""
    if ins.op in _STATELESS:
        return
    # The uniform datapath does the same with registers of its own.
    plain = ins.op[1:] if ins.op.startswith("U") and ins.op[1:] in EFFECTS else ins.op
    effect = EFFECTS.get(plain)
    if effect is None:
        w.forget(ins)
    else:
        effect(w, ins)
