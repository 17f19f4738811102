"""Units as code bases write them: a module that convolves, normalises and activates one map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast.nn import stock
from dla_fast.nn.batch_norm import is_observed
from dla_fast.nn.conv import is_plain_conv
from dla_fast.reference.activation import ActSpec
from dla_fast.swap import verify
from dla_fast.swap.calls import fused_act, is_act

_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


class Unit(NamedTuple):
    """The parts of a unit.

    Attributes:
        conv: what gives the map that is normalised; a convolution in effect where ``whole``, else any module.
        bn: a batch norm in effect, that nobody watches.
        act: the activation behind it.
        whole: the convolution is one that a kernel takes, and not only what is behind it.
    """

    conv: nn.Module
    bn: nn.Module
    act: ActSpec
    whole: bool


@dataclass(frozen=True)
class Structure:
    """Names of the children of a unit that is no Sequential.

    Attributes:
        head: of what gives the map that is normalised, or of a unit in itself where that is all there is.
        norm: of the batch norm, None where it is in what ``act`` names, or in the head.
        act: of the activation, None where there is no such child.
    """

    head: str
    norm: str | None
    act: str | None

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """The children one by one, as the unit's forward is expected to call them."""
        for name in (self.head, self.norm, self.act):
            if name is not None:
                x = cast(nn.Module, module._modules[name])(x)
        return x


def in_order(module: nn.Module) -> bool:
    """Whether a module's forward calls its children in order: a Sequential's, or what inherits that."""
    cls: Any = stock.original_class(module)
    return cls is nn.Sequential or (
        issubclass(cls, nn.Sequential)
        and cls.forward is nn.Sequential.forward
        and cls.__iter__ is nn.Sequential.__iter__
    )


def is_sequential(module: nn.Module) -> bool:
    """Whether calling a module is nothing but calling its children in order."""
    cls: Any = stock.original_class(module)
    return in_order(module) and cls.__call__ is nn.Sequential.__call__


def _named(module: nn.Module) -> dict[str, nn.Module]:
    """Children that do something."""
    return {name: c for name, c in module._modules.items() if c is not None and stock.kind(c) != "identity"}


def structure_of(module: nn.Module) -> Structure | None:
    """How a module that is no Sequential would be a unit, by its children."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Conv2d)) or not 0 < len(module._modules) < 9:
        return None
    children = _named(module)
    if len(children) == 1:
        (head,) = children
        return Structure(head, None, None) if unit_of(children[head]) is not None else None
    norms = [name for name, c in children.items() if stock.kind(c) in stock.NORMS]
    acts = [name for name, c in children.items() if fused_act(c) is not None]
    if not norms and not acts:
        # Norm and activation in a Sequential of their own.
        acts = [name for name, c in children.items() if is_sequential(c) and unit_tail(c) is not None]
    heads = [name for name in children if name not in norms and name not in acts]
    if len(heads) != 1 or len(norms) > 1 or len(acts) > 1 or not (norms or acts):
        return None
    if not norms and fused_act(children[acts[0]]) is not None:
        return None
    return Structure(heads[0], norms[0] if norms else None, acts[0] if acts else None)


def _parts(sequential: nn.Module) -> list[nn.Module]:
    return [c for c in sequential._modules.values() if c is not None]


def are_idle(module: nn.Module, but: tuple[str | None, ...]) -> bool:
    """Whether the other children do nothing, and nobody watches that."""
    others = (child for name, child in module._modules.items() if child is not None and name not in but)
    return all(stock.kind(child) == "identity" and not is_observed(child) for child in others)


def tail_of(bn: nn.Module, act: nn.Module | None) -> tuple[nn.Module, ActSpec] | None:
    """A norm and the activation behind it, which may be its own child; None for what no kernel ends with."""
    kind = stock.kind(bn) if "running_mean" in bn._buffers else ""
    if kind not in stock.NORMS or is_observed(bn):
        return None
    if kind.endswith("_act"):
        if not are_idle(bn, ("act",)):
            return None
        own = cast(nn.Module, bn._modules["act"])
        return (bn, cast(ActSpec, fused_act(own))) if act is None and is_act(own) else None
    if act is None:
        return bn, "identity"
    return (bn, cast(ActSpec, fused_act(act))) if is_act(act) else None


def unit_tail(sequential: nn.Module) -> tuple[nn.Module, ActSpec] | None:
    """:func:`tail_of` for what a Sequential holds, where that is nothing else."""
    return _tail(_parts(sequential))


def _tail(children: list[nn.Module]) -> tuple[nn.Module, ActSpec] | None:
    return tail_of(children[0], children[1] if len(children) == 2 else None) if 0 < len(children) < 3 else None


def _made(head: nn.Module, tail: tuple[nn.Module, ActSpec] | None) -> Unit | None:
    if tail is None:
        return None
    whole = is_plain_conv(head) and stock.kind(head) == "conv" and head.weight.shape[0] == norm_channels(tail[0])
    return Unit(head, tail[0], tail[1], whole)


def placed(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's first floating tensor; the default ones where it has none."""
    for t in (*module.parameters(), *module.buffers()):
        if t.is_floating_point():
            return t.device, t.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def norm_channels(bn: nn.Module) -> int | None:
    """The channels of a norm."""
    value, mean = bn.__dict__.get("num_features"), bn._buffers.get("running_mean")
    if isinstance(value, int):
        return value
    return mean.shape[0] if isinstance(mean, Tensor) and mean.dim() == 1 else None


def unit_of(module: nn.Module) -> Unit | None:
    """The parts of a unit, as it is now; None for what is none, or is watched.

    A Sequential of (convolution, norm, activation), each of the last two possibly in one; or a module with such
    children whose forward was found to call them like that (:func:`dla_fast.nn.stock.kind`); or one that holds nothing
    but a unit; or a convolution that holds its norm.
    """
    return None if is_observed(module) else parts_of(module)


def parts_of(module: nn.Module) -> Unit | None:
    """:func:`unit_of` for who runs in the unit's own call, that others may watch."""
    if is_sequential(module):
        children = _parts(module)
        if len(children) == 1:
            return unit_of(children[0])
        return _made(children[0], _tail(children[1:])) if children else None
    if isinstance(module, nn.Conv2d):
        return _conv_norm(module) if stock.kind(module) == "conv_norm" else None
    if type(module) in stock.EXACT or not module._modules:
        return None
    kind, structure = stock.known(module)
    if kind not in stock.UNITS or not are_idle(module, (structure.head, structure.norm, structure.act)):
        return None
    named = module._modules
    head = cast(nn.Module, named[structure.head])
    if structure.norm is None and structure.act is None:
        found = unit_of(head)
    elif structure.norm is None:
        tail = cast(nn.Module, named[cast(str, structure.act)])
        found = None if is_observed(tail) else _made(head, unit_tail(tail))
    else:
        act = None if structure.act is None else named[structure.act]
        found = _made(head, tail_of(cast(nn.Module, named[structure.norm]), act))
    if found is not None and kind == "unit_relu":
        return found._replace(act="relu") if found.act == "identity" else None
    return found


def _conv_norm(conv: Any) -> Unit | None:
    """A convolution that holds its norm, and may hold an activation."""
    activation = getattr(conv, "activation", None)
    act: ActSpec | None = "identity" if activation is None else "relu" if activation in _RELUS else None
    if isinstance(activation, nn.Module) and is_act(activation):
        act = fused_act(activation)
    tail = tail_of(conv.norm, None)
    if tail is None or act is None or tail[1] != "identity":
        return None
    return Unit(conv, tail[0], act, is_plain_conv(conv))


def in_channels(module: nn.Module) -> int | None:
    """The channels that a module takes, where that can be told or found by running it."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return module.in_channels
    if "running_mean" in module._buffers:
        return norm_channels(module)
    found = channels_of(module)
    return None if found is None else found[0]


def channels_of(module: nn.Module) -> tuple[int, int] | None:
    """Channels that a unit takes and gives: those of its convolution, or found by running a copy on a small map."""
    children = list(_named(module).values()) if module._modules else [module]
    convs: list[Any] = [c for c in children if stock.kind(c) == "conv"]
    if len(convs) == 1 and len(children) <= 3 and (is_sequential(module) or structure_of(module) is not None):
        return convs[0].in_channels, convs[0].out_channels
    taken = dict.fromkeys(
        c
        for m in module.modules()
        if isinstance(c := m.__dict__.get("in_channels"), int) and not isinstance(m, nn.ConvTranspose2d)
    )
    for channels in taken:
        given = _given(module, channels)
        if given is not None:
            return channels, given
    return None


def _given(module: nn.Module, channels: int) -> int | None:
    """Channels that a module gives for a map of so many; None where it does not take it."""
    device = torch.device("cpu")
    try:
        with verify.isolated(device), torch.no_grad():
            probe = verify.random_copy(module, device, torch.float64, torch.Generator().manual_seed(0))
            verify.set_training(probe, False)
            y = probe.forward(torch.ones(1, channels, 8, 8, dtype=torch.float64))
    except Exception:  # whatever a foreign forward raises
        return None
    return y.shape[1] if isinstance(y, Tensor) and y.dim() == 4 else None


def shapes(module: nn.Module, channels: int) -> list[tuple[int, int, int, int]]:
    """Shapes of small maps on which a module is run; of the first every convolution in it makes a pixel at least."""
    side = 3
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            side = max(side, *(d * (k - 1) + 1 for k, d in zip(m.kernel_size, m.dilation, strict=True)))
    first = [(2, side, side + 1), (2, side + 4, side), (2, 8 + side, 8 + side)]
    return [(n, channels, h, w) for n, h, w in (*first, *verify.SIZES)]
