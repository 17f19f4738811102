"""What the library does where it does it better: convolutions that no kernel here takes, and products of whole maps.

A grouped kernel, or one larger than 3 x 3, does few or many products a value that is moved; neither is what the kernels
of :mod:`dla_fast.kernels.product` are made for. An input that is to be upsampled is a map of its own then.

On the architectures that were looked at (:data:`ARCHITECTURES`) the library also takes

- 3 x 3 convolutions, except in inference with as many output channels as :data:`CONVOLVED` says: on the nodes of an
  IDA ladder at 512 x 512 an H200 ran the kernels of that time at 0.09 to 0.21 of a bare convolution's speed
  (benchmarks/results/gpu-h200.json). The model of benchmarks.gates.predict puts today's at 0.6 to 0.9 of it, bound by
  the second-level cache, which reads the map once for each tap; concatenation and tail, which the library needs beside
  its convolution, cost as much but in the middle;
- the products of a 1 x 1 node's backward with more than :data:`WIDE` output channels, behind a dz that is formed once:
  there a tile of dz is short, the weight is read again for each, and by the same model the library is the faster.

Neither has been measured since: ``python -m benchmarks.gpu --blocks ways`` puts both ways beside each other.

Per output pixel, with K input and N output channels and L inputs, that backward reads dz 2L times and moves
(3 + 2L) N + 2K values. Each input has products of its own; no gradient of a concatenation exists, except of a grouped
one. The library's convolutions are asked for deterministic gradients, as all of the package's are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dla_fast.kernels import config, host
from dla_fast.kernels.upsample import upsample
from dla_fast.ops.layout import empty_like_layout

DEVICE = "cuda"
# Architectures on which the library stands beside the kernels.
ARCHITECTURES = (90,)
# Output channels of a 3 x 3 node whose inference is the kernels' there.
CONVOLVED = range(65, 129)
# Output channels up to which a 1 x 1 node's backward is the kernels' there.
WIDE = 128


class Geometry(NamedTuple):
    """How a convolution steps over its map; it is padded by ``dilation * (kernel // 2)``."""

    stride: int
    dilation: int
    groups: int


def _compared(weight: Tensor) -> bool:
    """Whether the two were compared there: not in float64, nor in float32 that is multiplied as such."""
    rounds = weight.dtype.itemsize == 2 or (weight.dtype == torch.float32 and host.precision(weight.dtype) == "tf32")
    return rounds and weight.device.type == DEVICE and config.arch_of(weight.device) in ARCHITECTURES


def serves(weight: Tensor, geometry: Geometry, inference: bool) -> bool:
    """Whether the library convolves in the forward, and not a kernel: the one place where that is chosen."""
    kernel = weight.shape[2]
    if geometry.groups > 1 or kernel not in (1, 3) or weight.shape[1] == 0:
        return True
    ours = kernel == 1 or (inference and int(weight.shape[0]) in CONVOLVED)
    return not ours and _compared(weight)


def serves_backward(node: host.Node, weight: Tensor, geometry: Geometry, fused: bool) -> bool:
    """Whether the library multiplies in the backward, and not a kernel: the one place where that is chosen.

    Args:
        node: sizes and layout.
        weight: the node's.
        geometry: of its convolution.
        fused: whether one kernel would make all gradients.
    """
    if weight.shape[2] > 1 or geometry.stride > 1 or geometry.groups > 1 or weight.shape[1] == 0:
        return True
    if not fused and not config.holds_dz(node.out_channels, node.dtype, node.exact):
        return True
    return node.out_channels > WIDE and _compared(weight)


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


def _matrix_gradients(
    dz: Tensor, maps: Sequence[Tensor], weight: Tensor, need_dx: Sequence[bool], need_dw: bool
) -> tuple[list[Tensor], Tensor]:
    """Those of a channels_last 1 x 1 node in half precision, whose maps are matrices as they lie.

    Products of float32 are a convolution's, since a matrix product does not follow its switch.
    """
    dw = torch.empty_like(weight) if need_dw else weight.new_empty(0)
    rows, columns = _matrix(dz), weight.flatten(1)
    dxs, start = [], 0
    for x, needed in zip(maps, need_dx, strict=True):
        part = slice(start, start + x.shape[1])
        dx = empty_like_layout(x, x.shape, True) if needed else x.new_empty(0)
        if needed:
            torch.mm(rows, columns[:, part], out=_matrix(dx))
        if need_dw:
            # In float32, since parts of so long a sum would otherwise be added in half precision.
            dw[:, part, 0, 0] = _wide_product(rows.t(), _matrix(x))
        dxs.append(dx)
        start += x.shape[1]
    return dxs, dw


def _matrix(t: Tensor) -> Tensor:
    """A channels_last map as pixels x channels."""
    return t.permute(0, 2, 3, 1).view(-1, t.shape[1])


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """A product of half-precision matrices in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else torch.mm(a.float(), b.float())


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Gradients whose parts are added in a fixed order: what holds of the kernels holds of the library for them.

    The flag itself: ``torch.backends.cudnn`` refuses where flags are frozen, and its ``flags`` sets every other too.
    """
    before = torch._C._get_cudnn_deterministic()
    torch._C._set_cudnn_deterministic(True)
    try:
        yield
    finally:
        torch._C._set_cudnn_deterministic(before)


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
    if weight.shape[2] == geometry.stride == geometry.groups == 1 and channels_last and dz.dtype.itemsize == 2:
        return _matrix_gradients(dz, maps, weight, need_dx, need_dw)
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
            with _deterministic():
                dx, part_dw, _ = torch.ops.aten.convolution_backward(dz, x, own, None, *steps, [wanted, need_dw, False])
            if wanted:
                for i, one in zip(part, dx.split([maps[i].shape[1] for i in part], 1), strict=True):
                    dxs[i] = host.in_layout(one, channels_last) if need_dx[i] else dxs[i]
            if need_dw:
                dw.narrow(1, start, depth).copy_(part_dw)
        start += depth
    return dxs, dw
