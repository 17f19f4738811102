"""Aggregation beyond DLA, as rows: what concatenates in a parent's forward, as libraries and detectors have it."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from swap_shapes import Row
from torch import nn

from dla_fast._timm import import_timm


def units(count: int) -> dict[str, int]:
    """What a call runs: the reader, and the single units around it."""
    return {"conv_norm_act_inference": count}


def timm_part(module: str, name: str, *args, **kwargs) -> Callable[[], nn.Module]:
    """A block of timm's."""

    def make() -> nn.Module:
        import_timm()
        given = {key: resolve(value) for key, value in kwargs.items()}
        return getattr(importlib.import_module(f"timm.{module}"), name)(*args, **given)

    def resolve(value):
        return value.make() if isinstance(value, _Later) else value

    return make


class _Later:
    """An argument that is made when timm is there."""

    def __init__(self, make: Callable[[], object]) -> None:
        self.make = make


def layer(module: str, name: str) -> _Later:
    def make() -> object:
        import_timm()
        return getattr(importlib.import_module(f"timm.{module}"), name)

    return _Later(make)


def maps(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], list]:
    return lambda dtype: [torch.randn(shape, dtype=dtype) for shape in shapes]


def listed(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], list]:
    return lambda dtype: [[torch.randn(shape, dtype=dtype) for shape in shapes]]


# --- blocks of one-stage detectors ------------------------------------------------------------------------------------


class Unit(nn.Module):
    """Convolution, norm and SiLU; a detector that is to be exported folds the norm away."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


def fold(model: nn.Module) -> nn.Module:
    """Fold the norm of every unit into its convolution: ``bn`` is gone, and the forward is the other one."""
    for unit in model.modules():
        if isinstance(unit, Unit):
            conv, bn = unit.conv, unit.bn
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            conv.weight = nn.Parameter((conv.weight * scale.view(-1, 1, 1, 1)).detach())
            conv.bias = nn.Parameter((bn.bias - bn.running_mean * scale).detach())
            del unit.bn
            unit.forward = unit.forward_fuse
    return model


class Residual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = Unit(c, c, 3), Unit(c, c, 3), True

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    def __init__(self, c1: int = 12, c2: int = 16, n: int = 2) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1 = Unit(c1, 2 * self.c)
        self.cv2 = Unit((2 + n) * self.c, c2)
        self.m = nn.ModuleList(Residual(self.c) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C3(nn.Module):
    def __init__(self, c1: int = 12, c2: int = 16, n: int = 2) -> None:
        super().__init__()
        c = c2 // 2
        self.cv1, self.cv2, self.cv3 = Unit(c1, c), Unit(c1, c), Unit(2 * c, c2)
        self.m = nn.Sequential(*(Residual(c) for _ in range(n)))

    def forward(self, x):
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPP(nn.Module):
    def __init__(self, c1: int = 16, c2: int = 12) -> None:
        super().__init__()
        self.cv1, self.cv2 = Unit(c1, c1 // 2), Unit(c1 * 2, c2)
        self.m = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (3, 5, 7))

    def forward(self, x):
        x = self.cv1(x)
        return self.cv2(torch.cat([x] + [m(x) for m in self.m], 1))


class SPPF(nn.Module):
    def __init__(self, c1: int = 16, c2: int = 12) -> None:
        super().__init__()
        self.cv1, self.cv2 = Unit(c1, c1 // 2), Unit(c1 * 2, c2)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class SPPFn(SPPF):
    """A later one: so many poolings, and the input added where that can be."""

    def __init__(self, c: int = 16, n: int = 3) -> None:
        super().__init__(c, c)
        self.cv1, self.cv2 = Unit(c, c // 2, act=False), Unit(c // 2 * (n + 1), c)
        self.n, self.add = n, True

    def forward(self, x):
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(getattr(self, "n", 3)))
        y = self.cv2(torch.cat(y, 1))
        return y + x if getattr(self, "add", False) else y


class Detector(nn.Module):
    """Its last blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3, 8, 3, 2)
        self.block, self.down, self.deep, self.pool = C2f(8, 16), Unit(16, 16, 3, 2), C3(16, 16), SPPF(16, 16)

    def forward(self, x):
        return self.pool(self.deep(self.down(self.block(self.stem(x)))))


def aspp() -> nn.Module:
    import_timm()
    module = importlib.import_module("torchvision.models.segmentation.deeplabv3")
    return module.ASPP(12, [2, 3, 4], out_channels=8)


OSA = ("models.vovnet", "OsaBlock")
CSP = {"block_ratio": 0.5, "norm_layer": nn.BatchNorm2d}
HG = ("models.hgnet", "HighPerfGpuBlock")
X, Y = (2, 12, 8, 6), (2, 16, 8, 6)
DETECTOR = {"block": "", "deep": "", "pool": ""}

ROWS = {
    "VoVNet's OsaBlock": Row(timm_part(*OSA, 12, 8, 16, 3), maps(X), {"": ""}, ops=units(4)),
    "the same, residual, attention, drop path": Row(
        timm_part(
            *OSA, 16, 8, 16, 3, True, attn="ese", drop_path=_Later(lambda: layer("layers", "DropPath").make()(0.3))
        ),
        maps(Y),
        {"": ""},
        ops=units(4),
    ),
    "the same, depthwise, reduced before": Row(
        timm_part(*OSA, 12, 8, 16, 2, depthwise=True), maps(X), {"": ""}, ops=units(2)
    ),
    "CSPNet's CrossStage": Row(
        timm_part("models.cspnet", "CrossStage", 12, 16, 2, 1, 2, act_layer=nn.LeakyReLU, **CSP),
        maps((2, 12, 9, 8)),
        {"": ""},
        ops=units(10),
    ),
    "CSPNet's CrossStage3": Row(
        timm_part("models.cspnet", "CrossStage3", 12, 16, 2, 1, 1, act_layer=nn.SiLU, **CSP),
        maps(X),
        {"": ""},
        ops=units(6),
    ),
    "SelecSLS's first block of a stage": Row(
        timm_part("models.selecsls", "SelecSlsBlock", 12, 0, 8, 16, True, 2),
        listed(X),
        {"conv1": "", "conv5": "", "": ""},
        ops=units(6),
    ),
    "SelecSLS's block with a skip": Row(
        timm_part("models.selecsls", "SelecSlsBlock", 12, 16, 8, 12, False, 1),
        listed(X, Y),
        {"conv1": "", "conv5": "", "": ""},
        ops=units(6),
    ),
    "HGNet's block": Row(timm_part(*HG, 12, 8, 16, 4), maps(X), {"": ""}, ops=units(5)),
    "HGNet's block of version 2, affine, residual": Row(
        timm_part(*HG, 16, 8, 16, 3, 3, True, True, True, "se", 0.2), maps(Y), {"": ""}, ops=units(4)
    ),
    "HGNet's stem of version 2": Row(
        timm_part("models.hgnet", "StemV2", 3, 8, 12, True), maps((2, 3, 17, 16)), {"": ""}, ops=units(1)
    ),
    "Res2Net's Bottle2neck": Row(
        timm_part("models.res2net", "Bottle2neck", 64, 16, norm_layer=nn.BatchNorm2d),
        maps((2, 64, 6, 5)),
        {"": ""},
        ops=units(1),
    ),
    "the same, strided, a downsample, attention": Row(
        timm_part(
            "models.res2net",
            "Bottle2neck",
            16,
            16,
            2,
            norm_layer=nn.BatchNorm2d,
            attn_layer=layer("layers", "SEModule"),
            downsample=_Later(lambda: nn.Sequential(nn.Conv2d(16, 64, 1, 2, bias=False), nn.BatchNorm2d(64))),
        ),
        maps((2, 16, 8, 6)),
        {"downsample": "", "": ""},
        ops=units(2),
    ),
    "DLA's Bottle2neck": Row(
        timm_part("models.dla", "DlaBottle2neck", 64, 64), maps((2, 64, 6, 5)), {"": ""}, ops=units(1)
    ),
    "the same, given a shortcut": Row(
        timm_part("models.dla", "DlaBottle2neck", 32, 64, 2), maps((2, 32, 8, 6), (2, 64, 4, 3)), {"": ""}, ops=units(1)
    ),
    "torchvision's ASPP": Row(aspp, maps((2, 12, 9, 8)), {"convs.0": "", "convs.1": "", "": ""}, ops=units(5)),
    "`C2f`, SiLU": Row(C2f, maps(X), {"": ""}, ops=units(6)),
    "`C2f` of more maps than a kernel takes": Row(lambda: C2f(n=7), maps(X), {"": ""}, ops={"cat": 1, **units(16)}),
    "`C2f`, folded": Row(lambda: fold(C2f()), maps(X), {"": "folded"}, ops=units(1)),
    "`C3`, SiLU": Row(C3, maps(X), {"": ""}, ops=units(7)),
    "`C3`, folded": Row(lambda: fold(C3()), maps(X), {"": "folded"}, ops=units(1)),
    "`SPP`, SiLU": Row(SPP, maps(Y), {"": ""}, ops=units(2)),
    "`SPPF`, SiLU": Row(SPPF, maps(Y), {"": ""}, ops=units(2)),
    "`SPPF`, folded": Row(lambda: fold(SPPF()), maps(Y), {"": "folded"}, ops=units(1)),
    "`SPPF(n, add)`": Row(SPPFn, maps(Y), {"": ""}, ops=units(2)),
    "the blocks of a detector": Row(Detector, maps((2, 3, 17, 16)), DETECTOR, ops=units(17)),
}
