"""An input that is z of the unit before: y = act(norm(z) + residual), formed as it is read or in a pass of its own.

A pass of its own reads z (and the residual) and writes y, 2K values a pixel that a kernel which forms y on load does
not move, and in the backward the gradient of y takes 3K more. So y is formed on load wherever a kernel of a 1 x 1 node
multiplies and does not spill with it; the library takes no such inputs. :meth:`Prologue.on_load` is where that is
chosen, and of the backward config's ``forms_in_backward`` and ``passes_back``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor

from dla_fast.kernels import config, host, launch
from dla_fast.kernels.prologue_kernels import coefficients_kernel
from dla_fast.kernels.tail import add_up, reduced, tail
from dla_fast.ops.layout import is_channels_last


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

    @property
    def norm(self) -> host.Norm:
        """Its vectors as the kernels read them."""
        assert self.mean is not None
        assert self.var is not None
        return host.Norm.of(self.mean, self.var, self.weight, self.bias)

    def on_load(
        self,
        xs: Sequence[Tensor],
        weight: Tensor,
        factors: Sequence[int],
        stride: int,
        residual_input: int,
        library: bool = False,
    ) -> bool:
        """Whether a kernel forms y as it loads z, and no pass before it: the one place where that is chosen.

        Args:
            xs: the node's inputs.
            weight: the node's.
            factors: per input, 1 where it is taken as it is.
            stride: of the convolution.
            residual_input: the input that is added before the node's activation, or -1: the tail reads it too.
            library: whether the library multiplies.
        """
        flat = weight.shape[2] == stride == 1
        own = self.input >= 0 and factors[self.input] == 1 and xs[self.input].shape[1] > 0
        ours = flat and not library and config.forms_on_load(config.arch_of(weight.device))
        return ours and own and self.input != residual_input

    def coefficients(self) -> Tensor:
        """Mean, scale, shift and 1 / sigma of every channel, (4, C) in the accumulation dtype: one launch."""
        norm = self.norm
        channels = norm.mean.shape[0]
        made = norm.mean.new_empty(4, channels)
        cfg = config.TileConfig(config.power_of_two(channels, 16, 128), 1, 0, 1, 1)
        constexprs: dict[str, Any] = {"B": cfg.block_m, "EPS": self.eps, "ACC": host.accumulator(made.dtype)}
        grid = (triton.cdiv(channels, cfg.block_m),)
        launch.launch(coefficients_kernel, grid, (*norm, made, channels), constexprs, cfg)
        return made

    def formed(self, xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The inputs, y in the place of z."""
        if self.input < 0:
            return xs
        y = tail(xs[self.input], *self.norm, self.residual, self.eps, self.act, self.slope)
        return [y if i == self.input else x for i, x in enumerate(xs)]

    def through(self, dy: Tensor, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From the gradient of y: dy', that of what is activated, and its sums, alone and times x_hat."""
        du = host.like(z, is_channels_last(z))
        return du, list(reduced(dy, z, self.norm, self.residual, (self.eps, self.act, self.slope), du))


class Before(NamedTuple):
    """Of an input that is z of the unit before, what the kernels of a 1 x 1 node do to it.

    Attributes:
        pre: how y is formed of it; nothing, where it is formed already or there is none.
        sums: of the gradient of what is activated, alone and times x_hat, which the kernels write; None where the
            gradient is to be y's.
        norm: the coefficients of its norm, or None.
    """

    pre: Prologue
    sums: tuple[Tensor, Tensor] | None
    norm: Tensor | None

    @staticmethod
    def of(pre: Prologue, through: bool, channels_last: bool) -> Before:
        """Of a prologue, its residual brought into the node's layout; ``through``: with sums."""
        if pre.input < 0:
            return Before(pre, None, None)
        pre, norm = pre._replace(residual=host.optional(pre.residual, channels_last)), pre.coefficients()
        return Before(pre, host.vectors(norm, norm.shape[1]) if through else None, norm)

    def arguments(
        self, order: Sequence[int], z: Tensor | None, partial: Tensor | None
    ) -> tuple[tuple[Tensor | None, ...] | None, dict[str, Any]]:
        """What kernels take of it, and their constexpr.

        Args:
            order: numbers of the inputs as the kernel takes them.
            z: itself, of ``dx_kernel``.
            partial: where its sums go.
        """
        if self.pre.input < 0:
            return None, {"PRE": None}
        of_it = (list(order).index(self.pre.input), self.pre.act, self.pre.slope)
        return (z, self.pre.residual, self.norm, partial), {"PRE": of_it}

    def fitted(self, kernel: str, cfg: config.TileConfig, arch: int) -> config.TileConfig:
        """The configuration of a kernel of the backward, see :func:`config.with_prologue`."""
        if self.pre.input < 0 or (kernel == "dx" and self.sums is None):
            return cfg
        return config.with_prologue(kernel, cfg, arch, self.pre.residual is not None)

    def partial(self, groups: int) -> Tensor | None:
        """A place for the sums of so many groups of pixels."""
        return None if self.sums is None else self.sums[0].new_empty(2, self.sums[0].shape[0], groups)

    def add_up(self, partial: Tensor | None) -> None:
        """The sums from those of the groups, in order."""
        if partial is not None and self.sums is not None:
            add_up(partial, self.sums)
