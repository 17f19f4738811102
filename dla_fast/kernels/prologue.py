"""An input that is z of the unit before: y = act(norm(z) + residual), formed in a pass of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dla_fast.kernels.tail import tail, tail_backward_apply, tail_backward_reduce


class Prologue(NamedTuple):
    """What is done to an input before it is multiplied, as the operators take it.

    Attributes:
        input: its number, or -1 where nothing is done to any.
        residual: shape of z, or None.
        mean: (C,), of z, accumulation dtype.
        var: (C,), biased.
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the variance.
        act: name of the activation.
        slope: of leaky_relu.
    """

    input: int = -1
    residual: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    act: str = "identity"
    slope: float = 0.0

    def formed(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The inputs, y in the place of z."""
        if self.input < 0:
            return xs
        y = tail(xs[self.input], *self._norm(), self.eps, self.act, self.slope)
        return [y if i == self.input else x for i, x in enumerate(xs)]

    def through(self, dy: Tensor, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the gradient of y: dy', that of what is activated, and its sums, alone and times x_hat."""
        norm, options = self._norm(), (self.eps, self.act, self.slope)
        sums = tail_backward_reduce(dy, z, *norm, *options)
        _, du = tail_backward_apply(dy, z, *norm, None, None, 0.0, *options, True)
        return du, list(sums)

    def _norm(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        assert self.mean is not None
        assert self.var is not None
        return self.mean, self.var, self.weight, self.bias, self.residual
