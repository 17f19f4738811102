"""The DLA classification network and feature extractor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dla_fast import checks
from dla_fast.nn import ConvLevel, Tree
from dla_fast.nn.batch_norm import is_observed
from dla_fast.nn.tree import BlockFactory
from dla_fast.ops.ending import Ending

_OUTPUT_STRIDES = (8, 16, 32)


@dataclass(frozen=True)
class Feature:
    """What one level gives: its channels, its stride against the input, and the module's name."""

    num_chs: int
    reduction: int
    module: str


class FeatureInfo(tuple[Feature, ...]):
    """The levels of a network, 0 to 5."""

    def channels(self) -> list[int]:
        """Channels of each level."""
        return [feature.num_chs for feature in self]

    def reduction(self) -> list[int]:
        """Stride of each level against the input."""
        return [feature.reduction for feature in self]

    def module_name(self) -> list[str]:
        """Name of each level's module."""
        return [feature.module for feature in self]


def _check_at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


class DLA(nn.Module):
    """A Deep Layer Aggregation network.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), figure 3: a stem, two plain convolution levels,
    and four levels of hierarchical aggregation, each at half the size of the one before. The state dict has timm's
    keys; :mod:`dla_fast.models.convert` reads and writes the original layout.

    Args:
        levels: convolutions of levels 0 and 1, tree depths of levels 2 to 5.
        channels: channels of levels 0 to 5.
        block: the residual block, see :class:`dla_fast.nn.Tree`.
        residual_root: aggregation nodes add their first input before the ReLU.
        num_classes: outputs of the head; 0 for none.
        in_chans: channels of the images.
        features_only: give the six levels' features instead of a classification; there is no head then.
        output_stride: 32, 16 or 8: the levels past it keep their input's size and dilate their convolutions instead.
            The parameters stay the same.
        drop_rate: dropout before the head.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        feature_info: channels and strides of levels 0 to 5.
        num_features: channels of level 5.

    Raises:
        ValueError: an option out of its range; in ``forward`` a wrong rank, channel count or size.
        TypeError: in ``forward``, an input that is not a floating tensor.

    Shape:
        Images (N, in_chans, H, W), H and W multiples of ``output_stride`` or one less. Gives (N, num_classes); without
        a head the pooled features (N, num_features); with ``features_only`` a list of six tensors, level i of shape
        (N, channels[i], H / s, W / s), rounded up, with s as in ``feature_info``.
    """

    def __init__(
        self,
        levels: Sequence[int],
        channels: Sequence[int],
        block: BlockFactory,
        *,
        residual_root: bool = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        features_only: bool = False,
        output_stride: int = 32,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, values in (("levels", levels), ("channels", channels)):
            if len(values) != 6:
                raise ValueError(f"{name}: expected one entry for each of the levels 0 to 5, got {list(values)}")
        _check_at_least("num_classes", num_classes, 0)
        _check_at_least("in_chans", in_chans, 1)
        if output_stride not in _OUTPUT_STRIDES:
            raise ValueError(f"output_stride: expected 8, 16 or 32, got {output_stride!r}")
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate: expected a number in [0, 1], got {drop_rate!r}")
        self.in_chans = in_chans
        self.num_classes = 0 if features_only else num_classes
        self.num_features = channels[5]
        self.features_only = features_only
        self.output_stride = output_stride
        self.feature_info = FeatureInfo(
            Feature(count, min(2**i, output_stride), f"level{i}") for i, count in enumerate(channels)
        )

        self.base_layer = ConvLevel(in_chans, channels[0], kernel_size=7, device=device, dtype=dtype)
        self.level0 = ConvLevel(channels[0], channels[0], levels[0], device=device, dtype=dtype)
        self.level1 = ConvLevel(channels[0], channels[1], levels[1], stride=2, device=device, dtype=dtype)
        dilation = 1
        for i in range(2, 6):
            # As in dilated residual networks (Yu, Koltun, Funkhouser, CVPR 2017), a level that gives up its stride
            # dilates what follows its once strided convolution; that one still sees the grid it was made for.
            strided = 2**i <= output_stride
            first_dilation, dilation = dilation, dilation if strided else 2 * dilation
            tree = Tree(
                levels[i],
                block,
                channels[i - 1],
                channels[i],
                2 if strided else 1,
                dilation=dilation,
                first_dilation=first_dilation,
                level_root=i > 2,
                residual_root=residual_root,
                device=device,
                dtype=dtype,
            )
            self.add_module(f"level{i}", tree)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = (
            nn.Conv2d(channels[5], self.num_classes, 1, device=device, dtype=dtype)
            if self.num_classes > 0
            else nn.Identity()
        )
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def _check_images(self, x: Tensor) -> None:
        checks.check_tensor("x", x, rank=4)
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x: expected {self.in_chans} channels (in_chans), got shape {tuple(x.shape)}")
        stride = self.output_stride
        # Level 1 halves by a convolution, which rounds up; the trees after it need an even size each.
        if any(size < 1 or (size + 1) // 2 % (stride // 2) for size in x.shape[2:]):
            near = [max(stride, (size + stride // 2) // stride * stride) for size in x.shape[2:]]
            raise ValueError(
                f"x: expected a height and width that are multiples of the network's stride {stride}, or one less, "
                f"got {x.shape[2]}x{x.shape[3]}; the nearest valid size is {near[0]}x{near[1]}"
            )

    def levels(self, x: Tensor, first: int = 0) -> list[Tensor]:
        """The features of the levels from ``first`` on, see ``features_only``; those before it are not kept."""
        self._check_images(x)
        features = []
        if first == 0:
            x = self.level0(self.base_layer(x))
            features.append(x)
        x = self._stem(x) if first > 0 else self.level1(x)
        for i, feature in enumerate(self.feature_info[1:], 1):
            x = x if i == 1 else getattr(self, feature.module)(x)
            if i >= first:
                features.append(x)
        return features

    def _stem(self, x: Tensor) -> Tensor:
        """Level 1's features; those before it are read by the next level alone, which normalises them on the way."""
        *before, last = levels = (self.base_layer, self.level0, self.level1)
        watched = any(is_observed(m) or type(m) is not ConvLevel or not m.is_plain() for m in levels)
        if watched or nn.modules.module._has_any_global_hook():
            return self.level1(self.level0(self.base_layer(x)))
        y: Tensor | Ending = x
        for level in before:
            y = level.deferred(y)
        return last.run(y)

    def forward_features(self, x: Tensor) -> Tensor:
        """Level 5's features, (N, num_features, H / output_stride, W / output_stride)."""
        return self.levels(x, 5)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Pool, drop out and classify level 5's features: (N, num_classes), or (N, num_features) without a head."""
        x = self.head_drop(nn.functional.adaptive_avg_pool2d(x, 1))
        return self.fc(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.features_only:
            return self.levels(x)
        return self.forward_head(self.forward_features(x))
