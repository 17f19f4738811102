"""How a unit ends, as a value: what its output is formed of by whoever reads it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary


class Ending(NamedTuple):
    """``y = act(norm(z) + residual)`` of a unit with the statistics of its batch, in place of y.

    Attributes:
        z: (N, C, H, W), what the convolution gave.
        mean: (C,), of z, in the accumulation dtype.
        var: (C,), biased, likewise.
        weight: (C,) or None, like ``bias``.
        bias: see ``weight``.
        residual: shape of z, itself or how it is formed; or None.
        eps: added to the variance.
        act: name of the activation.
        slope: of leaky_relu.
        backend: whose kernels made z.
        ports: where a unit has left its ending to its reader: of the shapes of z, mean and var and without meaning but
            for what comes back for them, see :mod:`dla_fast.ops.chain`.
        carrier: where the unit takes a further gradient of its first input, a port of that one's shape.
    """

    z: Tensor
    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | Ending | None
    eps: float
    act: str
    slope: float
    backend: str
    ports: tuple[Tensor, Tensor, Tensor] | None = None
    carrier: Tensor | None = None

    @property
    def options(self) -> tuple[float, str, float]:
        """What is no tensor."""
        return self.eps, self.act, self.slope

    def form(self, tail: Callable[..., Tensor], maps: dict[int, Tensor]) -> Tensor:
        """y, by the operator of a backend; ``maps`` has those that were formed before, by where their z lies."""
        place = self.z.data_ptr()
        if place not in maps or self.z.numel() == 0:
            added = self.residual.form(tail, maps) if isinstance(self.residual, Ending) else self.residual
            maps[place] = tail(*self[:5], added, *self.options)
        return maps[place]

    def depth(self) -> int:
        """How many maps are formed to form y."""
        return 1 + (self.residual.depth() if isinstance(self.residual, Ending) else 0)

    def flat(self) -> list[Tensor | None]:
        """Its tensors, those of the residual last."""
        own = list(self[:5])
        return [*own, *self.residual.flat()] if isinstance(self.residual, Ending) else [*own, self.residual]

    def with_tensors(self, tensors: Iterator[Tensor | None]) -> Ending:
        """The same of other tensors, in the order of :meth:`flat`."""
        z, mean, var, weight, bias = cast(Any, [next(tensors) for _ in range(5)])
        residual = self.residual.with_tensors(tensors) if isinstance(self.residual, Ending) else next(tensors)
        return self._replace(z=z, mean=mean, var=var, weight=weight, bias=bias, residual=residual)

    def skeleton(self) -> Ending:
        """The same without tensors, for :meth:`with_tensors`."""
        return self.with_tensors(itertools.repeat(None))


# The arguments of an operator none of whose inputs is normalised on load.
NO_PROLOGUE: tuple[Any, ...] = (-1, None, None, None, None, None, 0.0, "identity", 0.0)


def prologue(index: int, ending: Ending) -> tuple[Any, ...]:
    """The arguments of an operator whose input ``index`` is ``ending.z``; its residual is a tensor or None."""
    return index, ending.residual, *ending[1:5], *ending.options


class Kept(NamedTuple):
    """What stands for a map that is not saved.

    Attributes:
        ending: how it is formed.
        edge: a tensor of its shape without values, from which gradients flow to where it came from.
    """

    ending: Ending
    edge: Tensor


def port(x: Tensor) -> Tensor:
    """A tensor of the same shape, without values or memory."""
    return x.new_empty_strided(x.shape, (0,) * x.dim())


class _Edge(torch.autograd.Function):
    """What stands for a map in the graph alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return port(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Valued(torch.autograd.Function):
    """Values in the place of an edge."""

    @staticmethod
    def forward(ctx: Any, edge: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def valued(edge: Tensor, values: Tensor) -> Tensor:
    """A map that was not saved, formed again and back in its graph."""
    y: Tensor = _Valued.apply(edge, values)
    return y


# A unit's output, as long as somebody has it -> its ending, the output's version then, and an edge once one is needed.
_made: WeakIdKeyDictionary = WeakTensorKeyDictionary()


def remember(y: Tensor, ending: Ending) -> None:
    """Note how a differentiable output is formed, for those who read it."""
    _made[y] = [ending, y._version, None]


def recall(y: Tensor) -> Ending | None:
    """How a tensor was formed, where it is a unit's output and has not been written to since."""
    found = _made.get(y)
    return found[0] if found is not None and found[1] == y._version else None


def keep(y: Tensor) -> Kept:
    """What stands for an output that :func:`recall` knows."""
    found = _made[y]
    if found[2] is None:
        found[2] = _Edge.apply(y)
    return Kept(found[0], found[2])
