"""Reference of the aggregation node: concat, 1x1 convolution, batch norm, residual, activation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dla_fast.reference.activation import ActSpec
from dla_fast.reference.batch_norm_act import batch_norm_act


def aggregate(
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
    residual: bool = False,
    act: ActSpec = "relu",
) -> Tensor:
    """The aggregation node of Deep Layer Aggregation (Yu et al., CVPR 2018, eq. 2) in plain PyTorch.

    Same arguments as :func:`dla_fast.functional.aggregate`.
    """
    z = F.conv2d(torch.cat(list(xs), 1), weight, conv_bias)
    return batch_norm_act(
        z,
        bn_weight,
        bn_bias,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        residual=xs[0] if residual else None,
        act=act,
    )
