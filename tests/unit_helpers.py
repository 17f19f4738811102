"""A frozen unit beside what it stands for, for the tests of products that are finished in registers."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dla_fast.ops import packed
from dla_fast.ops.layout import accumulation_dtype

ACTIVATIONS = {"relu": torch.relu, "identity": lambda y: y, "silu": F.silu}


def unit(geometry, size, dtype, act="relu", spoilt=None, residual=True):
    """What a frozen unit gives, PyTorch op by op, and that in float64.

    Args:
        geometry: inputs' channels, output channels, kernel, stride, dilation.
        size: images, height, width.
        dtype: of the maps and the weight.
        act: of :data:`ACTIVATIONS`.
        spoilt: a value that one of the first input takes.
        residual: whether something is added.
    """
    channels, out, kernel, stride, dilation = geometry
    n, h, w = size

    def channels_last(*size):
        return torch.randn(size, dtype=dtype).contiguous(memory_format=torch.channels_last)

    xs = [channels_last(n, c, h, w) for c in channels]
    if spoilt is not None:
        xs[0][-1, -1, h // 2, w // 2] = spoilt
    weight = channels_last(out, sum(channels), kernel, kernel) * (sum(channels) * kernel**2) ** -0.5
    sums = accumulation_dtype(dtype)
    scale, shift = torch.rand(out, dtype=sums) + 0.5, torch.randn(out, dtype=sums)

    def z(dtype):
        return F.conv2d(torch.cat(xs, 1).to(dtype), weight.to(dtype), None, stride, dilation * (kernel // 2), dilation)

    added = channels_last(*z(dtype).shape) if residual else None
    way = packed.way_of(xs, [], weight, [1] * len(xs), stride, dilation, 1, False)
    kept = packed.pack(weight, list(channels), way)
    call = packed.Call(weight, kept, way, scale, shift, [1] * len(xs), stride, dilation, 1, -1, -1, act, 0.0)

    def eager(dtype):
        y = z(dtype) * scale.view(-1, 1, 1).to(dtype) + shift.view(-1, 1, 1).to(dtype)
        return ACTIVATIONS[act](y if added is None else y + added.to(dtype))

    return packed.run(call, xs, [], added), eager(dtype), eager(torch.float64)
