"""Projections and nodes of ladders as code bases have them: their children, in the order in which they are registered.

Every unit is made by ``unit(inputs, outputs, kernel)`` and takes (N, inputs, H, W) to (N, outputs, H, W). Written here
after what was seen in use; a deformable convolution is stood for by :class:`Modulated`, of the same children and order
of work, since the real one needs a compiled library.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast.bench.plain import conv_norm_act

TAPS = 9  # of a deformable 3x3 kernel: two offsets and a weight each


class Identity(nn.Module):
    """The original's own: older than nn.Identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def sequential(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """The original's, and many others'."""
    return conv_norm_act(inputs, outputs, kernel)


class Modulated(nn.Module):
    """A stand-in for a deformable convolution: weight and bias of its own, what it reads steered by two maps."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, padding=self.padding)
        return y * (1 + mask.mean(1, keepdim=True)) + offset.mean(1, keepdim=True)


class ModulatedPack(Modulated):
    """The same with the convolution that makes the two maps inside."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__(in_channels, out_channels, kernel_size)
        self.conv_offset_mask = nn.Conv2d(in_channels, 3 * TAPS, kernel_size, padding=self.padding)
        nn.init.zeros_(self.conv_offset_mask.weight)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        first, second, mask = torch.chunk(self.conv_offset_mask(x), 3, dim=1)
        return super().forward(x, torch.cat((first, second), 1), mask.sigmoid())


class PlainNode(nn.Module):
    """{actf, conv}: a detector's node without its deformable convolution."""

    conv: nn.Module

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.actf = nn.Sequential(nn.BatchNorm2d(outputs, momentum=0.1), nn.ReLU(inplace=True))
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return self.actf(y)  # type: ignore[no-any-return]


class PackedNode(PlainNode):
    """{actf, conv}, the deformable convolution one module."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__(inputs, outputs)
        self.conv = ModulatedPack(inputs, outputs)


class OffsetNode(nn.Module):
    """{actf, offset, conv}: the offsets' convolution of 27 channels is registered before the one that counts."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.actf = nn.Sequential(nn.BatchNorm2d(outputs, momentum=0.1), nn.ReLU(inplace=True))
        self.offset = nn.Conv2d(inputs, 3 * TAPS, 3, padding=1)
        nn.init.zeros_(self.offset.weight)
        self.conv = Modulated(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        first, second, mask = torch.chunk(self.offset(x), 3, dim=1)
        y: Tensor = self.conv(x, torch.cat((first, second), 1), mask.sigmoid())
        return self.actf(y)  # type: ignore[no-any-return]


class ConvBnRelu(nn.Module):
    """{conv, bn, relu}."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        return x


class Wrapped(nn.Module):
    """{conv: Sequential of the three}."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = sequential(inputs, outputs, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class NormFirst(nn.Module):
    """{norm, relu, deform_conv}: registered in another order than run."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.deform_conv = ModulatedPack(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.deform_conv(x)))  # type: ignore[no-any-return]


class EmptyConv2d(nn.Conv2d):
    """A library's convolution that knows what to do with no image at all, and else is PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            sides = [(n + 2 * int(p) - k) // s + 1 for n, p, k, s in _geometry(self, x)]
            return x.new_empty((x.shape[0], self.out_channels, *sides))
        return super().forward(x)


class EmptyConvTranspose2d(nn.ConvTranspose2d):
    """The same of a transposed convolution."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if x.numel() == 0:
            sides = [(n - 1) * s - 2 * int(p) + k for n, p, k, s in _geometry(self, x)]
            return x.new_empty((x.shape[0], self.out_channels, *sides))
        return super().forward(x)


def _geometry(conv: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> zip[Any]:
    return zip(x.shape[-2:], conv.padding, conv.kernel_size, conv.stride, strict=True)


class ConvModule(nn.Module):
    """{conv, bn, activate}: a toolbox's unit, which may leave parts of itself out."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, with_norm: bool = True, with_act: bool = True
    ) -> None:
        super().__init__()
        self.with_norm, self.with_activation = with_norm, with_act
        self.order = ("conv", "norm", "act")
        self.conv = EmptyConv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not with_norm)
        self.norm_name = "bn"
        if with_norm:
            self.add_module(self.norm_name, nn.BatchNorm2d(outputs))
        self.activate = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm and self.with_norm:
                x = getattr(self, self.norm_name)(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class GlobalNode(nn.Module):
    """{gcl, gcr, act}: a large kernel as the sum of two separable branches, then norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, long: int = 7) -> None:
        super().__init__()
        tall: dict[str, Any] = {"kernel_size": (long, 1), "padding": (long // 2, 0)}
        wide: dict[str, Any] = {"kernel_size": (1, long), "padding": (0, long // 2)}
        self.gcl = nn.Sequential(nn.Conv2d(inputs, outputs, **tall), nn.Conv2d(outputs, outputs, **wide))
        self.gcr = nn.Sequential(nn.Conv2d(inputs, outputs, **wide), nn.Conv2d(outputs, outputs, **tall))
        self.act = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gcl(x) + self.gcr(x))  # type: ignore[no-any-return]
