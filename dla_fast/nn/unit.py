"""The one door through which every convolution-norm-activation unit of modules and swapped models runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dla_fast import functional
from dla_fast.checks import Upsampling
from dla_fast.nn.batch_norm import is_plain, norm_of, parameter, trains
from dla_fast.nn.batch_norm_act import run_batch_norm_act
from dla_fast.nn.conv import is_plain_conv
from dla_fast.nn.frozen import KEY, Frozen
from dla_fast.nn.memory import LOW
from dla_fast.ops import chain
from dla_fast.ops.ending import Ending
from dla_fast.reference.activation import ActSpec


def run_unit(
    xs: Sequence[Tensor | Ending],
    conv: nn.Module,
    bn: nn.Module,
    *,
    act: ActSpec = "relu",
    residual: int | Tensor | None = None,
    upsample: Upsampling | None = None,
    carried: bool = False,
) -> Tensor:
    """``act(bn(conv(cat(xs))) + residual)``, on the parameters of a convolution and a batch norm.

    Fused where the children are an nn.Conv2d of the usual kind and an nn.BatchNorm2d or nn.SyncBatchNorm. What has
    become something else (a folded norm), has other options or is watched by hooks runs as the module it is. A unit
    that :func:`dla_fast.freeze_` has frozen runs from what is kept of it, where the call is one of inference. All
    processes of a SyncBatchNorm's group have to call it in training, and to differentiate it or not.

    Args:
        xs: inputs (N, C_i, H_i, W_i); those to be upsampled are still low-resolution. One that :func:`run_deferred`
            has given is normalised while it is read.
        conv: over the inputs' concatenation.
        bn: behind it.
        act: as in :func:`dla_fast.functional.conv_norm_act`.
        residual: None, the index of an input, or a tensor of the output's shape; one of another dtype (autocast casts
            what a convolution reads, and not what comes from outside) is cast.
        upsample: per input None or ``(up_weight, factor)``.
        carried: ``residual`` is what the first unit of a chain of :func:`run_deferred` that ends here has read.

    Returns:
        (N, C_out, H', W').
    """
    frozen: Frozen | None = None if torch.compiler.is_compiling() else conv.__dict__.get(KEY)
    if frozen is not None and upsample is None and not bn.training:
        maps = _maps(xs)
        y = frozen.recall(maps, conv, bn, act, residual)
        if y is not None:
            return y
        xs = maps
    if not is_plain(bn) or not is_plain_conv(conv):
        return _op_by_op(_maps(xs), conv, bn, act, residual, upsample)
    return run_plain_unit(xs, conv, bn, act, residual, upsample, carried)


def run_deferred(
    xs: Sequence[Tensor | Ending],
    conv: nn.Module,
    bn: nn.Module,
    *,
    act: ActSpec = "relu",
    residual: Tensor | None = None,
    carries: bool = False,
    carried: bool = False,
) -> Tensor | Ending:
    """:func:`run_unit` for whoever hands the output to one other unit alone, which normalises it while it reads it.

    Where nothing is gained by that, or somebody has to see the output, it is a map. ``carries``: the only input is
    added at the end of the chain that begins here, and its gradient from there is added where this unit's is made.
    """
    if not trains(bn) or not is_plain(bn) or not is_plain_conv(conv) or torch.compiler.is_compiling():
        return run_unit(xs, conv, bn, act=act, residual=residual)
    return _run_link(xs, conv, bn, act, residual, None, deferred=True, carries=carries, carried=carried)


def _maps(xs: Sequence[Tensor | Ending], but: int = -1) -> Sequence[Tensor]:
    """The inputs as maps, all but one of them."""
    if Ending not in map(type, xs):
        return cast(Sequence[Tensor], xs)
    return [chain.form(x) if type(x) is Ending and i != but else cast(Tensor, x) for i, x in enumerate(xs)]


def run_plain_unit(
    xs: Sequence[Tensor | Ending],
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    act: ActSpec,
    residual: int | Tensor | None = None,
    upsample: Upsampling | None = None,
    carried: bool = False,
) -> Tensor:
    """:func:`run_unit` where the children are known to be :func:`is_plain_conv` and :func:`is_plain`."""
    y = _run_link(xs, conv, bn, act, residual, upsample, deferred=False, carried=carried)
    assert not isinstance(y, Ending)
    return y


def _run_link(
    given: Sequence[Tensor | Ending],
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    act: ActSpec,
    residual: int | Tensor | None,
    upsample: Upsampling | None,
    *,
    deferred: bool,
    carries: bool = False,
    carried: bool = False,
) -> Tensor | Ending:
    first, ending, xs = -1, None, cast(Sequence[Tensor], given)
    if Ending in map(type, given):
        first = next(i for i, x in enumerate(given) if type(x) is Ending)
        ending = cast(Ending, given[first])
        xs = [ending.z if i == first else x for i, x in enumerate(_maps(given, first))]
    if isinstance(residual, Tensor) and residual.dtype != xs[0].dtype:
        residual = residual.to(xs[0].dtype)
    frozen: Frozen | None = None if torch.compiler.is_compiling() else conv.__dict__.get(KEY)
    if frozen is not None and bn.training:
        frozen.forget()
    elif frozen is not None and ending is None:
        y = frozen.run(xs, conv, bn, act, residual, upsample)
        if y is not None:
            return y
    return functional.run_link(
        "conv_norm_act", xs, parameter(conv, "weight"), norm_of(bn), None, parameter(conv, "bias"), conv.stride[0],
        conv.dilation[0], conv.groups, residual, upsample, act, first, ending, deferred, carries,
        carried, LOW in conv.__dict__,
    )  # fmt: skip


def _op_by_op(
    xs: Sequence[Tensor],
    conv: nn.Module,
    bn: nn.Module,
    act: ActSpec,
    residual: int | Tensor | None,
    upsample: Upsampling | None,
) -> Tensor:
    """Each child called as a module, the norm where it is plain fused with what is behind it."""
    full = list(xs)
    if upsample is not None:
        full = [x if up is None else functional.upsample(x, *up) for x, up in zip(xs, upsample, strict=True)]
    added = xs[residual] if isinstance(residual, int) else residual
    return run_batch_norm_act(conv(full[0] if len(full) == 1 else torch.cat(full, 1)), bn, added, act)
