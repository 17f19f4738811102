"""What a swap did, and why it left the rest alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# What ``swap_`` can be asked for, and the kind of its entries.
UNITS = {"nodes": "aggregate", "ladders": "merge", "blocks": "block", "convs": "conv"}


@dataclass(frozen=True)
class SwapEntry:
    """One module.

    Attributes:
        name: its path in the model, as ``named_modules`` gives it.
        kind: what it is, or resembles: ``"aggregate"`` for a node, ``"merge"`` for a whole ladder, ``"block"``,
            ``"conv"`` for a Sequential with runs of convolution, norm and activation, or ``"pool"``.
        reason: why it was skipped; for a swapped module a remark, mostly empty.
    """

    name: str
    kind: str
    reason: str = ""


@dataclass(frozen=True)
class SwapReport:
    """The result of :func:`dla_fast.swap_`; ``print(report)`` shows it as a table.

    Attributes:
        swapped: the modules that run fused now (that would, after a dry run).
        skipped: the modules that resemble one of :data:`UNITS` and stay as they are, each with the reason.
        dry_run: nothing was changed.
    """

    swapped: list[SwapEntry] = field(default_factory=list)
    skipped: list[SwapEntry] = field(default_factory=list)
    dry_run: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists, strings and booleans, ready for JSON."""
        return asdict(self)

    def counts(self) -> dict[str, int]:
        """How many modules of each of :data:`UNITS` were swapped."""
        return {unit: sum(e.kind == kind for e in self.swapped) for unit, kind in UNITS.items()}

    def __str__(self) -> str:
        done = "would swap" if self.dry_run else "swapped"
        counted = ", ".join(f"{unit} {count}" for unit, count in self.counts().items() if count)
        title = f"{done} {len(self.swapped)}{f' ({counted})' if counted else ''}, skipped {len(self.skipped)}"
        rows = [(e.name or "(model)", e.kind, done, e.reason) for e in self.swapped]
        rows += [(e.name or "(model)", e.kind, "skipped", e.reason) for e in self.skipped]
        if not rows:
            return f"{title}: nothing in the model resembles a unit that could be fused"
        rows.insert(0, ("module", "kind", "result", "reason"))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
        return "\n".join([title, *lines])
