"""How ``nn.BatchNorm2d`` decides what a call normalises with, for modules that replace its forward."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dla_fast.backend import needs_reference
from dla_fast.nn import stock
from dla_fast.reference.norm import Norm


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


def buffer(module: nn.Module, name: str) -> Any:
    """:func:`parameter`, of a buffer."""
    return module._buffers[name] if name in module._buffers else getattr(module, name)


def is_plain(bn: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether ``bn`` may be replaced by a functional call: a batch norm in effect, with no hook that would be missed.

    An Identity put in its place later (folding) has to run as the module it is.
    """
    if type(bn) is nn.SyncBatchNorm:
        known = is_plain_sync(bn)
    else:
        known = type(bn) is nn.BatchNorm2d or stock.kind(bn) in stock.NORMS
    return known and not is_observed(bn)


def is_plain_sync(bn: nn.Module) -> bool:
    """Whether ``bn`` is a SyncBatchNorm itself, in a call that this package can answer.

    In training it runs as the module it is where calls are compiled or taken apart: only PyTorch knows there how other
    processes are asked.
    """
    if type(bn) is not nn.SyncBatchNorm:
        return False
    return not bn.training or not (torch.compiler.is_compiling() or needs_reference())


def sync_group(bn: nn.Module) -> Any:
    """The process group whose processes' values are the batch of a call of ``bn``, None where it has its own alone.

    As ``nn.SyncBatchNorm.forward`` decides it, which refuses tensors on a CPU.
    """
    if type(bn) is not nn.SyncBatchNorm or not bn.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def trains(bn: nn.Module) -> bool:
    """Whether a norm is in training mode, and has one: the norm of four buffers has not."""
    return bn.training and not is_frozen(bn)


def is_frozen(bn: nn.Module) -> bool:
    """Whether a norm is nothing but four buffers."""
    return not isinstance(bn, _NormBase) and stock.kind(bn) in stock.FROZEN


def norm_of(bn: Any) -> Norm:
    """What a call of ``bn`` normalises with, following ``nn.BatchNorm2d.forward`` or SyncBatchNorm's to the letter.

    ``bn.training`` decides, not a parent's flag. Writes nothing: the call of the norm counts the batch.
    """
    if is_frozen(bn):
        held = bn._buffers
        return Norm(held["weight"], held["bias"], held["running_mean"], held["running_var"], False, 0.0, bn.eps)
    training, tracks, momentum = bn.training, bn.track_running_stats, bn.momentum
    batches = buffer(bn, "num_batches_tracked") if training and tracks else None
    mean, var = buffer(bn, "running_mean"), buffer(bn, "running_var")
    if momentum is None:
        momentum = 0.0 if batches is None else 1.0 / (float(batches) + 1.0)
    batch = training or (mean is None and var is None)
    if training and not tracks:
        mean = var = None
    weight, bias = parameter(bn, "weight"), parameter(bn, "bias")
    return Norm(weight, bias, mean, var, batch, momentum, bn.eps, sync_group(bn), batches)
