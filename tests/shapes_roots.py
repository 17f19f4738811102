"""Aggregation nodes as code bases have them, as rows: conventions, where the norm is, and which norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from swap_shapes import Row
from torch import nn

from dla_fast._timm import import_timm

OUT, WIDTH = 8, 24
NODE = {"conv_norm_act_inference": 1, "native_batch_norm": 0}


class Root(nn.Module):
    """The original's."""

    def __init__(
        self, residual: bool = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, kernel_size: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, OUT, kernel_size, stride=1, bias=False, padding=(kernel_size - 1) // 2)
        self.bn = norm(OUT)
        self.relu = nn.ReLU(inplace=True)
        self.residual = residual

    def forward(self, *x):
        children = x
        x = self.conv(torch.cat(x, 1))
        x = self.bn(x)
        if self.residual:
            x += children[0]
        return self.relu(x)


class ListRoot(nn.Module):
    """A toolbox's: one list, ``norm`` and ``add_identity``."""

    def __init__(self, add_identity: bool = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, OUT, 1, stride=1, padding=0, bias=False)
        self.norm = norm(OUT)
        self.relu = nn.ReLU(inplace=True)
        self.add_identity = add_identity

    def forward(self, feat_list):
        children = feat_list
        x = self.conv(torch.cat(feat_list, 1))
        x = self.norm(x)
        if self.add_identity:
            x += children[0]
        return self.relu(x)


class NormedConv2d(nn.Conv2d):
    """A library's convolution that may hold a norm and an activation of its own."""

    def __init__(self, *args, norm=None, activation=None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.norm, self.activation = norm, activation

    def forward(self, x):
        if x.numel() == 0 and self.training:
            assert not isinstance(self.norm, torch.nn.SyncBatchNorm), "no image, and others wait for its statistics"
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class HoldingRoot(nn.Module):
    """Neither norm nor activation among its children: the convolution holds the one, a function is the other."""

    def __init__(self, residual: bool = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = NormedConv2d(WIDTH, OUT, 1, stride=1, bias=False, padding=0, norm=norm(OUT))
        self.residual = residual

    def forward(self, *x):
        children = x
        x = self.conv(torch.cat(x, 1))
        if self.residual:
            x += children[0]
        return F.relu_(x)


class FrozenBatchNorm2d(nn.Module):
    """A library's: four buffers and eps; two formulas, by whether there is a gradient to give."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x):
        if not x.requires_grad:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)
        return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + shift.to(x.dtype)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """The same with an activation inside."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        scale = self.weight.view(1, -1, 1, 1) * (self.running_var.view(1, -1, 1, 1) + self.eps).rsqrt()
        x = x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)
        return self.act(self.drop(x))


class ActingRoot(nn.Module):
    """Its norm ends in the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, OUT, 1, bias=False)
        self.bn = FrozenBatchNormAct2d(OUT)
        self.shortcut = False

    def forward(self, x_children):
        return self.bn(self.conv(torch.cat(x_children, 1)))


def torchvision_frozen(channels: int) -> nn.Module:
    import_timm()
    from torchvision.ops import FrozenBatchNorm2d as Frozen

    return Frozen(channels)


def maps(dtype: torch.dtype) -> list:
    return [torch.randn(2, OUT, 5, 3, dtype=dtype) for _ in range(WIDTH // OUT)]


def listed(dtype: torch.dtype) -> list:
    return [maps(dtype)]


ROWS = {
    "`Root(*x)`": Row(Root, maps, {"": ""}, ops=NODE),
    "`Root(*x)`, residual": Row(lambda: Root(True), maps, {"": ""}, ops=NODE),
    "`Root(list)`, `norm`": Row(ListRoot, listed, {"": ""}, ops=NODE),
    "`Root(list)`, `norm`, `add_identity`": Row(lambda: ListRoot(True), listed, {"": ""}, ops=NODE),
    "Root whose `conv` holds `.norm`, F.relu_ in its forward": Row(HoldingRoot, maps, {"": ""}, ops=NODE),
    "the same, residual": Row(lambda: HoldingRoot(True), maps, {"": ""}, ops=NODE),
    "the same, FrozenBatchNorm2d": Row(lambda: HoldingRoot(norm=FrozenBatchNorm2d), maps, {"": ""}, ops=NODE),
    "Root, a library's FrozenBatchNorm2d (four buffers, eps)": Row(
        lambda: Root(norm=FrozenBatchNorm2d), maps, {"": ""}, ops=NODE
    ),
    "Root, the same, residual": Row(lambda: Root(True, FrozenBatchNorm2d), maps, {"": ""}, ops=NODE),
    "Root, torchvision's FrozenBatchNorm2d": Row(lambda: Root(norm=torchvision_frozen), maps, {"": ""}, ops=NODE),
    "Root whose frozen norm ends in the activation": Row(ActingRoot, listed, {"": ""}, ops=NODE),
    "Root, SyncBatchNorm": Row(lambda: Root(norm=nn.SyncBatchNorm), maps, {"": ""}, ops=NODE),
    "`Root(*x)` of a 3×3 kernel": Row(lambda: Root(kernel_size=3), maps, {}, {"": "kernel_size is (3, 3)"}),
    "Root, GroupNorm": Row(lambda: Root(norm=lambda channels: nn.GroupNorm(2, channels)), maps, {}, {"": "GroupNorm"}),
}
