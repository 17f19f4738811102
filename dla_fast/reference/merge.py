"""Reference of the IDA node: upsample some inputs, concat, k x k convolution, batch norm, activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_fast.reference.activation import ActSpec
from dla_fast.reference.batch_norm_act import batch_norm_act
from dla_fast.reference.upsample import upsample as _upsample


def merge(
    xs: Sequence[Tensor],
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    conv_bias: Tensor | None = None,
    upsample: Sequence[tuple[Tensor, int] | None] | None = None,
    act: ActSpec = "relu",
) -> Tensor:
    """The iterative-aggregation node in plain PyTorch.

    Same arguments as :func:`dla_fast.functional.merge`: ``upsample`` holds, per input, None or
    ``(up_weight, factor)``.
    """
    ups = upsample if upsample is not None else [None] * len(xs)
    full = [x if up is None else _upsample(x, *up) for x, up in zip(xs, ups, strict=True)]
    z = F.conv2d(torch.cat(full, 1), weight, conv_bias, padding=weight.shape[-1] // 2)
    return batch_norm_act(
        z,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        act=act,
    )
