"""Confirm by running that a module computes what its structure says.

Two comparisons of the original forward with the fused call, on independent copies of the module with random parameters
(a zero in a fresh residual branch hides what lies behind it) and without its hooks:

- *what it is*: in float64 on the CPU, on the reference, outputs to 1e-9, gradients and buffers to 1e-6; what a call
  keeps, draws or writes to beside them has to be the same. It does not depend on the model's dtype or device, so it
  also serves models on the meta device. A forward that can do nothing but what a short run shows
  (:mod:`dla_fast.swap.known`) gets one, any other is tried at length (:mod:`dla_fast.swap.probe`), and in other dtypes.
- *that it runs*: in the module's own dtype on its own device, on the backend that will serve it, outputs and buffers to
  the few digits of that dtype. Left out on the meta device, where nothing can be computed.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dla_fast import backend
from dla_fast.swap.agreed import once
from dla_fast.swap.kept import RandomState, kept
from dla_fast.swap.known import is_known
from dla_fast.swap.nodes import MAX_INPUTS, AggregateSpec, can_fuse, run_fused
from dla_fast.swap.probe import Call, Case, Outcome, Shapes, brief, observe, set_mode, thorough
from dla_fast.swap.processes import local

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# Batch, height and width of what a forward is tried on at length.
SIZES = (
    (2, 2, 3), (1, 1, 1), (2, 1, 1), (3, 2, 2), (1, 7, 5), (2, 8, 8), (5, 4, 3), (1, 16, 16), (1, 130, 1), (1, 1, 130),
    (1, 33, 20), (1, 64, 64),
)  # fmt: skip


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


def difference(
    got: dict[str, Tensor],
    want: dict[str, Tensor],
    tolerance: float,
    outputs: float | None = None,
    special: bool = False,
) -> str | None:
    """The first of the named tensors that differs by more, in words.

    Args:
        got: what was computed, by name.
        want: what it should be.
        tolerance: the largest error, relative to the largest value.
        outputs: another for the outputs.
        special: NaN and infinities are equal to themselves; else a NaN differs from everything.
    """
    for name, expected in want.items():
        if name not in got:
            return f"{name}: missing"
        value = got[name]
        if value is expected:
            continue
        if value.shape != expected.shape or value.dtype != expected.dtype:
            return f"{name}: {value.dtype} {tuple(value.shape)} fused, {expected.dtype} {tuple(expected.shape)} before"
        if expected.numel() == 0 or (not special and torch.equal(value, expected)):
            continue
        wide, other = expected.double().cpu(), value.double().cpu()
        if special:
            finite = wide.isfinite()
            same = (wide == other) | (wide.isnan() & other.isnan())
            if not bool((same | (finite & other.isfinite())).all()):
                return f"{name}: NaN or infinity elsewhere"
            wide, other = wide.where(finite, torch.zeros(())), other.where(finite, torch.zeros(()))
        # The gradient of a bias before a batch norm is truly zero: rounding, not to be compared with itself.
        error = float((other - wide).abs().max() / wide.abs().max().clamp_min(1e-6))
        limit = outputs if outputs is not None and name.startswith(("outputs", "items")) else tolerance
        if not error <= limit:
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
        state = RandomState()
        try:
            yield
        finally:
            state.restore()


def _splits(spec: AggregateSpec, channels: int, outputs: int) -> dict[int, list[int]]:
    """A way to split the input channels for each number of inputs that a fused call takes."""
    first = outputs if spec.residual else 0
    found = {}
    for count in range(1, MAX_INPUTS + 1):
        rest = channels - first
        parts = count - 1 if spec.residual else count
        if rest < parts or (parts == 0 and rest):
            continue
        sizes = [rest // parts] * (parts - 1) if parts else []
        split = [first] if spec.residual else []
        found[count] = [*split, *sizes, *([rest - sum(sizes)] if parts else [])]
    return found


def _uneven(split: list[int], spec: AggregateSpec) -> list[int]:
    """The same number of inputs, all but the last as narrow as they can be."""
    head, rest = (split[:1], split[1:]) if spec.residual else ([], split)
    return [*head, *([1] * (len(rest) - 1)), *([sum(rest) - len(rest) + 1] if rest else [])]


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
        return m.forward(xs) if spec.takes_list else m.forward(*xs)

    def fused(m: nn.Module, xs: Sequence[Tensor], name: str) -> Any:
        return run_fused(m, replace(spec, backend=name), xs)

    splits = _splits(spec, conv.in_channels, conv.out_channels)
    two, three = (splits.get(n, next(iter(splits.values()))) for n in (2, 3))
    cases = [
        Case(training, [(2, c, *size) for c in split])
        for training, size, split in ((False, (3, 2), three), (True, (2, 3), two))
    ]
    shapes = [[(2, c, 3, 2) for c in split] for split in (three, *splits.values())]
    shapes += [[(2, c, 2, 3) for c in _uneven(split, spec)] for split in splits.values()]
    shapes += [[(n, c, h, w) for c in split] for i, (n, h, w) in enumerate(SIZES) for split in [(two, three)[i % 2]]]
    fits = lambda m, xs: can_fuse(m, spec, xs)  # noqa: E731
    return compare(module, conv.weight, cases, original, fused, spec.backend, shapes=shapes, fits=fits)


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


def sizes(convs: Sequence[nn.Conv2d]) -> list[tuple[int, int, int, int]]:
    """More input shapes for convolutions in a row, in which strides need not come out even; some may leave no pixel."""
    channels, height, width = input_shape(convs)[1:]
    larger = [(n, height - 3 + h, width - 2 + w) for n, h, w in SIZES]
    return [(n, channels, h, w) for n, h, w in dict.fromkeys([*larger, *SIZES])]


def compare(
    module: nn.Module,
    weight: Tensor,
    cases: Sequence[Case],
    original: Call,
    fused: Callable[[nn.Module, Any, str], Any],
    forced: str,
    *,
    shapes: Sequence[Shapes] = (),
    fits: Callable[[nn.Module, Any], bool] | None = None,
) -> str | None:
    """Run a module's own forward and the fused call on the same random inputs and on copies with the same parameters.

    Outputs, gradients, buffers, inputs and the list that they are given in are compared, and neither call may change
    anything else that the module keeps. A forward that :func:`dla_fast.swap.known.is_known` knows is run on ``cases``;
    any other at length, on other values, sizes, modes and dtypes as well.

    Args:
        module: not yet swapped; it stays as it is.
        weight: what tells its device and dtype.
        cases: what is run.
        original: its own forward on the inputs of a case. It may give tensors in lists, tuples and dictionaries.
        fused: the fused call on them, on a backend that it is forced to, or "auto".
        forced: the backend that will serve it, or "auto".
        shapes: of the inputs, in more sizes and numbers, for a comparison at length; it takes those of ``cases`` too.
        fits: whether the swapped module would answer these inputs fused; asked under autocast, where it may not.

    Returns:
        None when they agree, else in words what differs, or what was raised.
    """
    known = is_known(module)
    tried = [*(case.shapes for case in cases), *shapes]
    long = [] if known else thorough(tried, _weights(module))
    comparison = _Comparison(module, original, fused, fits)
    device, dtype = weight.device, weight.dtype
    given = tuple((case.training, *(shape is None for shape in case.shapes)) for case in cases)
    try:
        with isolated(device):
            with backend.use_backend("reference"):
                # What a known forward does is the same in any width; another may ask for it.
                found = once(module, False, ("does", given, forced), partial(comparison.exact, cases, long))
                if found is None and not known:
                    short = partial(comparison.exact, cases, brief(tried))
                    found = once(module, True, ("does in this width", given, forced), short)
                if found is None and not known:
                    found = once(module, False, ("low", given, forced), partial(comparison.low, cases))
            if found is None and device.type != "meta":
                runs = partial(comparison.run, cases, device, None, dtype, forced)
                found = once(module, True, ("runs", given, forced, device, dtype), runs)
    except Exception as error:  # whatever a foreign forward raises is a reason, not a failure of the swap
        return _raised(error)
    return found


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


@dataclass(frozen=True)
class _Comparison:
    """A module's own forward beside the fused call; the arguments are those of :func:`compare`."""

    module: nn.Module
    original: Call
    fused: Callable[[nn.Module, Any, str], Any]
    fits: Callable[[nn.Module, Any], bool] | None

    def exact(self, cases: Sequence[Case], long: Sequence[Case]) -> str | None:
        """In float64 on the CPU, with gradients."""
        # First without gradients, where what is written to is not refused by autograd but seen.
        seen = [replace(cases[0], gradients="none")] if long else []
        tried, float64 = [*seen, *cases, *long], torch.float64
        return self.run(tried, torch.device("cpu"), float64, float64, "auto", len(seen) + len(cases))

    def low(self, cases: Sequence[Case]) -> str | None:
        """In other dtypes on the CPU: a forward may cast, or ask for the dtype."""
        cpu = torch.device("cpu")
        plain = [replace(case, gradients="none", lenient=True) for case in cases]
        evaluated = [case for case in plain if not case.training]
        found = self.run(plain, cpu, torch.float32, torch.float32, "auto", tolerance=1e-4)
        for dtype in (torch.bfloat16, torch.float16):
            found = found or self.run(evaluated, cpu, dtype, dtype, "auto")
        if found is None and self.fits is not None:
            with torch.autocast("cpu", torch.bfloat16):
                tolerance = TOLERANCE[torch.bfloat16]
                for dtype in (torch.float32, torch.bfloat16):  # as given, and as a convolution before has left it
                    found = found or self.run(evaluated, cpu, torch.float32, dtype, "auto", tolerance=tolerance)
                found = found and f"{found} under autocast"
        return found

    def run(
        self,
        cases: Sequence[Case],
        where: torch.device,
        made: torch.dtype | None,
        dtype: torch.dtype,
        name: str,
        must: int = 0,
        tolerance: float | None = None,
    ) -> str | None:
        """Every case on twins, which keep what the cases before have left in them.

        Args:
            cases: in their order.
            where: device.
            made: dtype of the copies, None for what each tensor has.
            dtype: of the inputs.
            name: the backend of the fused call.
            must: so many of the cases, the first ones, the original has to answer. Where it refuses another one the
                fused call has to, too. 0 for all.
            tolerance: another than the dtype's.
        """
        generator = torch.Generator().manual_seed(0)
        exact, tolerance = dtype == torch.float64 and made is not None, tolerance or TOLERANCE[dtype]
        base = random_copy(self.module, where, made, generator)
        calls: tuple[Call, Call] = (self.original, lambda m, xs: self.fused(m, xs, name))
        twins = [copy.deepcopy(base) for _ in calls]
        states = [kept(twin) for twin in twins]
        for i, case in enumerate(cases):
            if not exact and not case.training:
                case = replace(case, gradients="none")
            xs = case.inputs(dtype, where, generator)
            for twin in twins:
                set_mode(twin, case)
            if torch.is_autocast_enabled("cpu") and self.fits is not None and not self.fits(twins[1], xs):
                continue
            outcomes = _outcomes(calls, twins, case, xs, exact, states)
            errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            if errors:
                refused = len(errors) == 2 and i >= (must or len(cases))
                if not refused and not (case.lenient and isinstance(outcomes[0], Exception)):
                    return f"{_raised(errors[0])} {case}"
                # What was left half done is not compared.
                twins = [copy.deepcopy(base) for _ in calls]
                states = [kept(twin) for twin in twins]
                continue
            want, got = cast("list[Outcome]", outcomes)
            states = [want.kept, got.kept]
            found = _disagreement(got, want, tolerance, exact, case)
            if found is not None:
                return found
        own, other = ({k: p.detach() for k, p in twin.named_parameters()} for twin in twins)
        found = difference(other, own, tolerance)
        return found and f"after all calls the values of {found}"


def _outcomes(
    calls: Sequence[Call], twins: Sequence[nn.Module], case: Case, xs: Any, gradients: bool, kept_before: list[Any]
) -> list[Outcome | Exception]:
    """Of each call on its twin, or what it raised; all begin with the same random numbers."""
    state, outcomes = RandomState(), []
    for call, twin, before in zip(calls, twins, kept_before, strict=True):
        state.restore()
        try:
            outcome: Outcome | Exception = observe(call, twin, case, xs, gradients, before)
        except Exception as error:
            outcome = error
        outcomes.append(outcome)
    return outcomes


def _disagreement(got: Outcome, want: Outcome, tolerance: float, exact: bool, case: Case) -> str | None:
    if want.changed is not None:
        return f"forward changes {want.changed} of the module"
    if got.changed is not None:
        return f"the fused call changes {got.changed} of the module"
    special = case.values in ("nan", "infinite")
    found = (
        _another(got.forms, want.forms)
        or difference(got.tensors, want.tensors, tolerance, 1e-9 if exact else None, special)
        or _another(got.facts, want.facts)
    )
    return found and f"{found} {case}"


def _another(got: dict[str, Any], want: dict[str, Any]) -> str | None:
    return next((f"{name} differs" for name, fact in want.items() if got.get(name) != fact), None)
