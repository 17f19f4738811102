"""The conventional merges of the same levels, to compare iterative deep aggregation with. Plain PyTorch.

Each takes levels from fine to coarse, every one half the size of the one before, and gives a map at the finest level's
size. They are shallow in the sense of Deep Layer Aggregation (CVPR 2018): the finest level is merged last and passes
the fewest layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast import checks
from dla_fast.nn.ida import ConvNormAct


def _check(layers: Sequence[Tensor], channels: Sequence[int]) -> None:
    if isinstance(layers, Tensor) or len(layers) != len(channels):
        got = "one tensor" if isinstance(layers, Tensor) else f"{len(layers)} layers"
        raise ValueError(f"layers: expected {len(channels)} layers, got {got}")
    for i, (x, c) in enumerate(zip(layers, channels, strict=True)):
        if x.dim() != 4 or x.shape[1] != c:
            raise checks.MismatchError(f"layers[{i}]: expected (N, {c}, H, W), got shape {tuple(x.shape)}")


class FCNMerge(nn.Module):
    """Skip connections as in fully convolutional networks: every level scored by a 1x1 convolution, and added up.

    Long, Shelhamer, Darrell, Fully Convolutional Networks for Semantic Segmentation (CVPR 2015).

    Args:
        channels: channels of each level.
        out_channels: channels of the result.

    Shape:
        ``forward(layers)``: layer i (N, channels[i], H / 2^i, W / 2^i) to (N, out_channels, H, W).
    """

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.score = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in channels)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        _check(layers, self.channels)
        x: Tensor = self.score[-1](layers[-1])
        for score, skip in zip(reversed(self.score[:-1]), reversed(layers[:-1]), strict=True):
            x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False) + score(skip)
        return x


class FPNMerge(nn.Module):
    """A feature pyramid's top-down path: lateral 1x1 convolutions, nearest upsampling, one 3x3 convolution at the end.

    Lin et al., Feature Pyramid Networks for Object Detection (CVPR 2017).

    Args:
        channels: channels of each level.
        out_channels: channels of the pyramid.

    Shape:
        ``forward(layers)``: layer i (N, channels[i], H / 2^i, W / 2^i) to (N, out_channels, H, W).
    """

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in channels)
        self.smooth = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        _check(layers, self.channels)
        x: Tensor = self.lateral[-1](layers[-1])
        for lateral, skip in zip(reversed(self.lateral[:-1]), reversed(layers[:-1]), strict=True):
            x = F.interpolate(x, skip.shape[2:], mode="nearest") + lateral(skip)
        return self.smooth(x)


class UNetMerge(nn.Module):
    """A U-Net's decoder: transposed 2x2 convolution, concat with the skip, two 3x3 convolutions with batch norm.

    Ronneberger, Fischer, Brox, U-Net (MICCAI 2015), with padding and batch norm.

    Args:
        channels: channels of each level.
        out_channels: channels of the result.

    Shape:
        ``forward(layers)``: layer i (N, channels[i], H / 2^i, W / 2^i) to (N, out_channels, H, W).
    """

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        widths = [out_channels, *channels[1:]]
        self.up = nn.ModuleList()
        self.conv = nn.ModuleList()
        for fine, coarse, width in zip(channels[:-1], widths[1:], widths[:-1], strict=True):
            self.up.append(nn.ConvTranspose2d(coarse, fine, 2, 2))
            self.conv.append(nn.Sequential(ConvNormAct(2 * fine, width, 3), ConvNormAct(width, width, 3)))

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        _check(layers, self.channels)
        x = layers[-1]
        for up, conv, skip in zip(reversed(self.up), reversed(self.conv), reversed(layers[:-1]), strict=True):
            x = conv(torch.cat([skip, up(x)], 1))
        return x
