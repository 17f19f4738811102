"""IDA ladders as code bases call them: what they take, what they give back, and whether they write into the list.

Every ladder is made by ``ladder(out, channels, factors, unit)``: ``out`` channels, those of its layers and the factors
by which these are upsampled, and what makes its projections and nodes (:mod:`dla_fast.bench.neck_units`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dla_fast.bench.neck_units import EmptyConvTranspose2d, Identity, PlainNode, Wrapped, sequential

Unit = Callable[[int, int, int], nn.Module]


def up_convolution(channels: int, f: int, kind: type[nn.ConvTranspose2d] = nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """Upsampling by f, bilinear until it is trained."""
    up = kind(channels, channels, 2 * f, stride=f, padding=f // 2, output_padding=0, groups=channels, bias=False)
    side, centre = 2 * f, (2 * f - 1 - f % 2) / (2 * math.ceil(f))
    line = torch.tensor([1 - abs(i / f - centre) for i in range(side)])
    with torch.no_grad():
        up.weight.copy_(torch.outer(line, line).expand_as(up.weight))
    return up


class PairIDAUp(nn.Module):
    """The original's: ``(layers) -> (x, y)``, the first layer projected too, concat; the list stays as it is."""

    def __init__(self, out: int, channels: Sequence[int], factors: Sequence[int], unit: Unit = sequential) -> None:
        super().__init__()
        self.channels, self.out_dim = channels, out
        for i, (c, f) in enumerate(zip(channels, factors, strict=True)):
            setattr(self, f"proj_{i}", Identity() if c == out else unit(c, out, 1))
            setattr(self, f"up_{i}", Identity() if f == 1 else up_convolution(out, f))
        for i in range(1, len(channels)):
            setattr(self, f"node_{i}", unit(2 * out, out, 3))

    def forward(self, layers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        assert len(self.channels) == len(layers), f"{len(self.channels)} layers, got {len(layers)}"
        full = []
        for i, x in enumerate(layers):
            upsample, project = getattr(self, f"up_{i}"), getattr(self, f"proj_{i}")
            full.append(upsample(project(x)))
        x, y = full[0], []
        for i in range(1, len(full)):
            x = getattr(self, f"node_{i}")(torch.cat([x, full[i]], 1))
            y.append(x)
        return x, y


class RangeIDAUp(nn.Module):
    """Detectors': ``(layers, startp, endp) -> None``, adds, and writes into the caller's list."""

    def __init__(self, out: int, channels: Sequence[int], factors: Sequence[int], unit: Unit = PlainNode) -> None:
        super().__init__()
        for i in range(1, len(channels)):
            proj, node = unit(channels[i], out, 3), unit(out, out, 3)
            setattr(self, f"proj_{i}", proj)
            setattr(self, f"up_{i}", up_convolution(out, factors[i]))
            setattr(self, f"node_{i}", node)

    def forward(self, layers: list[Tensor], startp: int, endp: int) -> None:
        for i in range(startp + 1, endp):
            upsample, project = getattr(self, f"up_{i - startp}"), getattr(self, f"proj_{i - startp}")
            layers[i] = upsample(project(layers[i]))
            node = getattr(self, f"node_{i - startp}")
            layers[i] = node(layers[i] + layers[i - 1])


class ListsIDAUp(nn.Module):
    """The same with its children in three lists, and the up-convolutions of a toolbox."""

    def __init__(
        self,
        out: int,
        channels: Sequence[int],
        factors: Sequence[int],
        unit: Unit = PlainNode,
        up: type[nn.ConvTranspose2d] = EmptyConvTranspose2d,
        proj_kernel: int = 1,
    ) -> None:
        super().__init__()
        self.projs, self.ups, self.nodes = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for c, f in zip(channels[1:], factors[1:], strict=True):
            self.projs.append(unit(c, out, proj_kernel))
            self.ups.append(up_convolution(out, f, up))
            self.nodes.append(unit(out, out, 3))

    def forward(self, mlvl_features: list[Tensor], start_level: int, end_level: int) -> None:
        for i in range(start_level, end_level - 1):
            j = i - start_level
            mlvl_features[i + 1] = self.projs[j](mlvl_features[i + 1])
            mlvl_features[i + 1] = self.ups[j](mlvl_features[i + 1])
            mlvl_features[i + 1] = mlvl_features[i + 1] + mlvl_features[i]
            mlvl_features[i + 1] = self.nodes[j](mlvl_features[i + 1])


class ReturningIDAUp(nn.Module):
    """Monocular detectors': ``(layers) -> layers``, written into; concatenates what is upsampled first, or adds."""

    def __init__(
        self,
        out: int,
        channels: Sequence[int],
        factors: Sequence[int],
        unit: Unit = Wrapped,
        merge: str = "concat",
    ) -> None:
        super().__init__()
        self.merge = merge
        for i in range(1, len(channels)):
            setattr(self, f"proj_{i}", unit(channels[i], out, 1))
            setattr(self, f"up_{i}", up_convolution(out, factors[i]))
            setattr(self, f"node_{i}", unit(out * (2 if merge == "concat" else 1), out, 3))

    def forward(self, layers: list[Tensor]) -> list[Tensor]:
        for i in range(1, len(layers)):
            upsample, project = getattr(self, f"up_{i}"), getattr(self, f"proj_{i}")
            node = getattr(self, f"node_{i}")
            layers[i] = upsample(project(layers[i]))
            if self.merge == "concat":
                layers[i] = node(torch.cat([layers[i - 1], layers[i]], 1))
            else:
                layers[i] = node(layers[i - 1] + layers[i])
        return layers


Ladder = Callable[[int, Sequence[int], Sequence[int]], nn.Module]


def _steps(channels: Sequence[int]) -> list[tuple[int, list[int], list[int]]]:
    """Out, channels and factors of the ladders over some levels, each of half the resolution of the one before."""
    widths, scales, found = list(channels), [2**i for i in range(len(channels))], []
    for j in range(len(channels) - 2, -1, -1):
        found.append((channels[j], widths[j:], [s // scales[j] for s in scales[j:]]))
        widths[j + 1 :] = [channels[j]] * (len(channels) - j - 1)
        scales[j + 1 :] = [scales[j]] * (len(channels) - j - 1)
    return found


class PairDLAUp(nn.Module):
    """The original's ladders: from the levels, finest first, to the finest map."""

    def __init__(self, channels: Sequence[int], ladder: Ladder = PairIDAUp) -> None:
        super().__init__()
        for k, step in enumerate(_steps(channels)):
            setattr(self, f"ida_{k}", ladder(*step))

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        work = list(layers)
        for k in range(len(work) - 1):
            x, y = getattr(self, f"ida_{k}")(work[-k - 2 :])
            work[-k - 1 :] = y
        return x


class RangeDLAUp(nn.Module):
    """Detectors' ladders over the levels from ``startp`` on: the last map of each, finest first."""

    def __init__(self, startp: int, channels: Sequence[int], ladder: Ladder = RangeIDAUp) -> None:
        super().__init__()
        self.startp, self.channels = startp, channels
        for k, step in enumerate(_steps(channels)):
            setattr(self, f"ida_{k}", ladder(*step))

    def forward(self, layers: Sequence[Tensor]) -> list[Tensor]:
        work = list(layers)
        out = [work[-1]]
        for k in range(len(work) - self.startp - 1):
            getattr(self, f"ida_{k}")(work, len(work) - k - 2, len(work))
            out.insert(0, work[-1])
        return out


class DetectorNeck(nn.Module):
    """:class:`RangeDLAUp`, and a last ladder over all its maps but the coarsest, by 2, 4 and so on."""

    def __init__(self, channels: Sequence[int], ladder: Ladder = RangeIDAUp, startp: int = 0) -> None:
        super().__init__()
        self.dla_up = RangeDLAUp(startp, channels, ladder)
        self.count = len(channels) - 1
        self.ida_up = ladder(channels[0], channels[:-1], [2**i for i in range(self.count)])

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        x = cast("list[Tensor]", self.dla_up(layers))
        y = [x[i].clone() for i in range(self.count)]
        self.ida_up(y, 0, len(y))
        return y[-1]


class ReturningDLAUp(nn.Module):
    """Monocular detectors' ladders: from the levels, finest first, to the finest map."""

    def __init__(self, channels: Sequence[int], ladder: Ladder = ReturningIDAUp) -> None:
        super().__init__()
        for k, step in enumerate(_steps(channels)):
            setattr(self, f"ida_{k}", ladder(*step))

    def forward(self, feat_list: Sequence[Tensor]) -> Tensor:
        layers = list(feat_list)
        for k in range(len(layers) - 1):
            layers[-k - 1 :] = getattr(self, f"ida_{k}")(layers[-k - 2 :])[1:]
        return layers[-1]
