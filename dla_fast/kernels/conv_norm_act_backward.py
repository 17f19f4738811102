"""The node's backward on the host: which kernels serve it, and in which order the inputs are given to them.

A 1 x 1, stride 1 node is bound by memory and goes through :mod:`dla_fast.kernels.product_backward`, which forms dz on
the way, where :mod:`dla_fast.kernels.library` does not serve it. Any other forms dz once (2N or 3N values read, N
written a pixel), and the library's products follow; so does a node whose residual is no input and needs its gradient,
since that is a by-product of dz. An upsampled input is upsampled again rather than kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dla_fast.kernels import config, examples, host, launch, library
from dla_fast.kernels.product_backward import dx_kernel, fused_kernel, weight_kernel, weight_sum_kernel
from dla_fast.kernels.prologue import Before, Prologue
from dla_fast.kernels.tail import tail_backward_apply
from dla_fast.kernels.upsample import upsample_backward
from dla_fast.ops.layout import accumulation_dtype, empty_like_layout


def _blocks(channels: Sequence[int], size: int) -> tuple[int, ...]:
    """Number of the first block of every input, and how many there are."""
    out = [0]
    for c in channels:
        out.append(out[-1] + triton.cdiv(c, size))
    return tuple(out)


def _choose(kernel: str, node: host.Node) -> config.TileConfig:
    sizes = (node.total, node.depth, node.out_channels)
    # Where a block of channels is a program's, one that is not full costs less than many small ones.
    step = node.step if kernel == "dx" else node.widest
    return config.choose(kernel, *sizes, node.dtype, node.arch, step, node.channels_last, node.exact)


class _Operands(NamedTuple):
    """What the kernels of a 1 x 1 node share.

    Attributes:
        node: sizes and layout.
        order: numbers of the inputs, the residual first.
        maps: dy, z, the residual's values or None, the weight.
        norm: the norm's vectors.
        sums: what the tail's reduction gave, and 1 / count.
        constexprs: those of the norm and the activation.
        before: of the input that is z of the unit before.
    """

    node: host.Node
    order: list[int]
    maps: tuple[Tensor | None, ...]
    norm: host.Norm
    sums: tuple[Any, ...]
    constexprs: dict[str, Any]
    before: Before

    def of_inputs(self, values: Sequence[Any], order: Sequence[int] | None = None) -> tuple[Any, ...]:
        """What belongs to the inputs, in their order or another."""
        return tuple([values[i] for i in (self.order if order is None else order)])


def _dx(
    operands: _Operands, xs: Sequence[Tensor], dxs: list[Tensor], need_dx: Sequence[bool], dz: Tensor | None
) -> None:
    """The inputs' gradients, and dz where it is given."""
    node = operands.node
    cfg = operands.before.fitted("dx", _choose("dx", node), node.arch)
    tiles = triton.cdiv(node.total, cfg.block_m)
    partial, last = operands.before.partial(tiles), operands.before.pre.input
    # The one whose gradient goes on through its norm's activation comes last.
    order = sorted((i for i in operands.order if need_dx[i]), key=lambda i: partial is not None and i == last)
    given, channels, starts = (operands.of_inputs(v, order) for v in (dxs, node.channels, node.starts))
    blocks = _blocks(channels, cfg.block_k)
    dy, z, residual, weight = operands.maps
    before, pre = (None, {"PRE": None})
    if partial is not None:
        before, pre = operands.before.arguments(order, xs[last], partial)
    sums, inverse_count = operands.sums[:2], operands.sums[2]
    args = (given, channels, starts, blocks, dy, z, dz, residual, weight, *operands.norm, *sums, before, inverse_count)
    sizes = (node.total, node.pixels, node.out_channels, node.depth, blocks[-1])
    constexprs = node.tile(cfg) | {"CHUNKS": triton.cdiv(node.out_channels, cfg.block_n)} | operands.constexprs | pre
    launch.launch(dx_kernel, (tiles,), (*args, *sizes), constexprs, cfg)
    operands.before.add_up(partial)


class _Ranges(NamedTuple):
    """How pixels are shared among the programs that add up dW, and where their parts go.

    Attributes:
        number: of ranges.
        tiles: of a range.
        out: (N, K) of the only range, or (ranges, N * K).
    """

    number: int
    tiles: int
    out: Tensor

    @staticmethod
    def of(node: host.Node, cfg: config.TileConfig, programs: int, dw: Tensor) -> _Ranges:
        """Ranges of ``programs`` programs each, so that all are resident at a time."""
        tiles = triton.cdiv(node.total, cfg.block_m)
        resident = config.processors_of(node.device) * cfg.resident
        each = triton.cdiv(tiles, max(1, min(tiles, resident // programs)))
        count = triton.cdiv(tiles, each)
        direct = count == 1 and dw.is_contiguous()
        return _Ranges(
            count, each, dw if direct else dw.new_empty(count, dw.numel(), dtype=accumulation_dtype(dw.dtype))
        )

    def add_up(self, dw: Tensor, acc: Any) -> None:
        """dW from its parts, in order."""
        if self.out is dw:
            return
        size = dw.numel()
        rows = dw if dw.is_contiguous() else dw.new_empty(dw.shape)
        cfg = config.weight_sum(size, self.number)
        constexprs = {"B": cfg.block_m, "R": cfg.block_n, "ACC": acc}
        args = (self.out, rows, size, self.number)
        launch.launch(weight_sum_kernel, (triton.cdiv(size, cfg.block_m),), args, constexprs, cfg)
        if rows is not dw:
            dw.copy_(rows)


def _weight(node: host.Node, xs: Sequence[Tensor], dz: Tensor, weight: Tensor, of_input: Before) -> Tensor:
    """dW, a product of dz and the inputs."""
    dw = torch.empty_like(weight)
    if node.total == 0:
        return dw.zero_()
    cfg = of_input.fitted("dw", _choose("dw", node), node.arch)
    blocks = _blocks(node.channels, cfg.block_k)
    programs = blocks[-1] * triton.cdiv(node.out_channels, cfg.block_n)
    ranges = _Ranges.of(node, cfg, programs, dw)
    sizes = (node.total, node.pixels, node.out_channels, node.depth, ranges.tiles)
    before, pre = of_input.arguments(range(len(xs)), None, None)
    args = (tuple(xs), node.channels, node.starts, blocks, dz, ranges.out, before, *sizes)
    launch.launch(weight_kernel, (programs, ranges.number), args, node.tile(cfg) | pre, cfg)
    ranges.add_up(dw, node.acc)
    return dw


def _fused(operands: _Operands, xs: Sequence[Tensor], dxs: list[Tensor], need_dx: Sequence[bool], dw: Tensor) -> None:
    """dW and the inputs' gradients in one launch."""
    node = operands.node
    through = operands.before.sums is not None
    cfg = operands.before.fitted("fused", _choose("fused", node), node.arch)
    channels, starts, needed = (operands.of_inputs(v) for v in (node.channels, node.starts, need_dx))
    blocks = _blocks(channels, cfg.block_k)
    # All blocks in one program, which then forms dz once, where its registers hold all of dW and no sums beside it.
    together = blocks[-1] * cfg.block_k * cfg.block_n <= config.fused_values(node.arch) and not through
    each = blocks[-1] if together else 1
    programs = blocks[-1] // each
    ranges = _Ranges.of(node, cfg, programs, dw)
    # Something must stand where no gradient is written.
    targets = [dx if wanted else x for x, dx, wanted in zip(xs, dxs, need_dx, strict=True)]
    of_inputs = (operands.of_inputs(xs), operands.of_inputs(targets), channels, starts, blocks)
    integers = (node.total, node.pixels, node.out_channels, node.depth, ranges.tiles)
    partial = operands.before.partial(ranges.number)
    before, pre = operands.before.arguments(operands.order, None, partial)
    sums, inverse_count = operands.sums[:2], operands.sums[2]
    args = (*of_inputs, *operands.maps, ranges.out, *operands.norm, *sums, before, inverse_count, *integers)
    mask = sum(1 << i for i, wanted in enumerate(needed) if wanted)
    constexprs = node.tile(cfg) | {"EACH": each, "DX": mask} | operands.constexprs | pre
    launch.launch(fused_kernel, (programs, ranges.number), args, constexprs, cfg)
    operands.before.add_up(partial)
    ranges.add_up(dw, node.acc)


def _products(
    operands: _Operands, xs: Sequence[Tensor], weight: Tensor, need_dx: Sequence[bool], need_dw: bool, fused: bool
) -> tuple[list[Tensor], Tensor]:
    """Gradients of a 1 x 1 node's inputs and weight: one launch for dx alone, two of a small node, three of another."""
    node = operands.node
    dxs = [
        empty_like_layout(x, x.shape, node.channels_last) if needed else x.new_empty(0)
        for x, needed in zip(xs, need_dx, strict=True)
    ]
    if fused:
        dw = torch.empty_like(weight)
        if node.total == 0:
            operands.before.add_up(operands.before.partial(0))
            return dxs, dw.zero_()
        _fused(operands, xs, dxs, need_dx, dw)
        return dxs, dw
    dz = empty_like_layout(weight, node.output_sizes, node.channels_last) if need_dw else None
    _dx(operands, xs, dxs, need_dx, dz)
    return dxs, weight.new_empty(0) if dz is None else _weight(node, xs, dz, weight, operands.before)


def conv_norm_act_backward(
    dy: Tensor,
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    residual: Tensor | None,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    factors: Sequence[int],
    stride: int,
    dilation: int,
    groups: int,
    residual_input: int,
    count: int,
    eps: float,
    act: str,
    slope: float,
    need_dx: Sequence[bool],
    need_dup: Sequence[bool],
    need_dw: bool,
    need_dresidual: bool,
    *prologue: Any,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, list[Tensor]]:
    """Gradients of the inputs, the up-weights, the weight and the residual.

    Args:
        dy: gradient of y, (N, C_out, H', W').
        xs: (N, C_i, H_i, W_i) each, one floating dtype.
        up_weights: (C_i, 1, 2f, 2f) of those inputs whose factor is not 1, in order.
        weight: (C_out, sum of C_i / groups, k, k).
        residual: shape of ``dy``, or None.
        z: what the stage gave, shape of ``dy``.
        mean: (C_out,), of z, accumulation dtype.
        var: (C_out,), biased.
        bn_weight: (C_out,) or None.
        bn_bias: (C_out,) or None.
        sum_dy: what the tail's reduction gave, (C_out,); None with ``sum_dy_xhat`` for frozen statistics.
        sum_dy_xhat: see ``sum_dy``.
        factors: per input, 1 where it is taken as it is.
        stride: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.
        residual_input: the input that was added before the activation, or -1.
        count: values per channel that the sums stand for.
        eps: added to the variance.
        act: name of the activation.
        slope: of leaky_relu.
        need_dx: per input whether its gradient is wanted.
        need_dup: per up-weight whether its gradient is.
        need_dw: whether the weight's is.
        need_dresidual: whether the residual's is.
        prologue: of one of the inputs, see :class:`dla_fast.kernels.prologue.Prologue`, and behind it whether that
            input's gradient is dy' of the prologue, and not that of y; none where nothing is given. Last what is added
            to the gradient of the first input, or None.

    Returns:
        The inputs' gradients in the node's layout, the up-weights', the weight's and the residual's; an empty tensor
        for each that is not wanted; and, where the prologue's dy' is, its sums alone and times x_hat.

    Raises:
        ValueError: channels that do not fit the weight.
    """
    geometry = library.Geometry(stride, dilation, groups)
    pre, through = Prologue(*prologue[:9]), bool(prologue[9:]) and prologue[9]
    carried = prologue[10] if prologue[10:] else None
    before_norm = xs
    flat = pre.on_load(xs, weight, factors, stride, residual_input)
    if not flat:
        xs = pre.formed(xs)
    cl = host.Node.of(xs, weight, factors, *geometry).channels_last
    xs, dy, z = [host.arranged(x, cl) for x in xs], host.arranged(dy, cl), host.arranged(z, cl)
    # Of an input that is upsampled, the gradient at full resolution serves two.
    remaining, wanted = iter(up_weights), iter(need_dup)
    ups = [(next(remaining), next(wanted)) if f > 1 else None for f in factors]
    need = [a or (up is not None and up[1]) for a, up in zip(need_dx, ups, strict=True)]
    full = library.upsampled(xs, up_weights, factors, cl)
    added = host.optional(residual if residual_input < 0 else xs[residual_input], cl)
    adds = residual_input >= 0 and need_dx[residual_input]
    norm = host.Norm.of(mean, var, bn_weight, bn_bias)
    dresidual = z.new_empty(0)
    node = host.Node.of(full, weight, None, *geometry)
    fused = need_dw and any(need) and config.fits_fused(node.depth, node.out_channels, node.dtype, node.exact)
    served = need_dresidual or library.serves_backward(node, weight, geometry, fused)
    on_load = flat and not served and config.forms_in_backward(len(xs), fused)
    back = through and flat and not served and config.passes_back(len(xs), fused)
    if flat and not on_load and need_dw:
        full = list(pre.formed(full))
    # What is asked of y alone is dW, and the way back through the norm.
    given = pre if back or (on_load and need_dw) else Prologue()
    before = Before.of(given, back, cl)
    if any(need) and not served:
        first = max(residual_input, 0)
        operands = _Operands(
            node=node,
            order=[first, *(i for i in range(len(xs)) if i != first)],
            # Without a kink or curve in the activation the gradient does not depend on the residual.
            maps=(dy, z, None if act == "identity" else added, weight.contiguous()),
            norm=norm,
            sums=(*host.dense(sum_dy, sum_dy_xhat), host.inverse(count)),
            constexprs={"ADD": adds} | host.epilogue(eps, act, slope),
            before=before,
        )
        dxs, dw = _products(operands, full, weight, need, need_dw, fused)
    else:
        dz, grad = tail_backward_apply(
            dy, z, *norm, added, sum_dy, sum_dy_xhat, count, eps, act, slope, adds or need_dresidual
        )
        if served:
            dxs, dw = library.gradients(dz, full, weight, geometry, need, need_dw, cl)
        else:
            dxs = [x.new_empty(0) for x in xs]
            dw = _weight(node, full, dz, weight, before) if need_dw else weight.new_empty(0)
        if adds:
            dxs[residual_input] += grad
        if need_dresidual:
            dresidual = host.in_layout(grad, cl)
    dups = []
    for i, (up, f) in enumerate(zip(ups, factors, strict=True)):
        if up is not None:
            dx, dup = xs[i].new_empty(0), up[0].new_empty(0)
            if need[i]:
                dx, dup = upsample_backward(dxs[i], xs[i], up[0], f, need_dx[i], up[1])
            dxs[i] = host.in_layout(dx, cl) if need_dx[i] else dx
            dups.append(dup)
    sums = [] if before.sums is None else list(before.sums)
    if through and not back:
        du, sums = pre.through(dxs[pre.input], before_norm[pre.input])
        dxs[pre.input] = host.in_layout(du, cl)
    if carried is not None:
        dxs[0] += carried
    return dxs, dups, dw, dresidual, sums


def specialisations() -> Iterable[launch.Specialisation]:
    """What ships of the backward: every gradient wanted, batch statistics and, for one node, frozen ones."""
    found = []
    for example in examples.roots():
        xs, _, weight, z = examples.tensors(example)
        v = host.vectors(z, example.out_channels)[0]
        every = [True] * len(xs)
        with examples.recording(example) as launches:
            for act, residual in itertools.product(example.acts, example.residuals):
                for total in (v, None) if example.frozen else (v,):
                    options = (example.factors, 1, 1, 1, 0 if residual else -1, 4, 1e-5, act, 0.0)
                    conv_norm_act_backward(
                        z, xs, [], weight, None, z, v, v, v, v, total, total, *options, every, [], True, False
                    )  # fmt: skip
            # Of the weight alone, whose gradient is a product of dz.
            needed, options = [False] * len(xs), (example.factors, 1, 1, 1, -1, 4, 1e-5, "relu", 0.0)
            conv_norm_act_backward(z, xs, [], weight, None, z, v, v, v, v, v, v, *options, needed, [], True, False)
        found += [launch.specialisation("conv_norm_act_backward", example.dtype, o, example.label) for o in launches]
    for example in examples.chains():
        xs, _, weight, z = examples.tensors(example)
        v = host.vectors(z, example.out_channels)[0]
        geometry, every = (example.factors, 1, 1, 1, -1), [True] * len(xs)
        with examples.recording(example) as launches:
            # Its norm's backward left to the unit before, or a map that is formed again for dW alone.
            for act, residual, through in itertools.product(example.acts, example.residuals, (True, False)):
                conv_norm_act_backward(
                    z, xs, [], weight, None, z, v, v, v, v, v, v, *geometry, 4, 1e-5, "relu", 0.0, every, [], True,
                    False, *examples.prologue(example, act, residual), through,
                )  # fmt: skip
        kernels = (dx_kernel, fused_kernel, weight_kernel)
        ours = [o for o in launches if o.kernel in kernels]
        found += [launch.specialisation("conv_norm_act_backward", example.dtype, o, example.label) for o in ours]
    return launch.distinct(found)
