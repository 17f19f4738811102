"""Argument checks of the functional API: they run before any work, so a call that raises has written nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dla_fast.reference.norm import Norm

_NORM = ("bn_weight", "bn_bias", "running_mean", "running_var")
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class MismatchError(ValueError, RuntimeError):
    """Sizes, channels, devices or options that do not fit, where PyTorch's own modules raise RuntimeError.

    Whoever catches that around a forward pass catches this too.
    """


class MismatchTypeError(TypeError, RuntimeError):
    """Dtypes that do not fit, where PyTorch's own modules raise RuntimeError."""


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def check_tensor(name: str, value: object, rank: int | None = None, kind: type[ValueError] = MismatchError) -> Tensor:
    """``value`` as a floating tensor of the given rank; ``kind`` is what another rank raises."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise MismatchTypeError(
            f"{name}: expected a floating dtype (float64, float32, float16, bfloat16), got {value.dtype}"
        )
    if rank is not None and value.dim() != rank:
        raise kind(f"{name}: expected {rank} dimensions, got shape {_shape(value)}")
    return value


def check_map(name: str, value: object) -> Tensor:
    """``value`` as a floating tensor (N, C, H, W) that a convolution reads; there may be no images in it."""
    x = check_tensor(name, value, rank=4)
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise MismatchError(f"{name}: expected a height and width >= 1, got shape {_shape(x)}")
    return x


def check_inputs(xs: object, name: str = "xs") -> list[Tensor]:
    """``xs`` as a non-empty list of floating (N, C, H, W) tensors."""
    if isinstance(xs, Tensor):
        raise TypeError(f"{name}: expected a sequence of tensors, got one tensor; pass [x]")
    if not isinstance(xs, Sequence):
        raise TypeError(f"{name}: expected a sequence of tensors, got {type(xs).__name__}")
    if len(xs) == 0:
        raise ValueError(f"{name}: expected at least one input, got none")
    return [check_map(f"{name}[{i}]", x) for i, x in enumerate(xs)]


def check_one_kind(xs: Sequence[Tensor], name: str = "xs") -> None:
    """Every input has the dtype and device of the first."""
    dtype, device = xs[0].dtype, xs[0].device
    for i, x in enumerate(xs):
        if x.dtype != dtype or x.device != device:
            check_same(f"{name}[{i}]", x, f"{name}[0]", xs[0])


def check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """``value`` has the dtype and device of ``other``."""
    if value.dtype != other.dtype:
        raise MismatchTypeError(f"{name}: expected {other.dtype} as {other_name} has, got {value.dtype}")
    if value.device != other.device:
        raise MismatchError(f"{name}: expected device {other.device} as {other_name} has, got {value.device}")


def check_same_size(xs: Sequence[Tensor], name: str = "xs") -> None:
    """Every input has the N, H and W of the first."""
    images, _, height, width = xs[0].shape
    for i, x in enumerate(xs):
        n, _, h, w = x.shape
        if n != images or h != height or w != width:
            want = f"({images}, C, {height}, {width})"
            raise MismatchError(f"{name}[{i}]: expected shape {want} as {name}[0] has, got {_shape(x)}")


def check_channels(name: str, xs: Sequence[object], channels: Sequence[int], source: str) -> None:
    """As many inputs as ``source`` lists, with its channels each; what is no map at all is told where it is used."""
    if len(xs) != len(channels):
        raise MismatchError(
            f"{name}: expected {len(channels)} tensors, as {source} {list(channels)} has, got {len(xs)}"
        )
    for i, (x, c) in enumerate(zip(xs, channels, strict=True)):
        if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] != c:
            raise MismatchError(f"{name}[{i}]: expected {c} channels ({source}[{i}]), got shape {_shape(x)}")


def check_weight(weight: object, xs: Sequence[Tensor], kernels: tuple[int, ...] | None, groups: int = 1) -> Tensor:
    """A weight (N, K / groups, k, k), K the sum of the inputs' channels, k one of ``kernels`` or any odd."""
    w = check_tensor("weight", weight, rank=4)
    outputs, depth, k, other_side = w.shape
    if outputs == 0:
        raise MismatchError(f"weight: expected one output channel or more, got shape {_shape(w)}")
    if k != other_side or (k % 2 == 0 if kernels is None else k not in kernels):
        allowed = "square, odd" if kernels is None else " or ".join(f"{i}x{i}" for i in kernels)
        raise ValueError(f"weight: expected a {allowed} kernel, got shape {_shape(w)}")
    channels = [x.shape[1] for x in xs]
    if depth * groups != sum(channels):
        total = " + ".join(map(str, channels))
        per_group = "" if groups == 1 else f" in {groups} groups"
        raise MismatchError(f"weight: expected {total} = {sum(channels)} input channels{per_group}, got {depth}")
    if groups > 1 and outputs % groups:
        raise MismatchError(f"weight: expected a multiple of {groups} groups of output channels, got {outputs}")
    check_same("weight", w, "xs[0]", xs[0])
    return w


def check_geometry(stride: object, dilation: object, groups: object) -> None:
    """A convolution's stride, dilation and groups: integers of at least 1."""
    for name, value in (("stride", stride), ("dilation", dilation), ("groups", groups)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer >= 1, got {value!r}")
        if value < 1:
            raise MismatchError(f"{name}: expected an integer >= 1, got {value}")


def check_residual_input(residual: object, xs: Sequence[Tensor], shape: Sequence[int]) -> int:
    """The index of the input that is a residual: it has exactly the output's shape, as it comes."""
    if isinstance(residual, bool) or not isinstance(residual, int):
        raise TypeError(f"residual: expected None, the index of an input or a tensor, got {residual!r}")
    if not 0 <= residual < len(xs):
        raise ValueError(f"residual: expected the index of one of {len(xs)} inputs or a tensor, got {residual}")
    x = xs[residual]
    if x.shape[1] != shape[1]:
        raise MismatchError(
            f"residual: expected xs[{residual}] to have the output's {shape[1]} channels, got {x.shape[1]}"
        )
    if tuple(x.shape) != tuple(shape):
        raise MismatchError(
            f"residual: expected xs[{residual}] to have the output's shape {tuple(shape)}, got {_shape(x)}"
        )
    return residual


def check_vector(name: str, value: object, channels: int, like: Tensor, *, norm: bool) -> None:
    """None, or a per-channel vector; a norm's may be float32 beside half-precision activations."""
    if value is None:
        return
    # What nearly every call has, at a fraction of the cost of finding out what else it may be.
    if (
        isinstance(value, Tensor)
        and value.dtype == like.dtype
        and value.shape == (channels,)
        and value.device == like.device
    ):
        return
    v = check_tensor(name, value)
    if v.shape != (channels,):
        raise MismatchError(f"{name}: expected shape ({channels},), got {_shape(v)}")
    if v.dtype != like.dtype:
        half = norm and like.dtype in (torch.float16, torch.bfloat16)
        if not half or v.dtype != torch.float32:
            want = f"{like.dtype} or torch.float32" if half else str(like.dtype)
            raise MismatchTypeError(f"{name}: expected {want} beside {like.dtype} activations, got {v.dtype}")
    if v.device != like.device:
        raise MismatchError(f"{name}: expected device {like.device} as the activations have, got {v.device}")


def check_norm(norm: Norm, *, channels: int, like: Tensor, values_per_channel: int) -> None:
    """A norm for ``channels`` channels of activations like ``like``."""
    try:
        _check_norm(norm, channels, like, values_per_channel)
    except (ValueError, TypeError):
        # nn.BatchNorm2d has counted a batch by the time that it refuses it.
        if norm.batches is not None:
            norm.batches.add_(1)
        raise


def _check_norm(norm: Norm, channels: int, like: Tensor, values_per_channel: int) -> None:
    weight, bias, running_mean, running_var, training, _, eps, group, _ = norm
    # aten takes a norm's tensors in one dtype only.
    first: tuple[str, Tensor] | None = None
    for name, t in zip(_NORM, (weight, bias, running_mean, running_var), strict=True):
        if t is None:
            continue
        check_vector(name, t, channels, like, norm=True)
        if first is None:
            first = (name, t)
        elif t.dtype != first[1].dtype:
            raise MismatchTypeError(f"{name}: expected {first[1].dtype} as {first[0]} has, got {t.dtype}")
    if (running_mean is None) != (running_var is None):
        given, absent = ("running_mean", "running_var") if running_var is None else ("running_var", "running_mean")
        kind = ValueError if training else MismatchError
        raise kind(f"{absent}: expected a tensor because {given} is given, got None")
    if not training and running_mean is None:
        raise MismatchError("running_mean: expected a tensor when training is false, got None")
    # Of several processes one may have a single value, or none.
    if training and values_per_channel == 1 and group is None:
        raise ValueError(
            "xs: expected more than 1 value per channel when training, "
            f"got {values_per_channel} (N * H * W); use a larger batch or evaluation mode"
        )
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    if eps == 0 and _refuses_zero(training):
        raise ValueError(f"eps: expected a number > 0{' when training' if training else ''}, got {eps!r}")


def _refuses_zero(training: bool) -> bool:
    """Whether this PyTorch's batch norm refuses an eps of 0: in training since 2.13, and before in evaluation too."""
    some = torch.ones(2, 1)
    try:
        torch.nn.functional.batch_norm(some, some[0].clone(), some[0].clone(), training=training, eps=0.0)
    except ValueError:
        return True
    return False


# A constant to torch.compile, as torch.compiler.assume_constant_result would have it at the price of an import.
_refuses_zero._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_residual(residual: Tensor, shape: Sequence[int], like: Tensor, name: str = "residual") -> None:
    """A residual has exactly the shape, dtype and device of what it is added to."""
    r = check_tensor(name, residual, rank=4)
    if tuple(r.shape) != tuple(shape):
        raise MismatchError(f"{name}: expected shape {tuple(shape)}, got {_shape(r)}")
    check_same(name, r, "x", like)


def check_factor(factor: object, name: str = "factor") -> int:
    """An upsampling factor: an integer of at least 2."""
    if isinstance(factor, bool) or not isinstance(factor, int):
        raise TypeError(f"{name}: expected an integer >= 2, got {factor!r}")
    if factor < 2:
        raise ValueError(f"{name}: expected an integer >= 2, got {factor}")
    return factor


def upsampled(size: int, factor: int) -> int:
    """The side of a map after :func:`dla_fast.functional.upsample`."""
    return (size - 1) * factor - 2 * (factor // 2) + 2 * factor


def convolved(size: int, kernel: int, stride: int, dilation: int) -> int:
    """The side of a map after a convolution whose padding is ``dilation * (kernel // 2)``."""
    return (size + 2 * dilation * (kernel // 2) - dilation * (kernel - 1) - 1) // stride + 1


def check_up_weight(name: str, weight: object, x: Tensor, factor: int) -> None:
    """A depthwise up-convolution weight (C, 1, 2f, 2f) for ``x``."""
    w = check_tensor(name, weight, rank=4)
    want = (x.shape[1], 1, 2 * factor, 2 * factor)
    if tuple(w.shape) != want:
        raise MismatchError(f"{name}: expected shape {want} for factor {factor}, got {_shape(w)}")
    check_same(name, w, "x", x)


Upsampling = Sequence[tuple[Tensor, int] | None]


def check_upsampling(upsample: Upsampling, xs: Sequence[Tensor], cast: Callable[[list[Any]], list[Any]]) -> Upsampling:
    """Per input None or a pair of an up-weight, cast as the inputs were, and a factor."""
    if len(upsample) != len(xs):
        raise ValueError(f"upsample: expected one entry per input ({len(xs)}), got {len(upsample)}")
    found: list[tuple[Tensor, int] | None] = []
    for i, (x, up) in enumerate(zip(xs, upsample, strict=True)):
        if up is not None:
            if not isinstance(up, tuple) or len(up) != 2:
                raise TypeError(f"upsample[{i}]: expected None or (up_weight, factor), got {up!r}")
            factor = check_factor(up[1], f"upsample[{i}] factor")
            (up_weight,) = cast([up[0]])
            check_up_weight(f"upsample[{i}] weight", up_weight, x, factor)
            up = (up_weight, factor)
        found.append(up)
    return found


def check_same_size_upsampled(xs: Sequence[Tensor], upsample: Upsampling) -> tuple[int, int]:
    """Height and width of every input after upsampling, which are the first's, as N is."""
    first: tuple[int, int, int] | None = None
    for i, (x, up) in enumerate(zip(xs, upsample, strict=True)):
        images, _, height, width = x.shape
        if up is not None:
            height, width = upsampled(height, up[1]), upsampled(width, up[1])
        first = first or (images, height, width)
        if (images, height, width) != first:
            raise MismatchError(
                f"xs[{i}]: expected (N, H, W) = {first} after upsampling as xs[0] has, got {(images, height, width)}"
            )
    assert first is not None
    return first[1:]
