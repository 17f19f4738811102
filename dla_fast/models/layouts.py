"""The layouts of checkpoints: which parts a network has, what their keys are called where, and how keys move between.

Every layout has the classification network, by itself or under ``base.``. The original gives every tree whose channels
change a ``project`` layer, also trees deeper than one level, where it is computed and never used; here and in timm
those are absent. What keys mean is told by :data:`RULES`, and what a layout has by a :class:`Layout`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dla_fast.models.checkpoint import BASE, MARKS, Checkpoint, listing

_LAST = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
# What a key is part of, the first that fits: below the classification network's prefix, and beside it. ``network`` is
# what every layout has, ``neck`` and ``scores`` are of dense prediction, ``heads`` of detectors. A project layer is
# ``unused`` in a tree deeper than one level.
RULES = {
    "network": (
        r"(base_layer|level[01])\.\d+" + _LAST,
        r"level[2-5](\.tree[12])*\.((conv|bn)[1-3]|(convs|bns)\.\d+|root\.(conv|bn)|project\.[01])" + _LAST,
    ),
    "head": (r"fc" + _LAST,),
    "neck": (r"dla_up\.ida_\d+\.(proj|up|node)_\d+(\.\w+)*", r"ida_up\.(proj|up|node)_\d+(\.\w+)*"),
    "scores": (r"fc\.0" + _LAST, r"up\.weight"),
    "heads": (r"\w+(\.\d+)*" + _LAST,),
}
_RULES = {part: re.compile("|".join(patterns)) for part, patterns in RULES.items()}
_INSIDE, _BESIDE = ("network", "head"), ("neck", "scores", "heads")
ALL = frozenset((*_INSIDE, *_BESIDE))

_PROJECT = ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var")
_TOP = {name: i for i, name in enumerate(("base_layer", *(f"level{i}" for i in range(6)), "fc"))}


@dataclass(frozen=True)
class Layout:
    """What a layout has.

    Attributes:
        prefix: before the classification network's keys.
        parts: those of :data:`RULES` that have a place.
        unused: trees deeper than one level have a project layer.
    """

    prefix: str
    parts: frozenset[str]
    unused: bool


_ALONE = Layout("", frozenset(_INSIDE), unused=True)
# By name, and by the kind of network that the checkpoint is of. The original code has no detectors, timm no more than
# classification; of other networks they get the classification network.
LAYOUTS: dict[str, Callable[[str], Layout]] = {
    "timm": lambda kind: Layout("", frozenset(_INSIDE), unused=False),
    "original": lambda kind: Layout(BASE, ALL - {"heads"}, unused=True) if kind == "segmentation" else _ALONE,
    "detector": lambda kind: Layout(BASE, ALL - {"scores"}, unused=True),
}


@dataclass
class Report:
    """What a conversion did, key by key.

    Attributes:
        renamed: new key by old key.
        added: by new key, which key of the result its values were copied from.
        dropped: by old key, why.
        reshaped: by new key, the shape it had.
        within: where in the file the parameters were, as "state_dict".
    """

    renamed: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    within: str = ""

    def lines(self) -> list[str]:
        """The report as lines: renamed keys by what changed before them, the others one by one."""
        lines = [f"found under {self.within}"] if self.within else []
        moves: dict[str, int] = {}
        for old, new in self.renamed.items():
            (*before, last), (*after, same) = old.split("."), new.split(".")
            while last == same and before and after:
                last, same = before.pop(), after.pop()
            # What differs is before the part at which they part.
            before, after = (before, after) if last == same else ([*before, last], [*after, same])
            move = f"{''.join(f'{part}.' for part in before)}* -> {''.join(f'{part}.' for part in after)}*"
            moves[move] = moves.get(move, 0) + 1
        lines += [f"renamed {move}: {count} keys" for move, count in moves.items()]
        lines += [f"reshaped {key}: it was {tuple(shape)}" for key, shape in self.reshaped.items()]
        lines += [f"added {key}: a copy of {source}" for key, source in self.added.items()]
        lines += [f"dropped {key}: {why}" for key, why in self.dropped.items()]
        return lines

    def __str__(self) -> str:
        counts = f"{len(self.renamed)} renamed, {len(self.added)} added, {len(self.dropped)} dropped"
        return "\n".join([counts, *self.lines()])


class ConvertedStateDict(OrderedDict[str, Tensor]):
    """A state dict, as ``load_state_dict`` takes it, with a :class:`Report` of how it came about as ``report``.

    Saved or copied deeply it is a plain ordered dict, which ``torch.load`` with ``weights_only=True`` reads anywhere.
    """

    report: Report
    _metadata: OrderedDict[str, Any]

    def __init__(self, items: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = (), **more: Tensor) -> None:
        super().__init__(items, **more)
        self.report = items.report if isinstance(items, ConvertedStateDict) else Report()

    def copy(self) -> ConvertedStateDict:
        """The same tensors in another dict."""
        twin = ConvertedStateDict(self)
        if hasattr(self, "_metadata"):
            twin._metadata = self._metadata.copy()
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"_metadata": self._metadata} if hasattr(self, "_metadata") else None
        return OrderedDict, (), state, None, iter(self.items())


def kind_of(state: Iterable[str]) -> str:
    """What network these keys, without wrappers' prefixes, are of: "classification", "segmentation" or "detection"."""
    keys = list(state)
    if MARKS[0] in keys:
        return "classification"
    return "segmentation" if any(_RULES["scores"].fullmatch(key) for key in keys) else "detection"


def prefix_of(state: Iterable[str]) -> str:
    """What stands before the classification network's keys."""
    return "" if kind_of(state) == "classification" else BASE


def part_of(key: str, prefix: str) -> str | None:
    """What of :data:`RULES` a key is part of, in a checkpoint with this prefix; None for what no rule knows."""
    below = key.startswith(prefix)
    parts = _INSIDE if below else _BESIDE
    return next((part for part in parts if _RULES[part].fullmatch(key[len(prefix) if below else 0 :])), None)


def deep_trees(state: Iterable[str]) -> set[str]:
    """Names of the trees deeper than one level: those above a tree that holds a root."""
    deep = set()
    for key in state:
        tree, found, _ = key.partition(".root.conv.weight")
        while found and "." in tree:
            tree = tree.rpartition(".")[0]
            deep.add(tree)
    # With a prefix its own name is none of a tree.
    return deep - {BASE.rstrip(".")}


def is_unused(key: str, deep: set[str]) -> bool:
    """Whether a key is of a project layer that nothing uses."""
    tree, found, _ = key.partition(".project.")
    return bool(found) and tree in deep


def _ordered(keys: Iterable[str], prefix: str, project: int) -> list[str]:
    """Keys in the order in which the networks register their layers; ``project`` comes first or last in a tree."""
    rank = {**_TOP, "tree1": 0, "tree2": 1, "root": 2, "project": project}

    def path(key: str) -> list[int]:
        parts = key.removeprefix(prefix).split(".") if key.startswith(prefix) else [""]
        return [rank[part] for part in parts if part in rank] if parts[0] in _TOP else [len(_TOP)]

    return sorted(keys, key=path)


def _missing_projects(state: Mapping[str, Tensor], deep: set[str]) -> dict[str, str]:
    """The keys of unused project layers that are not there, each with the key to copy.

    That is the layer which the tree does use, at the end of its left edge: the shapes agree.

    Raises:
        ValueError: the layer to copy is there in part.
    """
    found: dict[str, str] = {}
    for tree in sorted(deep):
        used = tree
        while used in deep:
            used += ".tree1"
        layer = [key for key in state if key.startswith(f"{used}.project.")]
        missing = [f"{used}.project.{name}" for name in _PROJECT if f"{used}.project.{name}" not in layer]
        if layer and missing:
            raise ValueError(f"state_dict: missing {listing(missing)}")
        found |= {new: key for key in layer if (new := tree + key.removeprefix(used)) not in state}
    return found


def convert(found: Checkpoint, layout: Layout, name: str, unknown: str) -> ConvertedStateDict:
    """A checkpoint that was read, in another layout.

    Args:
        found: the checkpoint; it is not changed, and its tensors are in the result.
        layout: the layout.
        name: how the layout is called in the report.
        unknown: "error", "keep" or "drop" what no rule knows.

    Raises:
        ValueError: keys that no rule knows, or a project layer in part.
    """
    prefix, deep = prefix_of(found.state), deep_trees(found.state)
    report = Report(dropped=dict(found.dropped), within=found.within)
    strange = []
    state: dict[str, Tensor] = {}

    def moved(key: str) -> str:
        return layout.prefix + key.removeprefix(prefix) if key.startswith(prefix) else key

    for key, value in found.state.items():
        part, old = part_of(key, prefix), found.names[key]
        if part is None and unknown != "keep":
            strange.append(old)
            report.dropped[old] = "no rule knows it"
        elif part is not None and part not in layout.parts:
            report.dropped[old] = f"{name} has no {part}"
        elif not layout.unused and is_unused(key, deep):
            report.dropped[old] = "a project layer that nothing uses"
        else:
            new = moved(key)
            state[new] = value
            if new != old:
                report.renamed[old] = new
            if key in found.shapes:
                report.reshaped[new] = found.shapes[key]
    if strange and unknown == "error":
        raise ValueError(
            f"state_dict: {len(strange)} keys are in no layout that is known ({listing(strange)}); "
            "unknown='keep' takes them along, unknown='drop' leaves them out"
        )
    if layout.unused:
        report.added = {moved(new): moved(key) for new, key in _missing_projects(found.state, deep).items()}
        state |= {key: state[source].clone() for key, source in report.added.items()}
    converted = ConvertedStateDict(
        (key, state[key]) for key in _ordered(state, layout.prefix, 3 if layout.unused else -1)
    )
    converted.report = report
    if found.metadata is not None:
        converted._metadata = _metadata(found, converted)
    return converted


def _metadata(found: Checkpoint, converted: ConvertedStateDict) -> OrderedDict[str, Any]:
    """The modules' versions, by the names that the modules have now."""
    report = converted.report
    # Called as OrderedDict[str, Any] it would remember that, and be refused where weights alone are read.
    metadata: OrderedDict[str, Any] = OrderedDict()
    old_of = {new: old for old, new in report.renamed.items()}
    for key in converted:
        source = report.added.get(key, key)
        new, old = key.rpartition(".")[0], old_of.get(source, source).rpartition(".")[0]
        while new not in metadata and found.metadata is not None and old in found.metadata:
            metadata[new] = found.metadata[old]
            (new, _, last), (old, _, same) = new.rpartition("."), old.rpartition(".")
            if last != same or not last:
                break
    return metadata
