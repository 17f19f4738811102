"""Dense prediction: a DLA network whose levels are aggregated back to a fine resolution."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast import checks
from dla_fast.models.dla import DLA
from dla_fast.nn import DLAUp, Upsample
from dla_fast.nn.batch_norm import is_observed

_DOWN_RATIOS = (2, 4, 8, 16)
_CLASSES = 19


class DLASeg(nn.Module):
    """Semantic segmentation by iterative deep aggregation; with two classes at stride 2, boundary detection.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), sections 4.2 and 4.3. The levels of the network
    from ``down_ratio`` on go through :class:`dla_fast.nn.DLAUp`, a 1x1 convolution scores the classes, and a frozen
    bilinear upsampling brings the scores to the images' size. State dict keys ``base.*``, ``dla_up.*``, ``fc.0.*`` and
    ``up.weight``, those of the original code.

    Args:
        base: a network with ``features_only`` and output stride 32.
        num_classes: number of classes; 19 where it is None, as in Cityscapes.
        down_ratio: stride at which the classes are scored: 2, 4, 8 or 16.
        classes: another name of ``num_classes``, by which it was known first.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        num_classes: number of classes, also as ``classes``.

    Raises:
        ValueError: an option out of its range; in ``forward`` a wrong rank, channel count or size.
        TypeError: ``num_classes`` and ``classes`` both given; in ``forward``, an input that is not a floating tensor.

    Shape:
        Images (N, C, H, W), H and W multiples of 32. Gives the log-probabilities (N, num_classes, H, W) and the raw
        logits (N, num_classes, H / down_ratio, W / down_ratio).
    """

    def __init__(
        self,
        base: DLA,
        num_classes: int | None = None,
        down_ratio: int = 2,
        *,
        classes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if down_ratio not in _DOWN_RATIOS:
            raise ValueError(f"down_ratio: expected 2, 4, 8 or 16, got {down_ratio!r}")
        if num_classes is not None and classes is not None:
            raise TypeError(f"num_classes and classes are two names of one option, got {num_classes!r} and {classes!r}")
        count = _CLASSES if num_classes is None and classes is None else num_classes if classes is None else classes
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"num_classes: expected an integer >= 1, got {count!r}")
        if not base.features_only or base.output_stride != 32:
            raise ValueError("base: expected a network with features_only=True and output_stride=32")
        self.num_classes, self.down_ratio = count, down_ratio
        self.first_level = int(math.log2(down_ratio))
        self.base = base
        channels = base.feature_info.channels()[self.first_level :]
        self.dla_up = DLAUp(channels, device=device, dtype=dtype)
        self.fc = nn.Sequential(nn.Conv2d(channels[0], count, 1, device=device, dtype=dtype))
        self.up = Upsample(count, down_ratio, device=device, dtype=dtype)
        self.up.weight.requires_grad_(False)
        for module in (*self.dla_up.modules(), *self.fc):
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def classes(self) -> int:
        """``num_classes``."""
        return self.num_classes

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Networks pickled under the first name keep their number of classes."""
        if "num_classes" not in state:
            state = {**state, "num_classes": state["classes"]}
        super().__setstate__(state)

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
        base = self.base
        watched = type(base) is not DLA or is_observed(base) or nn.modules.module._has_any_global_hook()
        levels = base(x)[self.first_level :] if watched else base.levels(x, self.first_level)
        scores = self.fc(self.dla_up(levels))
        return F.log_softmax(self.up(scores), dim=1), scores
