"""Confirm by running that a module computes what its structure says.

Two comparisons of the original forward with the fused call, on independent copies of the module with random parameters
(a zero in a fresh residual branch hides what lies behind it) and without its hooks:

- *what it is*: in float64 on the CPU, on the reference, with gradients and buffers, to 1e-6. It does not depend on the
  model's dtype or device, so it also serves models on the meta device.
- *that it runs*: in the module's own dtype on its own device, on the backend that will serve it, outputs and buffers to
  the few digits of that dtype. Left out on the meta device, where nothing can be computed.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast import backend
from dla_fast.swap.nodes import AggregateSpec, run_fused
from dla_fast.swap.processes import local

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}

Call = Callable[[nn.Module, Sequence[Any]], Any]


def _random(like: Tensor, name: str, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random values of the shape of a parameter or buffer, signed, of a size that keeps activations near one."""
    value = torch.rand(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    if name.endswith("running_var"):
        value = value + 0.5
    else:
        value = (2 * value - 1) * (1.0 if like.dim() < 2 else 3.0 / math.sqrt(max(1, like[0].numel())))
    return value.to(device, dtype)


def random_copy(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None, generator: torch.Generator
) -> nn.Module:
    """A copy of a module that shares nothing with it, has random parameters, and no hooks anywhere.

    ``dtype`` None keeps every tensor's.
    """
    memo: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        memo[id(parameter)] = nn.Parameter(_random(parameter, name, device, dtype or parameter.dtype, generator))
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            memo[id(buffer)] = _random(buffer, name, device, dtype or buffer.dtype, generator)
        else:
            memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    # Hooks are not copied: they may hold on to a whole model, or to activations, which cannot be copied.
    for part in module.modules():
        memo.update({id(v): type(v)() for k, v in part.__dict__.items() if "_hooks" in k})
        if isinstance(part, nn.SyncBatchNorm) and part.process_group is not None:
            memo[id(part.process_group)] = None
    return local(copy.deepcopy(module, memo))


def set_training(module: nn.Module, mode: bool) -> None:
    """Put a module and all its children into one mode."""
    for child in module.modules():
        child.training = mode


def _outcome(
    call: Call, module: nn.Module, xs: Sequence[Tensor | None], generator: torch.Generator, gradients: bool
) -> dict[str, Tensor]:
    """Everything a call gives or changes."""
    given = [None if x is None else x.clone().requires_grad_(gradients) for x in xs]
    leaves = [x for x in given if x is not None]
    y = call(module, given)
    if not isinstance(y, Tensor):
        raise TypeError(f"forward gave a {type(y).__name__}, not a tensor")
    result = {"outputs": y.detach()}
    if gradients:
        named = dict(module.named_parameters())
        names, parameters = named.keys(), named.values()
        dy = torch.rand(y.shape, generator=generator, dtype=y.dtype, device="cpu").to(y.device)
        # A shortcut that was given leaves out the child that would have made one.
        grads = torch.autograd.grad(y, [*leaves, *parameters], dy, allow_unused=True, materialize_grads=True)
        wanted = [*(f"input {i}" for i in range(len(leaves))), *names]
        result |= {f"gradients of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    result |= {f"values of input {i} after the call": x.detach() for i, x in enumerate(leaves)}
    return result | {f"values of {name} after the call": value.detach() for name, value in module.named_buffers()}


def difference(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> str | None:
    """The first of the named tensors that differs by more, in words."""
    for name, expected in want.items():
        if name not in got:
            return f"{name}: missing"
        value = got[name]
        if value.shape != expected.shape or value.dtype != expected.dtype:
            return f"{name}: {value.dtype} {tuple(value.shape)} fused, {expected.dtype} {tuple(expected.shape)} before"
        if expected.numel() == 0:
            continue
        wide, other = expected.double().cpu(), value.double().cpu()
        # The gradient of a bias before a batch norm is truly zero: rounding, not to be compared with itself.
        error = float((other - wide).abs().max() / wide.abs().max().clamp_min(1e-6))
        if not error <= tolerance:
            return f"{name} differ by {error:.1e}"
    return None


@contextlib.contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Leave the random state alone, and let no mode of the caller reach the comparison."""
    cuda_like = device.type not in ("cpu", "meta")
    with (
        torch.random.fork_rng([device] if cuda_like else [], device_type=device.type if cuda_like else "cuda"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False) if cuda_like else contextlib.nullcontext(),
    ):
        yield


def _splits(spec: AggregateSpec, channels: int, outputs: int) -> list[list[int]]:
    """Two ways to split the input channels, into different numbers of inputs."""
    first = outputs if spec.residual else max(1, channels // 2)
    rest = channels - first
    two = [first, rest] if rest else [first]
    three = [first, rest // 3, rest - rest // 3] if rest >= 2 else two
    return [three, two]


def verify_aggregate(module: nn.Module, spec: AggregateSpec) -> str | None:
    """Compare an aggregation node's own forward with the fused call, in evaluation and in training mode.

    Args:
        module: a node that matched ``spec``, not yet swapped; it stays as it is.
        spec: what was found out about it.

    Returns:
        None when they agree, else in words what differs.
    """
    conv: Any = module._modules["conv"]

    def original(m: nn.Module, xs: Sequence[Tensor]) -> Any:
        return m.forward(list(xs)) if spec.takes_list else m.forward(*xs)

    def fused(m: nn.Module, xs: Sequence[Tensor], name: str) -> Any:
        return run_fused(m, replace(spec, backend=name), xs)

    splits = _splits(spec, conv.in_channels, conv.out_channels)
    cases = [
        Case(training, [(2, c, *size) for c in split])
        for training, size, split in zip((False, True), ((3, 2), (2, 3)), splits, strict=True)
    ]
    return compare(module, conv.weight, cases, original, fused, spec.backend)


@dataclass(frozen=True)
class Case:
    """One run of a comparison: the mode, and the shapes of the inputs, None for one that is not given."""

    training: bool
    shapes: Sequence[Sequence[int] | None]


def input_shape(convs: Sequence[nn.Conv2d]) -> tuple[int, int, int, int]:
    """A small shape from which convolutions in a row make at least three by two pixels, in whole steps of strides."""
    sides = [3, 2]
    for conv in reversed(convs):
        for axis in (0, 1):
            k, s, d, p = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis], conv.padding
            pixels = p[axis] if not isinstance(p, str) else 0 if p == "valid" else d * (k - 1) // 2
            needed = (sides[axis] - 1) * s + d * (k - 1) + 1 - 2 * pixels
            sides[axis] = max(sides[axis] * s, needed, pixels + 1 if conv.padding_mode != "zeros" else 0)
    return 2, convs[0].in_channels, sides[0], sides[1]


def compare(
    module: nn.Module,
    weight: Tensor,
    cases: Sequence[Case],
    original: Call,
    fused: Callable[[nn.Module, Sequence[Any], str], Any],
    forced: str,
) -> str | None:
    """Run a module's own forward and the fused call on the same random inputs and on copies with the same parameters.

    Args:
        module: not yet swapped; it stays as it is.
        weight: what tells its device and dtype.
        cases: what is run.
        original: its own forward on the inputs of a case.
        fused: the fused call on them, on a backend that it is forced to, or "auto".
        forced: the backend that will serve it, or "auto".

    Returns:
        None when they agree, else in words what differs, or what was raised.
    """
    device, dtype = weight.device, weight.dtype
    generator = torch.Generator().manual_seed(0)
    given = tuple((case.training, *(shape is None for shape in case.shapes)) for case in cases)

    def differ(where: torch.device, kind: torch.dtype, exact: bool) -> str | None:
        base = random_copy(module, where, kind if exact else None, generator)
        name = "auto" if exact else forced
        calls: tuple[Call, Call] = (original, lambda m, xs: fused(m, xs, name))
        for case in cases:
            xs: list[Tensor | None] = [
                None if shape is None else (torch.rand(tuple(shape), generator=generator, dtype=kind) * 2 - 1).to(where)
                for shape in case.shapes
            ]
            results = []
            for call in calls:
                probe = copy.deepcopy(base)
                set_training(probe, case.training)
                with torch.set_grad_enabled(exact or case.training):
                    results.append(_outcome(call, probe, xs, torch.Generator().manual_seed(1), exact))
            found = difference(results[1], results[0], TOLERANCE[kind])
            if found is not None:
                return f"{found} in {'training' if case.training else 'evaluation'} mode"
        return None

    def once(where: torch.device, kind: torch.dtype, exact: bool) -> str | None:
        """Not again what has agreed already: what a module is does not depend on its width, that it runs does."""
        same = signature(module, widths=not exact)
        key = (same, given, where, kind, exact, forced)
        known = _agreed.get()
        if same is not None and known is not None and key in known:
            return None
        found = differ(where, kind, exact)
        if found is None and known is not None:
            known.add(key)
        return found

    try:
        with isolated(device):
            with backend.use_backend("reference"):
                found = once(torch.device("cpu"), torch.float64, exact=True)
            if found is None and device.type != "meta":
                found = once(device, dtype, exact=False)
    except Exception as error:  # whatever a foreign forward raises is a reason, not a failure of the swap
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found


# Comparisons that agreed, by what was compared; None outside of a swap.
_agreed: ContextVar[set[Any] | None] = ContextVar("agreed", default=None)
INTERNAL = frozenset(nn.Module().__dict__)
_WIDTHS = {
    nn.Conv2d: ("in_channels", "out_channels"),
    nn.BatchNorm2d: ("num_features",),
    nn.SyncBatchNorm: ("num_features",),
}


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Compare modules of one structure once: a network repeats its blocks."""
    token = _agreed.set(set())
    try:
        yield
    finally:
        _agreed.reset(token)


def signature(module: nn.Module, widths: bool) -> Any:
    """All that its forward can depend on but values: classes, attributes, dtypes, and shapes where ``widths``.

    None where an attribute is more than a number, a string, or a sequence of those.
    """
    parts: list[Any] = [type(module).forward]
    for name, part in module.named_modules(remove_duplicate=False):
        parts += [name, type(part), *((key, child is None) for key, child in part._modules.items())]
        hidden = () if widths else _WIDTHS.get(type(part), ())
        for key, value in part.__dict__.items():
            if key in INTERNAL or key in hidden:
                continue
            simple = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if not all(v is None or type(v) in (bool, int, float, str) for v in simple):
                return None
            parts += [key, type(value), simple]
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        parts += [name, tensor.dtype, tensor.device, tuple(tensor.shape) if widths else tensor.dim()]
    return tuple(parts)
