"""What a swapped residual block becomes: a fused call for each of its convolutions, the shortcut in the last one's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dla_fast.nn import stock
from dla_fast.nn.batch_norm import is_observed
from dla_fast.ops.ending import Ending
from dla_fast.reference.activation import ActSpec, activate
from dla_fast.swap.calls import (
    PLAIN,
    are_unit,
    fused_act,
    is_act,
    run_deferred_on,
    run_unit_on,
    undisturbed,
    unit_dtype,
)
from dla_fast.swap.found import Found, find, keep, look, recall
from dla_fast.swap.nodes import FusedNode


@dataclass(frozen=True)
class BlockSpec:
    """What swapping found out about a residual block.

    Attributes:
        units: names of the convolution, norm and activation of each unit; the last activates behind the addition. An
            activation without a name is a ReLU that is no child.
        argument: name of the argument that brings a shortcut, None where there is none.
        required: it has no default.
        arguments: how many arguments forward takes by position.
        downsample: name of the child that makes a shortcut of the input, None where the input itself is added.
        others: names of children that have to do nothing.
        children: how many children there are, absent ones (None) included.
        attributes: the block's own numbers and strings, on which its forward may depend.
        backend: the backend this block is forced to, or "auto" for whichever is in force.
    """

    units: tuple[tuple[str, str, str], ...]
    argument: str | None
    required: bool
    arguments: int
    downsample: str | None
    others: tuple[str, ...]
    children: int
    attributes: tuple[tuple[str, Any], ...]
    backend: str


class FusedBlock(FusedNode):
    """A residual block whose convolutions run through :func:`dla_fast.functional.conv_norm_act`.

    Every call first checks that what the fused path replaces is still there, else runs the original forward: children
    of the expected types, without hooks or parametrizations, and none besides; the block's own numbers and strings;
    plain tensors of one dtype; a shortcut of the output's shape; no export or tracing in progress; no global module
    hooks. A ``downsample`` child is called as the module it is.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        spec = self._dla_fast_spec
        call = bound(spec, args, kwargs)
        if call is None:
            return super().forward(*args, **kwargs)
        y = _recall(self, spec, *call)
        if y is not None:
            return y
        found = _look(self, spec)
        if not can_fuse(self, spec, *call):
            return super().forward(*args, **kwargs)
        y = run_block(self, spec, *call)
        keep(self, found)
        return y

    def _dla_fast_units(self) -> Iterable[tuple[nn.Module | None, nn.Module | None]]:
        return [(self._modules.get(conv), self._modules.get(bn)) for conv, bn, _ in self._dla_fast_spec.units]


def _recall(module: nn.Module, spec: BlockSpec, x: Any, shortcut: Any) -> Tensor | None:
    """The output of a block as a call before found it, frozen; None where anything differs."""
    found = find(module, spec.units[0][0])
    if found is None:
        return None
    children: Any = module._modules
    downsample = children.get(spec.downsample) if shortcut is None else None
    if downsample is None:
        return recall(module, found, [x], x if shortcut is None else shortcut)
    y = recall(module, found, [x], units=slice(-1))
    if y is None:
        return None
    # Called once, whatever comes of it: it may count, or draw random numbers.
    added = downsample(x)
    z = recall(module, found, [y], added, slice(-1, None)) if isinstance(added, Tensor) else None
    if z is not None:
        return z
    if can_fuse(module, spec, x, added):
        return run_last(module, spec, y, added)
    conv, bn, last = spec.units[-1]
    z = children[bn](children[conv](y)) + added
    return cast(Tensor, children[last](z) if last else activate(z, "relu"))


def _look(module: nn.Module, spec: BlockSpec) -> Found | None:
    units = [tuple(filter(None, names)) for names in spec.units]
    attributes = [name for name, _ in spec.attributes]
    return look(module, units, spec.backend, act="relu", attributes=attributes, idle=spec.others)


def bound(spec: BlockSpec, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Input and shortcut of a call, or None where it brings anything else."""
    if not 0 < len(args) <= spec.arguments:
        return None
    shortcut = None
    for i, value in enumerate(args[1:]):
        if i == 0 and spec.argument is not None:
            shortcut = value
        elif value is not None:
            return None
    for name, value in kwargs.items():
        if name == spec.argument and len(args) == 1:
            shortcut = value
        elif value is not None:
            return None
    return None if spec.required and shortcut is None else (args[0], shortcut)


def output_shape(convs: Sequence[nn.Conv2d], x: Sequence[int]) -> tuple[int, ...]:
    """The shape of what convolutions in a row make of a shape (N, C, H, W)."""
    height, width = x[2], x[3]
    for conv in convs:
        sides = []
        for axis, side in enumerate((height, width)):
            k, s, d, p = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis], conv.padding
            if p == "same":
                sides.append(side)
            else:
                pixels = 0 if isinstance(p, str) else p[axis]
                sides.append((side + 2 * pixels - d * (k - 1) - 1) // s + 1)
        height, width = sides
    return x[0], convs[-1].out_channels, height, width


def can_fuse(module: nn.Module, spec: BlockSpec, x: Any, shortcut: Any) -> bool:
    """Whether the block still is what was swapped, and the call one that the fused path answers as the original."""
    children = module._modules
    if len(children) != spec.children or type(x) not in PLAIN or not undisturbed():
        return False
    own = module.__dict__
    for name, value in spec.attributes:
        if own.get(name) != value:
            return False
    for name in spec.others:
        other = children.get(name)
        if other is not None and (stock.kind(other) != "identity" or is_observed(other)):
            return False
    convs: list[Any] = []
    dtype: torch.dtype | None = None
    for conv_name, bn_name, act_name in spec.units:
        conv, bn = children.get(conv_name), children.get(bn_name)
        if not are_unit(conv, bn) or (act_name and not is_act(children.get(act_name))):
            return False
        given = unit_dtype((x,), conv, bn)
        if given is None or given != (dtype or given):
            return False
        dtype = given
        convs.append(conv)
    # Adding a shortcut of another dtype or shape promotes or widens the output, or is refused.
    made = spec.downsample is not None and children.get(spec.downsample) is not None
    added = x if shortcut is None else shortcut
    if type(added) not in PLAIN or added.dtype != dtype:
        return False
    return (made and shortcut is None) or added.shape == output_shape(convs, x.shape)


def run_block(module: nn.Module, spec: BlockSpec, x: Tensor, shortcut: Tensor | None) -> Tensor:
    """The fused calls themselves, on the backend the block is forced to, if any."""
    children: Any = module._modules
    y: Tensor | Ending = x
    own = shortcut is x or (shortcut is None and children.get(spec.downsample) is None)
    for i, (conv, bn, act) in enumerate(spec.units[:-1]):
        options = {"act": _act(children, act), "carries": own and i == 0}
        y = run_deferred_on(spec.backend, [y], children[conv], children[bn], **options)
    if shortcut is None:
        downsample = children.get(spec.downsample)
        shortcut = x if downsample is None else downsample(x)
    return run_last(module, spec, y, shortcut, own)


def run_last(module: nn.Module, spec: BlockSpec, y: Tensor | Ending, shortcut: Tensor, carried: bool = False) -> Tensor:
    """The last unit of a block, and the shortcut; carried: which is the block's input."""
    children: Any = module._modules
    conv, bn, last = spec.units[-1]
    ending = _act(children, last)
    if shortcut.shape == output_shape([children[conv]], (y.z if isinstance(y, Ending) else y).shape):
        options = {"act": ending, "residual": shortcut, "carried": carried}
        return run_unit_on(spec.backend, [y], children[conv], children[bn], **options)
    # What a child made of the input may be broadcast.
    return activate(run_unit_on(spec.backend, [y], children[conv], children[bn], act="identity") + shortcut, ending)


def _act(children: Any, name: str) -> ActSpec:
    return cast(ActSpec, fused_act(children[name])) if name else "relu"
