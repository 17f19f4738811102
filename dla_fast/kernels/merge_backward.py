"""Backward of the IDA node: the norm's part in our kernels, the products of a 3 x 3 kernel in the library's.

Per output pixel, with K input and N output channels and a 3 x 3 kernel: 6N + 2K values moved and 36KN flops. At
K = 2N = 128 in half precision that is 230 flops a byte, above the 180 or so at which an H200 is bound by arithmetic,
and twice that at N = 128. There the library's convolution stands at its best, so it serves each input on its own; no
gradient of a concat exists. By reasoning, until a GPU is measured. A 1 x 1 node is bound by memory and goes through
the aggregation node's kernels, which form dz on the way. An upsampled input is upsampled again rather than kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dla_fast.kernels import host
from dla_fast.kernels.aggregate_backward import aggregate_backward
from dla_fast.kernels.tail import tail_backward_apply
from dla_fast.kernels.upsample import upsample, upsample_backward
from dla_fast.ops.layout import empty_like_layout, node_channels_last


def _in_layout(t: Tensor, channels_last: bool) -> Tensor:
    """A gradient with the strides that the operator promises, whatever the library chose."""
    out = empty_like_layout(t, t.shape, channels_last)
    return t if t.stride() == out.stride() else out.copy_(t)


def _products(
    dz: Tensor, full: Sequence[Tensor], weight: Tensor, need: Sequence[bool], need_dw: bool, channels_last: bool
) -> tuple[list[Tensor], Tensor]:
    """dx of each input at full resolution, and dW, by the library's convolution."""
    dxs, start = [], 0
    dw = torch.empty_like(weight) if need_dw else weight.new_empty(0)
    for x, needed in zip(full, need, strict=True):
        channels = x.shape[1]
        dx = x.new_empty(0)
        if needed or need_dw:
            part = host.arranged(weight.narrow(1, start, channels), channels_last)
            mask = [needed, need_dw, False]
            given, own, _ = torch.ops.aten.convolution_backward(
                dz, x, part, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
            )
            if needed:
                dx = _in_layout(given, channels_last)
            if need_dw:
                dw.narrow(1, start, channels).copy_(own)
        dxs.append(dx)
        start += channels
    return dxs, dw


def merge_backward(
    dy: Tensor,
    xs: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    weight: Tensor,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    factors: Sequence[int],
    count: float,
    eps: float,
    act: str,
    slope: float,
    need_dx: Sequence[bool],
    need_dup: Sequence[bool],
    need_dw: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of the inputs, the up-weights and the weight.

    Args:
        dy: gradient of y.
        xs: (N, C_i, H_i, W_i) each.
        up_weights: (C_i, 1, 2f, 2f) of those inputs whose factor is not 1, in order.
        weight: (C_out, sum of C_i, k, k), k = 1 or 3.
        z: (N, C_out, H, W) from the forward pass.
        mean: (C_out,), of z.
        var: (C_out,), biased.
        bn_weight: (C_out,) or None.
        bn_bias: (C_out,) or None.
        sum_dy: (C_out,), or None for frozen statistics, like ``sum_dy_xhat``.
        sum_dy_xhat: see ``sum_dy``.
        factors: per input, 1 where it is taken as it is.
        count: values per channel.
        eps: added to the variance.
        act: name of the activation.
        slope: of leaky_relu.
        need_dx: which inputs need their gradient.
        need_dup: which up-weights do.
        need_dw: whether the weight does.

    Returns:
        dx of each input, dW of each up-weight, dW; an empty tensor for what is not wanted.
    """
    cl = node_channels_last(xs, weight)
    remaining, wanted = iter(up_weights), iter(need_dup)
    xs = [host.arranged(x, cl) for x in xs]
    ups = [next(remaining) if f > 1 else None for f in factors]
    need_up = [next(wanted) if f > 1 else False for f in factors]
    need = [a or b for a, b in zip(need_dx, need_up, strict=True)]
    full = [x if up is None else _in_layout(upsample(x, up, f), cl) for x, up, f in zip(xs, ups, factors, strict=True)]
    norm = (mean, var, bn_weight, bn_bias)
    if weight.shape[2] == 1:
        dxs, dw = aggregate_backward(
            dy, full, weight, z, *norm, sum_dy, sum_dy_xhat, count, eps, False, act, slope, need, need_dw
        )
        dxs = list(dxs)
    else:
        dz, _ = tail_backward_apply(dy, z, *norm, None, sum_dy, sum_dy_xhat, count, eps, act, slope, False)
        dxs, dw = _products(host.arranged(dz, cl), full, weight, need, need_dw, cl)
    dups = []
    for i, (up, f) in enumerate(zip(ups, factors, strict=True)):
        if up is None:
            continue
        dx, dup = xs[i].new_empty(0), up.new_empty(0)
        if need[i]:
            dx, dup = upsample_backward(dxs[i], xs[i], up, f, need_dx[i], need_up[i])
        dxs[i] = _in_layout(dx, cl) if need_dx[i] else dx
        dups.append(dup)
    return dxs, dups, dw
