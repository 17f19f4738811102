"""Dense prediction: a DLA network whose levels are aggregated back to a fine resolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast import checks
from dla_fast.models.dla import DLA
from dla_fast.nn import DLAUp, Upsample

_DOWN_RATIOS = (2, 4, 8, 16)


class DLASeg(nn.Module):
    """Semantic segmentation by iterative deep aggregation; with two classes at stride 2, boundary detection.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), sections 4.2 and 4.3. The levels of the network
    from ``down_ratio`` on go through :class:`dla_fast.nn.DLAUp`, a 1x1 convolution scores the classes, and a frozen
    bilinear upsampling brings the scores to the images' size. State dict keys ``base.*``, ``dla_up.*``, ``fc.0.*`` and
    ``up.weight``, those of the original code.

    Args:
        base: a network with ``features_only`` and output stride 32.
        classes: number of classes; 19 by default, as in Cityscapes.
        down_ratio: stride at which the classes are scored: 2, 4, 8 or 16.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an option out of its range; in ``forward`` a wrong rank, channel count or size.
        TypeError: in ``forward``, an input that is not a floating tensor.

    Shape:
        Images (N, C, H, W), H and W multiples of 32. Gives the log-probabilities (N, classes, H, W) and the raw logits
        (N, classes, H / down_ratio, W / down_ratio).
    """

    def __init__(
        self,
        base: DLA,
        classes: int = 19,
        down_ratio: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if down_ratio not in _DOWN_RATIOS:
            raise ValueError(f"down_ratio: expected 2, 4, 8 or 16, got {down_ratio!r}")
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
            raise ValueError(f"classes: expected an integer >= 1, got {classes!r}")
        if not base.features_only or base.output_stride != 32:
            raise ValueError("base: expected a network with features_only=True and output_stride=32")
        self.classes, self.down_ratio = classes, down_ratio
        self.first_level = int(math.log2(down_ratio))
        self.base = base
        channels = base.feature_info.channels()[self.first_level :]
        self.dla_up = DLAUp(channels, device=device, dtype=dtype)
        self.fc = nn.Sequential(nn.Conv2d(channels[0], classes, 1, device=device, dtype=dtype))
        self.up = Upsample(classes, down_ratio, device=device, dtype=dtype)
        self.up.weight.requires_grad_(False)
        for module in (*self.dla_up.modules(), *self.fc):
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _check_images(self, x: Tensor) -> None:
        checks.check_tensor("x", x, rank=4)
        stride = self.base.output_stride
        if any(side < 1 or side % stride for side in x.shape[2:]):
            near = [max(stride, (side + stride // 2) // stride * stride) for side in x.shape[2:]]
            raise ValueError(
                f"x: expected a height and width that are multiples of the network's stride {stride}, "
                f"got {x.shape[2]}x{x.shape[3]}; the nearest valid size is {near[0]}x{near[1]}"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_images(x)
        levels = self.base(x)
        scores = self.fc(self.dla_up(levels[self.first_level :]))
        return F.log_softmax(self.up(scores), dim=1), scores
