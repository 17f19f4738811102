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
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast import backend
from dla_fast.swap.nodes import AggregateSpec, run_fused

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}

Call = Callable[[nn.Module, Sequence[Tensor]], Any]


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
    """A copy of a module that shares nothing with it, has random parameters and no hooks of its own.

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
    bare = object.__new__(type(module))
    # Hooks are not copied: they may hold on to a whole model, or to activations, which cannot be copied.
    bare.__dict__.update({k: type(v)() if "_hooks" in k else v for k, v in module.__dict__.items()})
    return copy.deepcopy(bare, memo)


def set_training(module: nn.Module, mode: bool) -> None:
    """Put a module and all its children into one mode."""
    for child in module.modules():
        child.training = mode


def _outcome(
    call: Call, module: nn.Module, xs: Sequence[Tensor], generator: torch.Generator, gradients: bool
) -> dict[str, Tensor]:
    """Everything a call gives or changes."""
    leaves = [x.clone().requires_grad_(gradients) for x in xs]
    y = call(module, leaves)
    if not isinstance(y, Tensor):
        raise TypeError(f"forward gave a {type(y).__name__}, not a tensor")
    result = {"outputs": y.detach()}
    if gradients:
        names, parameters = zip(*module.named_parameters(), strict=True)
        dy = torch.rand(y.shape, generator=generator, dtype=y.dtype, device="cpu").to(y.device)
        grads = torch.autograd.grad(y, [*leaves, *parameters], dy)
        wanted = [*(f"input {i}" for i in range(len(xs))), *names]
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
        error = float((other - wide).abs().max() / wide.abs().max().clamp_min(1e-30))
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
    device, dtype = conv.weight.device, conv.weight.dtype
    generator = torch.Generator().manual_seed(0)

    def original(m: nn.Module, xs: Sequence[Tensor]) -> Any:
        return m.forward(list(xs)) if spec.takes_list else m.forward(*xs)

    def fused(m: nn.Module, xs: Sequence[Tensor]) -> Any:
        return run_fused(m, spec, xs)

    def compare(where: torch.device, kind: torch.dtype, exact: bool) -> str | None:
        base = random_copy(module, where, kind if exact else None, generator)
        for training, split in zip((False, True), _splits(spec, conv.in_channels, conv.out_channels), strict=True):
            size = (2, 3) if training else (3, 2)
            xs = [torch.rand((2, c, *size), generator=generator, dtype=kind) * 2 - 1 for c in split]
            xs = [x.to(where) for x in xs]
            results = []
            for call in (original, fused):
                probe = copy.deepcopy(base)
                set_training(probe, training)
                with torch.set_grad_enabled(exact or training):
                    results.append(_outcome(call, probe, xs, torch.Generator().manual_seed(1), exact))
            found = difference(results[1], results[0], TOLERANCE[kind])
            if found is not None:
                return f"{found} in {'training' if training else 'evaluation'} mode"
        return None

    try:
        with isolated(device):
            with backend.use_backend("reference"):
                found = compare(torch.device("cpu"), torch.float64, exact=True)
            if found is None and device.type != "meta":
                found = compare(device, dtype, exact=False)
    except Exception as error:  # whatever a foreign forward raises is a reason, not a failure of the swap
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return found
