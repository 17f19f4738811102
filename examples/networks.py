"""A detector and a segmenter on DLA-34 in plain PyTorch, as projects have them: nothing here knows of dla_fast.

The base is Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018) with the keys of timm's ``dla34``, whose
weights it takes. The detector is CenterNet's (Objects as Points, Zhou, Wang, Krähenbühl, 2019), with plain convolutions
for deformable ones: its ladders add. The segmenter's ladders concatenate, as in the first paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (16, 32, 64, 128, 256, 512)


def unit(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which may be given."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class Root(nn.Module):
    """The aggregation node: concatenate, 1x1 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, residual: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.residual = residual

    def forward(self, *xs: Tensor) -> Tensor:
        x = self.bn(self.conv(torch.cat(xs, 1)))
        return self.relu(x + xs[0] if self.residual else x)


class Tree(nn.Module):
    """Hierarchical aggregation: two subtrees; the last root takes both blocks and everything handed down to it."""

    def __init__(self, depth: int, inputs: int, outputs: int, stride: int, level_root: bool, handed: int = 0) -> None:
        super().__init__()
        handed += inputs if level_root else 0
        self.level_root, self.is_leaf = level_root, depth == 1
        self.downsample = nn.MaxPool2d(stride) if stride > 1 else nn.Identity()
        if self.is_leaf:
            self.tree1: nn.Module = BasicBlock(inputs, outputs, stride)
            self.tree2: nn.Module = BasicBlock(outputs, outputs)
            self.root = Root(2 * outputs + handed, outputs)
            changes = inputs != outputs
            self.project = nn.Sequential(*unit(inputs, outputs, 1)[:2]) if changes else nn.Identity()
        else:
            self.tree1 = Tree(depth - 1, inputs, outputs, stride, False)
            self.tree2 = Tree(depth - 1, outputs, outputs, 1, False, handed + outputs)

    def forward(self, x: Tensor, handed: tuple[Tensor, ...] = ()) -> Tensor:
        bottom = self.downsample(x)
        if self.level_root:
            handed = (*handed, bottom)
        if not self.is_leaf:
            first = self.tree1(x)
            return self.tree2(first, (*handed, first))
        first = self.tree1(x, self.project(bottom))
        return self.root(self.tree2(first, first), first, *handed)


class DLA34(nn.Module):
    """The base: six levels, each half the size of the one before."""

    def __init__(self) -> None:
        super().__init__()
        c = CHANNELS
        self.base_layer = unit(3, c[0], 7)
        self.level0 = unit(c[0], c[0])
        self.level1 = unit(c[0], c[1], stride=2)
        self.level2 = Tree(1, c[1], c[2], 2, False)
        self.level3 = Tree(2, c[2], c[3], 2, True)
        self.level4 = Tree(2, c[3], c[4], 2, True)
        self.level5 = Tree(1, c[4], c[5], 2, True)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, levels = self.base_layer(x), []
        for i in range(6):
            x = getattr(self, f"level{i}")(x)
            levels.append(x)
        return levels


def upsampling(channels: int, factor: int) -> nn.Module:
    """Learned upsampling of each channel for itself, bilinear at first."""
    if factor == 1:
        return nn.Identity()
    conv = nn.ConvTranspose2d(
        channels, channels, 2 * factor, stride=factor, padding=factor // 2, groups=channels, bias=False
    )
    ramp = 1 - (torch.arange(2 * factor) - (factor - 0.5)).abs() / factor
    with torch.no_grad():
        conv.weight.copy_(ramp[:, None] * ramp)
    return conv


class AddingIDAUp(nn.Module):
    """A detector's ladder: brings layers[start:end] to the first one's size and adds them up, in the given list."""

    def __init__(self, outputs: int, channels: Sequence[int], factors: Sequence[int]) -> None:
        super().__init__()
        for i in range(1, len(channels)):
            setattr(self, f"proj_{i}", unit(channels[i], outputs))
            setattr(self, f"up_{i}", upsampling(outputs, factors[i]))
            setattr(self, f"node_{i}", unit(outputs, outputs))

    def forward(self, layers: list[Tensor], start: int, end: int) -> None:
        for i in range(1, end - start):
            project, up, node = (getattr(self, f"{kind}_{i}") for kind in ("proj", "up", "node"))
            layers[start + i] = node(up(project(layers[start + i])) + layers[start + i - 1])


class ConcatIDAUp(nn.Module):
    """The original's ladder: brings all layers to one size and width, and merges them by 3x3 convolutions in turn."""

    def __init__(self, outputs: int, channels: Sequence[int], factors: Sequence[int]) -> None:
        super().__init__()
        for i, (c, factor) in enumerate(zip(channels, factors, strict=True)):
            setattr(self, f"proj_{i}", nn.Identity() if c == outputs else unit(c, outputs, 1))
            setattr(self, f"up_{i}", upsampling(outputs, factor))
            if i:
                setattr(self, f"node_{i}", unit(2 * outputs, outputs))

    def forward(self, layers: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        full = [getattr(self, f"up_{i}")(getattr(self, f"proj_{i}")(x)) for i, x in enumerate(layers)]
        x, merged = full[0], []
        for i in range(1, len(full)):
            x = getattr(self, f"node_{i}")(torch.cat([x, full[i]], 1))
            merged.append(x)
        return x, merged


class DLAUp(nn.Module):
    """Ladders one after the other: from the coarsest two layers up to all of them."""

    def __init__(self, channels: Sequence[int], ladder: type[AddingIDAUp] | type[ConcatIDAUp]) -> None:
        super().__init__()
        self.adds = ladder is AddingIDAUp
        widths, scales = list(channels), [2**i for i in range(len(channels))]
        for k, j in enumerate(reversed(range(len(channels) - 1))):
            setattr(self, f"ida_{k}", ladder(widths[j], widths[j:], [s // scales[j] for s in scales[j:]]))
            widths[j:] = [widths[j]] * (len(channels) - j)
            scales[j:] = [scales[j]] * (len(channels) - j)

    def forward(self, layers: Sequence[Tensor]) -> list[Tensor]:
        """The finest map of each ladder, the finest of all first; before the first ladder, the coarsest layer."""
        layers = list(layers)
        finest = [layers[-1]]
        for k in range(len(layers) - 1):
            ladder, first = getattr(self, f"ida_{k}"), len(layers) - k - 2
            if self.adds:
                ladder(layers, first, len(layers))
            else:
                layers[first + 1 :] = ladder(layers[first:])[1]
            finest.insert(0, layers[-1])
        return finest


class Detector(nn.Module):
    """CenterNet on DLA-34: images to the heads' maps at a quarter of their size, the heatmap as logits."""

    def __init__(self, classes: int = 3, width: int = 256) -> None:
        super().__init__()
        channels = CHANNELS[2:]
        self.base = DLA34()
        self.dla_up = DLAUp(channels, AddingIDAUp)
        self.ida_up = AddingIDAUp(channels[0], channels[:3], (1, 2, 4))
        for name, outputs in (("heatmap", classes), ("size", 2), ("offset", 2)):
            head = nn.Sequential(nn.Conv2d(channels[0], width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, outputs, 1))
            setattr(self, name, head)
        nn.init.constant_(self.heatmap[-1].bias, -2.19)  # a tenth at first: nearly everything is background

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        layers = self.dla_up(self.base(x)[2:])[:3]
        self.ida_up(layers, 0, 3)
        return {name: getattr(self, name)(layers[-1]) for name in ("heatmap", "size", "offset")}


class Segmenter(nn.Module):
    """DLA-34 with concatenating ladders: images to the logits of each pixel's class."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.base = DLA34()
        self.dla_up = DLAUp(CHANNELS[2:], ConcatIDAUp)
        self.score = nn.Conv2d(CHANNELS[2], classes, 1)
        self.up = upsampling(classes, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.score(self.dla_up(self.base(x)[2:])[0]))
