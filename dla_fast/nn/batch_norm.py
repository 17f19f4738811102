"""How ``nn.BatchNorm2d`` decides what a call normalises with, for modules that replace its forward."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def is_observed(module: nn.Module) -> bool:
    """Whether somebody watches or changes a module's calls, which a functional call in its place would not make."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def parameter(module: nn.Module, name: str) -> Any:
    """``getattr`` in a tenth of its time; the parameters of DataParallel's replicas are plain attributes."""
    return module._parameters[name] if name in module._parameters else getattr(module, name)


def is_plain(bn: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether ``bn`` may be replaced by a functional call: a batch norm itself, with no hook that would be missed.

    A SyncBatchNorm or an Identity put in its place later (conversion, folding) has to run as the module it is.
    """
    return type(bn) is nn.BatchNorm2d and not is_observed(bn)


def batch_norm_arguments(bn: _NormBase) -> dict[str, Any]:
    """The keyword arguments a functional norm call needs, following ``nn.BatchNorm2d.forward`` to the letter.

    ``bn.training`` decides, not a parent's flag. Writes nothing: call :func:`count_batch` once the call has succeeded.
    """
    momentum = 0.0 if bn.momentum is None else bn.momentum
    tracking = bn.training and bn.track_running_stats
    if bn.momentum is None and tracking and bn.num_batches_tracked is not None:
        momentum = 1.0 / (float(bn.num_batches_tracked) + 1.0)
    keep = not bn.training or bn.track_running_stats
    return {
        "bn_weight": parameter(bn, "weight"),
        "bn_bias": parameter(bn, "bias"),
        "running_mean": bn.running_mean if keep else None,
        "running_var": bn.running_var if keep else None,
        "training": bn.training or (bn.running_mean is None and bn.running_var is None),
        "momentum": momentum,
        "eps": bn.eps,
    }


def count_batch(bn: _NormBase) -> None:
    """Count a training batch in ``num_batches_tracked``, as ``nn.BatchNorm2d.forward`` does."""
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
