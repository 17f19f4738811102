"""The node's forward on the host: which kernel serves it, with which tiles, and the plan that is kept of that.

The kernels are those of :mod:`dla_fast.kernels.product`; what none of them takes is the library's (``library.py``).

Where an input is upsampled on the way, each of its values costs four loads of x and four of the kernel. A 1 x 1 node
reads every value once for a tile of outputs and is bound by memory, so that pays. A 3 x 3 node reads it nine times and
does 18KN flops, 384 a byte at K = 2N = 128 in half precision, far over what memory bounds: there the map is upsampled
first, except in small maps, which wait for launches (:data:`ON_LOAD_PIXELS`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from dla_fast.kernels import config, examples, host, launch, library, moments
from dla_fast.kernels.library import Geometry
from dla_fast.kernels.product import inference_kernel, stage_kernel
from dla_fast.kernels.prologue import Prologue
from dla_fast.kernels.prologue_kernels import coefficients_kernel
from dla_fast.kernels.tail import tail
from dla_fast.ops.autograd import frozen_statistics

# Up to so many output pixels a 3 x 3 node upsamples on the way, in one launch. By reasoning, until a GPU is measured.
ON_LOAD_PIXELS = 2**14
_LARGE = 2**31


@dataclass(frozen=True)
class _Plan:
    """How a node's kernel is launched.

    Attributes:
        node: sizes and layout.
        before: of each input, the factor by which it is upsampled in a pass of its own, else 1.
        on_load: the same of the kernel's own upsampling; None where it does none.
        ready: whether every tensor already lies as the kernel takes it.
        cfg: tiles.
        grid: programs.
        order: numbers of the inputs as the kernel takes them: those that it upsamples come last.
        reordered: whether that is another order than theirs.
        shapes: of the inputs, in that order: heights, widths, channels, starts.
        sizes: the kernel's integers.
        groups: of pixels, each of which leaves moments behind.
        group_size: pixels of a group, the last of which has fewer.
        constexprs: by name.
        memo: what :func:`launch.launch` keeps.
    """

    node: host.Node
    before: tuple[int, ...]
    on_load: tuple[int, ...] | None
    ready: bool
    cfg: config.TileConfig
    grid: tuple[int]
    order: tuple[int, ...]
    reordered: bool
    shapes: tuple[Any, Any, tuple[int, ...], tuple[int, ...]]
    sizes: tuple[int, ...]
    groups: int
    group_size: int
    constexprs: dict[str, Any]
    memo: launch.Memo = field(default_factory=launch.Memo)

    @staticmethod
    def of(
        xs: Sequence[Tensor],
        up_weights: Sequence[Tensor],
        weight: Tensor,
        factors: tuple[int, ...],
        geometry: Geometry,
        epilogue: dict[str, Any],
        moments: bool | None,
        added: bool,
        pre: tuple[int, bool, str, float] | None,
    ) -> _Plan:
        """Plan a node: its stage, with moments or without, or with None for them its inference.

        Args:
            xs: the inputs.
            up_weights: see :func:`conv_norm_act_inference`.
            weight: likewise.
            factors: likewise.
            geometry: of the convolution.
            epilogue: constexprs of the inference.
            moments: whether moments are computed; None for inference.
            added: whether a residual is.
            pre: of the input that is z of the unit before its number, whether it has a residual, and the name and
                slope of its activation; or None.

        Raises:
            ValueError: no inputs, or channels that do not add up to the weight's.
        """
        node = host.Node.of(xs, weight, factors, *geometry)
        kernel, stride, plain = node.kernel, geometry.stride, (1,) * len(xs)
        first = kernel > 1 and node.total > ON_LOAD_PIXELS
        before, on_load = (factors, plain) if first else (plain, factors)
        upsamples, (height, width) = max(on_load) > 1, node.sides
        flat = kernel == 1 and stride == 1 and not upsamples
        if flat:
            height, width = height * width, 1
        depth = node.depth * kernel**2
        kind = "stage" if moments is not None else "added" if added else "forward"
        if flat and not node.channels_last and node.alignment * node.dtype.itemsize < 8:
            kind = "torn"
        elif not flat:
            kind = "merge" if upsamples else f"conv_{kind}".removesuffix("_forward")
        sizes = (node.total, depth, node.out_channels)
        cfg = config.choose(kind, *sizes, node.dtype, node.arch, node.step, node.channels_last)
        if pre is not None:
            cfg = config.with_prologue("stage", cfg, node.arch, pre[1])
        arranged = _even_taps(weight)
        # An input without channels is none.
        there = [i for i in range(len(xs)) if node.channels[i] > 0]
        order = tuple(sorted(there, key=lambda i: on_load[i] > 1))
        taken = [i for i in order if on_load[i] == 1]
        steps = max(1, sum(triton.cdiv(node.channels[i], cfg.block_k) for i in taken)) * kernel**2
        tiles, blocks = triton.cdiv(node.total, cfg.block_m), triton.cdiv(node.out_channels, cfg.block_n)
        per_program = config.tiles_per_program(tiles, blocks, cfg, node.device)
        programs = triton.cdiv(tiles, per_program)
        carried = bool(moments) and cfg.carries_moments and not upsamples and node.dtype != torch.float64
        return _Plan(
            node=node,
            before=before,
            on_load=on_load if upsamples else None,
            ready=arranged is weight
            and max(before) == 1
            and all(host.arranged(x, node.channels_last) is x for x in xs)
            and all(up.is_contiguous() for up in up_weights),
            cfg=cfg,
            grid=(programs * blocks,),
            order=order,
            reordered=order != tuple(range(len(xs))),
            shapes=(
                tuple(int(xs[i].shape[2]) for i in order) if upsamples else None,
                tuple(int(xs[i].shape[3]) for i in order) if upsamples else None,
                tuple(node.channels[i] for i in order),
                tuple(node.starts[i] for i in order),
            ),
            sizes=(
                *(node.total, height, width, node.out_channels),
                *(arranged.stride(0), arranged.stride(1), arranged.stride(3) if kernel > 1 else 1),
                *(steps, per_program),
            ),
            groups=programs if carried else tiles,
            group_size=cfg.block_m * (per_program if carried else 1),
            constexprs=node.tile(cfg)
            | {"FACTORS": tuple(on_load[i] for i in order), "PLAIN": len(taken), "KERNEL": kernel, "STRIDE": stride}
            | {"DILATION": geometry.dilation if kernel > 1 else 1}
            | (epilogue or {"WARPS": min(cfg.num_warps, max(1, cfg.block_m // 16)) if carried else 0})
            | ({} if epilogue else {"PRE": pre and (order.index(pre[0]), *pre[2:])}),
        )

    def launch(
        self,
        kernel: Any,
        xs: Sequence[Tensor],
        up_weights: Sequence[Tensor],
        weight: Tensor,
        operands: tuple[Tensor | None, ...],
    ) -> None:
        """Launch ``kernel`` on these inputs; ``operands`` are its other tensors, the output first."""
        maps, ups = tuple(xs), None
        if not self.ready:
            maps = tuple(library.upsampled(xs, up_weights, self.before, self.node.channels_last))
            up_weights, weight = [up.contiguous() for up in up_weights], _even_taps(weight)
        if self.reordered:
            maps = tuple([maps[i] for i in self.order])
        tensors = (*maps, weight, *operands)
        if self.on_load is not None:
            kernels = iter(up_weights)
            given = [next(kernels) if factor > 1 else None for factor in self.on_load]
            ups = tuple([given[i] for i in self.order])
            tensors += ups
        args = (maps, ups, *self.shapes, weight, *operands, *self.sizes)
        launch.launch(kernel, self.grid, args, self.constexprs, self.cfg, self.memo, tensors)


def _even_taps(weight: Tensor) -> Tensor:
    """The weight with its taps evenly spaced, as every usual memory format has them, and offsets of 32 bits."""
    even = weight.shape[2] == 1 or weight.stride(2) == weight.stride(3) * weight.shape[3]
    near = sum(stride * (size - 1) for stride, size in zip(weight.stride(), weight.shape, strict=True)) < _LARGE
    return weight if even and near else weight.contiguous()


# A call's plan by what it depends on, so that the next such call only fills in its tensors; None: it is the library's.
_plans: dict[Any, _Plan | None] = {}
_MOST_PLANS = 4096


def _plan(
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    factors: Sequence[int],
    geometry: tuple[int, int, int],
    operands: Any,
    epilogue: tuple[Any, ...],
    pre: tuple[int, bool, str, float] | None = None,
) -> _Plan | None:
    """The plan of a call; ``operands`` says of what kinds the kernel's other tensors are, ``pre`` as for a plan."""
    dtype = weight.dtype
    key = (
        tuple([(x.shape, x.stride()) for x in xs]),
        tuple([(up.shape, up.stride()) for up in up_weights]) if up_weights else None,
        weight.shape,
        weight.stride(),
        dtype,
        weight.device,
        host.precision(dtype),
        config.generation,
        tuple(factors),
        geometry,
        operands,
        epilogue,
        pre,
    )
    try:
        return _plans[key]
    except KeyError:
        pass
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    steps, options = Geometry(*geometry), host.epilogue(*epilogue) if epilogue else {}
    served = not library.serves(weight, steps, bool(epilogue))
    plan = None
    if served:
        wanted, added = (None, operands[0] is not None) if epilogue else (operands, False)
        plan = _Plan.of(xs, up_weights, weight, tuple(factors), steps, options, wanted, added, pre)
    _plans[key] = plan
    return plan


def _convolved(
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    factors: Sequence[int],
    geometry: tuple[int, int, int],
) -> Tensor:
    """z by the library."""
    steps = Geometry(*geometry)
    cl = host.Node.of(xs, weight, factors, *steps).channels_last
    return library.convolve(library.upsampled(xs, up_weights, factors, cl), weight, steps, cl)


def conv_norm_act_inference(
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    factors: Sequence[int],
    stride: int,
    dilation: int,
    groups: int,
    residual_input: int,
    eps: float,
    act: str,
    slope: float,
) -> Tensor:
    """y of a node with folded batch norm: one launch, and one before it per input that is upsampled first.

    Args:
        xs: (N, C_i, H_i, W_i) each, one floating dtype.
        up_weights: (C_i, 1, 2f, 2f) of those inputs whose factor is not 1, in order.
        weight: (C_out, sum of C_i / groups, k, k).
        conv_bias: (C_out,) or None, like the norm's vectors.
        residual: shape of the output, or None.
        bn_weight: see ``conv_bias``.
        bn_bias: see ``conv_bias``.
        running_mean: (C_out,).
        running_var: (C_out,).
        factors: per input, 1 where it is taken as it is.
        stride: of the convolution.
        dilation: of the convolution.
        groups: of the convolution.
        residual_input: the input that is added before the activation, or -1.
        eps: added to the variance.
        act: name of the activation.
        slope: of leaky_relu.

    Returns:
        (N, C_out, H', W'), channels_last if every input or the weight is.

    Raises:
        ValueError: channels that do not fit the weight.
    """
    geometry = (stride, dilation, groups)
    added = residual if residual_input < 0 else xs[residual_input]
    norm = host.dense(running_mean, running_var, bn_weight, bn_bias, conv_bias)
    kinds = tuple([None if t is None else t.dtype for t in (added, *norm)])
    plan = _plan(xs, up_weights, weight, factors, geometry, kinds, (eps, act, slope))
    if plan is None:
        z = _convolved(xs, up_weights, weight, factors, geometry)
        mean, var = running_mean, running_var
        if conv_bias is not None:
            mean, var = frozen_statistics(running_mean, running_var, conv_bias, z)
        return tail(z, mean, var, bn_weight, bn_bias, added, eps, act, slope)
    if added is not None and not (plan.ready and residual is None):
        added = host.arranged(added, plan.node.channels_last)
    y = plan.node.output(weight)
    plan.launch(inference_kernel, xs, up_weights, weight, (y, added, *norm))
    return y


def conv_norm_act_stage(
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    factors: Sequence[int],
    stride: int,
    dilation: int,
    groups: int,
    momentum: float,
    moments_wanted: bool,
    *prologue: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """z without the bias and the moments of its channels: two launches, and one before per input upsampled first.

    One more where an input is z of the unit before: of its coefficients, or else of the whole map.

    Args:
        xs: as in :func:`conv_norm_act_inference`, like what is not named here.
        up_weights: see ``xs``.
        weight: see ``xs``.
        conv_bias: (C_out,) or None; it moves the running mean alone.
        running_mean: (C_out,), updated in place, or None.
        running_var: see ``running_mean``.
        factors: see ``xs``.
        stride: see ``xs``.
        dilation: see ``xs``.
        groups: see ``xs``.
        momentum: weight of this batch in the running statistics.
        moments_wanted: whether moments are computed.
        prologue: of one of the inputs, see :class:`dla_fast.kernels.prologue.Prologue`; none where nothing is given.

    Returns:
        z (N, C_out, H', W'), mean and biased variance (C_out,) in the accumulation dtype, empty if not wanted.

    Raises:
        ValueError: channels that do not fit the weight.
    """
    geometry = (stride, dilation, groups)
    given, pre, norm, added = Prologue(*prologue), None, None, None
    if given.input >= 0:
        if given.on_load(xs, weight, factors, stride, -1, library.serves(weight, Geometry(*geometry), False)):
            pre = given.input, given.residual is not None, given.act, given.slope
        else:
            xs = given.formed(xs)
    running = host.Running(conv_bias, running_mean, running_var, momentum)
    plan = _plan(xs, up_weights, weight, factors, geometry, moments_wanted, (), pre)
    if plan is None:
        z = _convolved(xs, up_weights, weight, factors, geometry)
        return (z, *(moments.of(z, running) if moments_wanted else host.vectors(z, 0)))
    node = plan.node
    z = node.output(weight)
    mean, var = host.vectors(z, node.out_channels if moments_wanted else 0)
    partial = mean.new_empty(3, node.out_channels, plan.groups) if moments_wanted else None
    if pre is not None:
        norm, added = given.coefficients(), host.optional(given.residual, node.channels_last)
    plan.launch(stage_kernel, xs, up_weights, weight, (z, partial, norm, added))
    if partial is not None:
        moments.finalise(partial, node.total, plan.group_size, mean, var, running)
    return z, mean, var


def specialisations() -> Iterable[launch.Specialisation]:
    """What ships of the forward: the networks' roots, blocks and ladders, and the variants of the epilogue."""
    found = []
    for example in (*examples.roots(), *examples.blocks(), *examples.ladders(), *examples.chains()):
        xs, ups, weight, z = examples.tensors(example)
        v = torch.empty(example.out_channels, device="meta")
        geometry = (example.factors, example.stride, example.dilation, 1)
        with examples.recording(example) as launches:
            for act, residual in itertools.product(example.acts, example.residuals):
                if example.pre >= 0:
                    before = examples.prologue(example, act, residual)
                    conv_norm_act_stage(xs, ups, weight, None, v, v, *geometry, 0.1, True, *before)
                    continue
                added = z if residual and example.kernel > 1 else None
                index = 0 if residual and example.kernel == 1 else -1
                conv_norm_act_inference(xs, ups, weight, None, added, v, v, v, v, *geometry, index, 1e-5, act, 0.0)
            for wanted in (True, False) if example.frozen else (True,) if example.pre < 0 else ():
                conv_norm_act_stage(xs, ups, weight, None, v, v, *geometry, 0.1, wanted)
        for one in launches:
            if one.kernel in (inference_kernel, stage_kernel, coefficients_kernel):
                op = "conv_norm_act_inference" if one.kernel is inference_kernel else "conv_norm_act_stage"
                found.append(launch.specialisation(op, example.dtype, one, example.label))
    return launch.distinct(found)
