"""Batch norm, residual and activation as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dla_fast import functional
from dla_fast.nn.batch_norm import is_plain, norm_of
from dla_fast.reference.activation import ActSpec, activate, parse_act


def run_batch_norm_act(x: Tensor, bn: nn.Module, residual: Tensor | None = None, act: ActSpec = "relu") -> Tensor:
    """``act(bn(x) + residual)`` on the parameters of a batch norm."""
    if residual is not None and residual.dtype != x.dtype:
        # Autocast: the convolution before the norm has cast, a residual that comes from outside has not been.
        residual = residual.to(x.dtype)
    if not is_plain(bn):
        y = bn(x)
        return activate(y if residual is None else y + residual, act)
    return functional.run_norm(x, norm_of(bn), residual, act)


class BatchNormAct2d(_NormBase):
    """``act(batch_norm(x) + residual)``.

    State dict keys and arguments are those of :class:`torch.nn.BatchNorm2d`. It is not one, though:
    ``SyncBatchNorm.convert_sync_batchnorm`` would make a norm of it that has forgotten the activation.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for their cumulative average.
        affine: whether there is a scale and a shift.
        track_running_stats: whether running statistics are kept.
        act: "relu", "identity", "silu", "leaky_relu", "hardswish", or ("leaky_relu", slope).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: unknown activation; in ``forward`` shapes that do not fit.

    Shape:
        ``forward(x, residual=None)``: both (N, C, H, W), like the output.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        act: ActSpec = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        parse_act(act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return functional.run_norm(x, norm_of(self), residual, self.act)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}"
