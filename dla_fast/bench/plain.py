"""Dense-prediction networks op by op, after the paper: what the modules of this package are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm_act(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """k x k convolution, batch norm, in-place ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def transposed(channels: int, f: int) -> nn.ConvTranspose2d:
    """The up-convolution of factor f as every implementation has it."""
    return nn.ConvTranspose2d(channels, channels, 2 * f, stride=f, padding=f // 2, groups=channels, bias=False)


class PlainIDAUp(nn.Module):
    """One ladder: every layer projected and upsampled, then merged in one after the other."""

    def __init__(
        self, out: int, channels: Sequence[int], factors: Sequence[int], kernel: int = 3, merge: str = "concat"
    ) -> None:
        super().__init__()
        self.count, self.merge = len(channels), merge
        for i, (c, f) in enumerate(zip(channels, factors, strict=True)):
            setattr(self, f"proj_{i}", nn.Identity() if c == out else conv_norm_act(c, out, 1))
            setattr(self, f"up_{i}", nn.Identity() if f == 1 else transposed(out, f))
            if i:
                setattr(self, f"node_{i}", conv_norm_act(out * (2 if merge == "concat" else 1), out, kernel))

    def forward(self, layers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        full = [getattr(self, f"up_{i}")(getattr(self, f"proj_{i}")(x)) for i, x in enumerate(layers)]
        x, y = full[0], []
        for i in range(1, self.count):
            both = torch.cat([x, full[i]], 1) if self.merge == "concat" else full[i] + x
            x = getattr(self, f"node_{i}")(both)
            y.append(x)
        return x, y


class PlainDLAUp(nn.Module):
    """The ladders of a network."""

    def __init__(self, channels: Sequence[int], merge: str = "concat") -> None:
        super().__init__()
        widths, scales = list(channels), [2**i for i in range(len(channels))]
        for k in range(len(channels) - 1):
            j = len(channels) - 2 - k
            ladder = PlainIDAUp(channels[j], widths[j:], [s // scales[j] for s in scales[j:]], merge=merge)
            setattr(self, f"ida_{k}", ladder)
            widths[j + 1 :] = [channels[j]] * (len(channels) - j - 1)
            scales[j + 1 :] = [scales[j]] * (len(channels) - j - 1)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        work = list(layers)
        for k in range(len(work) - 1):
            x, y = getattr(self, f"ida_{k}")(work[-k - 2 :])
            work[-k - 1 :] = y
        return x


class PlainSeg(nn.Module):
    """A dense-prediction network around a classification network of six levels, for example timm's."""

    def __init__(self, base: nn.Module, channels: Sequence[int], classes: int, down_ratio: int) -> None:
        super().__init__()
        self.first = down_ratio.bit_length() - 1
        self.base, self.dla_up = base, PlainDLAUp(channels[self.first :])
        self.fc = nn.Sequential(nn.Conv2d(channels[self.first], classes, 1))
        self.up = transposed(classes, down_ratio)
        self.up.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.base.get_submodule("base_layer")(x)
        levels = []
        for i in range(6):
            x = getattr(self.base, f"level{i}")(x)
            levels.append(x)
        scores = self.fc(self.dla_up(levels[self.first :]))
        return F.log_softmax(self.up(scores), dim=1), scores
