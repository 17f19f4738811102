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
        version: of the map when it was made.
    """

    ending: Ending
    edge: Tensor
    version: int


class _Edge(torch.autograd.Function):
    """A tensor of the same shape and no memory, for the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.new_empty(1).expand(x.shape)

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


# A unit's output, as long as somebody has it -> what stands for it.
_kept: WeakIdKeyDictionary = WeakTensorKeyDictionary()


def remember(y: Tensor, ending: Ending) -> None:
    """Note how a differentiable output is formed, for those who read it."""
    _kept[y] = Kept(ending, _Edge.apply(y), y._version)


def recall(y: Tensor | None) -> Kept | None:
    """What stands for a tensor, where it is a unit's output and has not been written to since."""
    kept: Kept | None = None if y is None else _kept.get(y)
    return kept if kept is not None and y is not None and kept.version == y._version else None
