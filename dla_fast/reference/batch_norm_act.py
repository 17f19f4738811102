"""Reference of the normalisation tail: batch norm, residual, activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dla_fast.reference.activation import ActSpec, activate
from dla_fast.reference.norm import Norm


def normalise(x: Tensor, norm: Norm, residual: Tensor | None, act: ActSpec) -> Tensor:
    """:func:`batch_norm_act` of a norm."""
    weight, bias, running_mean, running_var, training, momentum, eps = norm[:7]
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return activate(y, act)


def batch_norm_act(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: ActSpec = "relu",
) -> Tensor:
    """``act(batch_norm(x) + residual)`` in plain PyTorch.

    Same arguments as :func:`dla_fast.functional.batch_norm_act`. Running statistics are updated in place when
    ``training`` is true and they are given.
    """
    norm = Norm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    return normalise(x, norm, residual, act)
