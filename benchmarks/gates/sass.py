"""A binary's machine code, as the toolkit's reader prints it: instructions, with what the assembler decided of time.

Since Volta an instruction carries its own schedule: how many cycles its warp waits before the next one, which of six
barriers it holds until its result (or its operands) are there, and which of them it waits for itself.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/\s*/\* 0x([0-9a-f]{16}) \*/", re.S)
_TEXT = re.compile(r"(?:@(!?)(U?P[0-9T]+)\s+)?([A-Z0-9_]+)((?:\.[A-Za-z0-9_]+)*)\s*(.*)", re.S)
_REGISTER = re.compile(r"([-~!|]*)(UR|R|UP|P)(Z|T|\d+)\|?((?:\.[A-Za-z0-9_]+)*)\|?$")
_CONSTANT = re.compile(r"([-~|]*)c\[0x([0-9a-f]+)\]\[(?:(U?R\d+)\+?)?(-?0x[0-9a-f]+)?\]\|?((?:\.[A-Za-z0-9_]+)*)$")
_NUMBER = re.compile(r"-?0x[0-9a-f]+$|-?\d+$")
_MEMORY = re.compile(r"(U?R\w+)(?:\.(\w+))?|(-?0x[0-9a-f]+)")
NO_BARRIER = 7


@dataclass(frozen=True)
class Operand:
    """An operand of an instruction.

    Attributes:
        kind: ``"R"``, ``"UR"``, ``"P"``, ``"UP"``, ``"number"``, ``"constant"`` or ``"other"``.
        index: a register's number, -1 for the one that is always zero (true); a number's value; a constant's offset.
        negative: whether it is taken negated, as a number (a predicate: inverted).
        inverted: whether its bits are.
        magnitude: whether its sign is dropped.
        text: as printed.
        base: register that a constant's offset is counted from.
    """

    kind: str
    index: int
    negative: bool
    inverted: bool
    magnitude: bool
    text: str
    base: str = ""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in the function, bytes.
        guard: predicate without which it does nothing; None where there is none.
        op: ``"IMAD"``, and
        mods: what follows it, ``("WIDE", "U32")``.
        operands: in order.
        stall: cycles before the warp's next instruction.
        write: barrier held until the result is there; 7 for none.
        read: barrier held until the operands were read.
        wait: barriers waited for before it starts, a bit each.
    """

    address: int
    guard: Operand | None
    op: str
    mods: tuple[str, ...]
    operands: tuple[Operand, ...]
    stall: int = 1
    write: int = NO_BARRIER
    read: int = NO_BARRIER
    wait: int = 0

    def __str__(self) -> str:
        name = ".".join((self.op, *self.mods))
        guard = f"@{self.guard.text} " if self.guard else ""
        return f"{self.address:#06x}: {guard}{name} {', '.join(o.text for o in self.operands)}"

    @property
    def width(self) -> int:
        """Bytes of a thread that a load or store moves."""
        for mod in self.mods:
            if mod in ("64", "128", "U8", "S8", "U16", "S16"):
                return {"64": 8, "128": 16, "U8": 1, "S8": 1}.get(mod, 2)
        return 4


@lru_cache(maxsize=65536)
def operand(text: str) -> Operand:
    """Read an operand."""
    found = _REGISTER.match(text)
    if found:
        signs, kind, number, _ = found.groups()
        index = -1 if number in ("Z", "T") else int(number)
        return Operand(kind, index, "-" in signs or "!" in signs, "~" in signs, "|" in signs, text)
    found = _CONSTANT.match(text)
    if found:
        signs, bank, base, offset, _ = found.groups()
        # Only bank 0, which holds the arguments, is known.
        kind = "constant" if int(bank, 16) == 0 else "other"
        at = int(offset or "0", 16)
        return Operand(kind, at, "-" in signs, "~" in signs, "|" in signs, text, base or "")
    if _NUMBER.match(text):
        return Operand("number", int(text, 0), False, False, False, text)
    return Operand("other", 0, False, False, False, text)


@lru_cache(maxsize=65536)
def address_parts(text: str) -> tuple[tuple[str, str], ...]:
    """What an address is the sum of: (register, modifier) or (number, ""); of ``desc[UR4][R2.64]`` the last part."""
    inner = text[text.rindex("[") + 1 : text.rindex("]")]
    return tuple((r, m) if r else (number, "") for r, m, number in _MEMORY.findall(inner))


def parse(text: str) -> list[Instruction]:
    """Instructions of the first function in the output of ``cuobjdump -sass``.

    Raises:
        ValueError: a line that is no instruction.
    """
    found = []
    for address, line, _, high in _LINE.findall(text):
        match = _TEXT.match(line)
        if match is None:
            raise ValueError(f"no instruction: {line!r}")
        inverted, guard, op, mods, rest = match.groups()
        control = int(high, 16) >> 41
        found.append(
            Instruction(
                int(address, 16),
                operand(inverted + guard) if guard else None,
                op,
                tuple(mods.split(".")[1:]),
                tuple(operand(o.strip()) for o in rest.split(", ")) if rest else (),
                stall=control & 15,
                write=control >> 5 & 7,
                read=control >> 8 & 7,
                wait=control >> 11 & 63,
            )
        )
    return found


def reader(name: str = "cuobjdump") -> Path:
    """A tool that comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def disassembly(cubin: bytes) -> str:
    """The machine code of a binary as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(reader()), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
