"""Convolutions that the library does: those that no kernel here takes, and the products of a k x k node's backward.

A grouped kernel, or one larger than 3 x 3, does few or many products a value that is moved; neither is what the kernels
of :mod:`dla_fast.kernels.product` are made for. An input that is to be upsampled is a map of its own then.

Per output pixel, with K input and N output channels and a 3 x 3 kernel, a backward moves 6N + 2K values and does 36KN
flops. At K = 2N = 128 in half precision that is 230 flops a byte, above the 180 or so at which an H200 is bound by
arithmetic, and twice that at N = 128. There the library's convolution stands at its best, so it serves each input on
its own; no gradient of a concatenation exists, except of a grouped one. By reasoning, until a GPU is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dla_fast.kernels import host
from dla_fast.kernels.upsample import upsample


class Geometry(NamedTuple):
    """How a convolution steps over its map; it is padded by ``dilation * (kernel // 2)``."""

    stride: int
    dilation: int
    groups: int


def serves(weight: Tensor, geometry: Geometry) -> bool:
    """Whether the library convolves, and not a kernel: the one place where that is chosen."""
    return geometry.groups > 1 or weight.shape[2] not in (1, 3)


def upsampled(
    xs: Sequence[Tensor], up_weights: Sequence[Tensor], factors: Sequence[int], channels_last: bool
) -> list[Tensor]:
    """The inputs in a layout, those with a factor at full resolution."""
    ups = iter(up_weights)
    maps = [host.arranged(x, channels_last) for x in xs]
    return [
        host.arranged(upsample(x, next(ups), f), channels_last) if f > 1 else x
        for x, f in zip(maps, factors, strict=True)
    ]


def _together(maps: Sequence[Tensor]) -> Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(list(maps), 1)


def _steps(weight: Tensor, geometry: Geometry) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    """Stride, padding, dilation and what follows them in the library's operators."""
    stride, dilation, groups = geometry
    return [stride] * 2, [dilation * (weight.shape[2] // 2)] * 2, [dilation] * 2, False, [0, 0], groups


def convolve(maps: Sequence[Tensor], weight: Tensor, geometry: Geometry, channels_last: bool) -> Tensor:
    """z of inputs at full resolution, in a layout."""
    z = torch.ops.aten.convolution(_together(maps), weight, None, *_steps(weight, geometry))
    return host.in_layout(z, channels_last)


def gradients(
    dz: Tensor,
    maps: Sequence[Tensor],
    weight: Tensor,
    geometry: Geometry,
    need_dx: Sequence[bool],
    need_dw: bool,
    channels_last: bool,
) -> tuple[list[Tensor], Tensor]:
    """dx of each input at full resolution in a layout, and dW; an empty tensor for what is not wanted."""
    dz = host.arranged(dz, channels_last)
    dw = torch.empty_like(weight) if need_dw else weight.new_empty(0)
    dxs = [x.new_empty(0) for x in maps]
    # The groups of a grouped kernel do not end where the inputs do.
    parts = [list(range(len(maps)))] if geometry.groups > 1 else [[i] for i in range(len(maps))]
    start = 0
    for part in parts:
        x = _together([maps[i] for i in part])
        depth = x.shape[1] // geometry.groups
        wanted = any(need_dx[i] for i in part)
        if wanted or need_dw:
            own = host.arranged(weight.narrow(1, start, depth), channels_last)
            steps = _steps(weight, geometry)
            dx, part_dw, _ = torch.ops.aten.convolution_backward(dz, x, own, None, *steps, [wanted, need_dw, False])
            if wanted:
                for i, one in zip(part, dx.split([maps[i].shape[1] for i in part], 1), strict=True):
                    dxs[i] = host.in_layout(one, channels_last) if need_dx[i] else dxs[i]
            if need_dw:
                dw.narrow(1, start, depth).copy_(part_dw)
        start += depth
    return dxs, dw
