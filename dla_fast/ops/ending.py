"""How a unit ends, as a value: what its output is formed of by whoever reads it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary, WeakTensorKeyDictionary


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

    generate_vmap_rule = True

    @staticmethod
    def forward(edge: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def valued(edge: Tensor, values: Tensor) -> Tensor:
    """A map that was not saved, formed again and back in its graph."""
    y: Tensor = _Valued.apply(edge, values)
    return y


class _Made:
    """How an output is formed, as long as the graph keeps what of: nothing is kept alive here but vectors."""

    __slots__ = ("edge", "ending", "maps", "place", "versions")

    def __init__(self, y: Tensor, ending: Ending) -> None:
        flat = ending.flat()
        self.place, self.versions = y.data_ptr(), [y._version, *(t._version for t in flat if t is not None)]
        self.maps = [TensorWeakRef(t) if t is not None and t.dim() == 4 else None for t in flat]
        self.ending = ending.with_tensors(
            iter([t if m is None else None for t, m in zip(flat, self.maps, strict=True)])
        )
        self.edge: Tensor | None = None

    def now(self, y: Tensor) -> Ending | None:
        """The ending, where all of it is there as it was."""
        if self.place != y.data_ptr():
            return None
        flat = self.ending.flat()
        for i, ref in enumerate(self.maps):
            if ref is not None:
                flat[i] = ref()
                if flat[i] is None:
                    return None
        found = [y._version, *(t._version for t in flat if t is not None)]
        return self.ending.with_tensors(iter(flat)) if found == self.versions else None


# A unit's output, as long as somebody has it -> how it is formed.
_made: WeakIdKeyDictionary = WeakTensorKeyDictionary()


def _recomputed() -> bool:
    """Whether what is saved now is dropped and computed again (torch.utils.checkpoint), of other objects then."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def remember(y: Tensor, ending: Ending) -> None:
    """Note how a differentiable output is formed, for those who read it."""
    if not _recomputed():
        _made[y] = _Made(y, ending)


def recall(y: Tensor) -> Ending | None:
    """How a unit's output is formed, where what it is formed of is there, and nothing has been written to since.

    Writes past autograd's version counters (``.data``, NumPy) are not noticed.
    """
    found: _Made | None = _made.get(y)
    return None if found is None or _recomputed() else found.now(y)


def keep(y: Tensor, ending: Ending) -> Kept:
    """What stands for an output that :func:`recall` knows; to be called where gradients are recorded."""
    found: _Made = _made[y]
    if found.edge is None:
        found.edge = _Edge.apply(y)
    return Kept(ending, cast(Tensor, found.edge))
