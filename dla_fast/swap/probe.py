"""How a call is observed: on which inputs, in which mode, and what it gives, changes and keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast.swap.kept import PLAIN, RandomState, changed, kept

Call = Callable[[nn.Module, Any], Any]
Shapes = Sequence["Sequence[int] | None"]

# Values of one case that a comparison at length computes at most, times the weights of the module.
_PRODUCTS = 2e7
_SCALES = (1e-6, 1e3, 1e6, 1e60)


@dataclass(frozen=True)
class Case:
    """One run of a comparison.

    Attributes:
        training: the mode of the module and its children.
        shapes: of the inputs, None for one that is not given.
        gradients: "all" where inputs and parameters want them, "parameters", "none" (torch.no_grad) or "inference".
        values: "signed" in [-1, 1], "positive", "negative", "zeros", "nan" (a few among signed ones) or "infinite".
        scale: factor of the inputs, and of what :func:`scaled` says.
        frozen: the norms are in evaluation mode while the rest is in training.
        channels_last: layout of the inputs.
        container: what the inputs are given in.
        lenient: the original may refuse this call, from which nothing follows.
    """

    training: bool
    shapes: Shapes
    gradients: str = "all"
    values: str = "signed"
    scale: float = 1.0
    frozen: bool = False
    channels_last: bool = False
    container: type = list
    lenient: bool = False

    def __str__(self) -> str:
        said = [f"in {'training' if self.training else 'evaluation'} mode"]
        if self.gradients != "all":
            said.append({"parameters": "inputs without gradients"}.get(self.gradients, "without gradients"))
        if self.values != "signed":
            said.append(f"{self.values} values")
        if self.scale != 1:
            said.append(f"values times {self.scale:g}")
        if self.frozen:
            said.append("norms frozen")
        if self.channels_last:
            said.append("channels_last")
        if self.container is not list:
            said.append(f"given as a {self.container.__name__}")
        sizes = [tuple(shape) for shape in self.shapes if shape is not None]
        return f"{', '.join(said)} (inputs {', '.join(map(str, sizes))})"

    def inputs(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Any:
        """Random inputs, new ones at every call."""
        made: list[Tensor | None] = []
        for i, shape in enumerate(self.shapes):
            if shape is None:
                made.append(None)
                continue
            x = torch.rand(tuple(shape), generator=generator, dtype=dtype)
            if self.values in ("signed", "nan", "infinite"):
                x = x * 2 - 1
            elif self.values in ("negative", "zeros"):
                x = x * (-1 if self.values == "negative" else 0)
            if self.values in ("nan", "infinite"):
                # One of either sign, far from each other, in another place of every input.
                value = float("nan" if self.values == "nan" else "inf")
                x.view(-1)[(i * 7) % x.numel()], x.view(-1)[-1 - (i * 5) % x.numel()] = value, -value
            x = (x * self.scale).to(device)
            made.append(x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x)
        return self.container(made)


def _pixels(shapes: Shapes, most: bool) -> int:
    """Of the largest or the smallest input, over the batch."""
    return (max if most else min)(s[0] * s[2] * s[3] if len(s) == 4 else 1 for s in shapes if s is not None)


def thorough(shapes: Sequence[Shapes], weights: int = 0) -> list[Case]:
    """The cases that convince of a forward that may do anything.

    Args:
        shapes: of the inputs in several sizes and numbers; the first are those that other values, other modes of
            gradients and other layouts are tried on.
        weights: how many parameters each pixel meets, which bounds the sizes.
    """
    shapes = list({str(s): s for s in shapes}.values())
    affordable = [s for i, s in enumerate(shapes) if i == 0 or weights * _pixels(s, True) <= _PRODUCTS]
    # Few values per channel tell little, and one a norm refuses.
    trained = [s for s in affordable if _pixels(s, False) >= 4 or _pixels(s, True) == 1]
    plain, other = Case(False, affordable[0], "none"), Case(True, affordable[0], "none")
    cases = [replace(plain, shapes=s) for s in affordable]
    cases += [replace(plain, shapes=s, scale=1e3) for s in affordable[-4:]]
    cases += _values(plain)
    cases += [replace(plain, values=values, shapes=s) for values in ("nan", "infinite") for s in affordable[1:2]]
    cases += [replace(plain, channels_last=True), replace(plain, container=tuple, lenient=True)]
    cases += [replace(plain, gradients=gradients) for gradients in ("all", "parameters", "inference")]
    cases += [replace(other, shapes=s, gradients="all") for s in trained]
    cases += [replace(other, gradients=gradients) for gradients in ("none", "parameters")]
    cases += [replace(other, frozen=True, gradients="all"), replace(other, values="positive")]
    # Last, as they leave the running statistics far from what they were.
    return cases + [replace(other, scale=scale) for scale in _SCALES]


def brief(shapes: Sequence[Shapes]) -> list[Case]:
    """Fewer, for a module that differs in nothing but its widths from one that was tried at length."""
    few = [s for s in {str(s): s for s in shapes}.values() if _pixels(s, True) <= _pixels(shapes[0], True)]
    plain = Case(False, few[0], "none")
    return [
        *(replace(plain, shapes=s) for s in few[:4]),
        *(replace(plain, scale=scale) for scale in (1e3, 1e60)),
        *(replace(plain, values=values) for values in ("negative", "nan")),
        Case(True, few[0]),
    ]


def _values(plain: Case) -> list[Case]:
    large = [replace(plain, scale=scale) for scale in _SCALES]
    return large + [replace(plain, values=v) for v in ("positive", "negative", "zeros", "nan", "infinite")]


def set_mode(module: nn.Module, case: Case) -> None:
    """Put a module and all its children into the mode of a case."""
    for child in module.modules():
        child.training = case.training and not (case.frozen and isinstance(child, nn.modules.batchnorm._NormBase))


@contextlib.contextmanager
def scaled(module: nn.Module, case: Case) -> Iterator[None]:
    """What a module adds (and multiplies with after a norm), times the factor of a case for a while.

    So its outputs are of that size: a norm that measures takes the size of its input away, one that does not lets it
    through, and then what it multiplies with would come in once for each norm.
    """
    names = ("weight", "bias") if case.training else ("bias", "running_mean")
    vectors = []
    if case.scale != 1:
        named = [*module.named_parameters(), *module.named_buffers()]
        vectors = [t for name, t in named if t.dim() == 1 and name.endswith(names)]
    kept = [t.detach().clone() for t in vectors]
    with torch.no_grad():
        for t in vectors:
            t.mul_(case.scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for t, value in zip(vectors, kept, strict=True):
                t.copy_(value)


@dataclass
class Outcome:
    """Everything a call gives or changes.

    Attributes:
        tensors: by name.
        forms: of what was given back, and of the list that was given.
        facts: what else is no tensor, by name.
        kept: what :func:`kept` says of the module after it.
        changed: the first thing that was another before, None where nothing was.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    changed: str | None = None


def _flat(result: Any, given: Any, inputs: Sequence[Any], path: str, tensors: dict[str, Tensor]) -> Any:
    """The form of a result: its tensors go to ``tensors`` by name."""
    if isinstance(result, Tensor):
        same = next((i for i, x in enumerate(inputs) if x is result), None)
        if same is not None:
            return f"input {same} itself"
        before = next((name for name, x in tensors.items() if x is result), None)
        if before is not None:
            return f"{before} itself"
        tensors[path] = result
        return "tensor"
    if result is given:
        return "the list that was given"
    if isinstance(result, (list, tuple)):
        return type(result), tuple(_flat(x, given, inputs, f"{path}[{i}]", tensors) for i, x in enumerate(result))
    if isinstance(result, dict):
        return type(result), tuple((k, _flat(x, given, inputs, f"{path}[{k!r}]", tensors)) for k, x in result.items())
    if isinstance(result, PLAIN):
        return type(result), repr(result)
    raise TypeError(f"forward gave a {type(result).__name__}, not a tensor")


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.numel() else 0


def observe(
    call: Call, module: nn.Module, case: Case, xs: Any, gradients: bool, before: dict[str, Any] | None = None
) -> Outcome:
    """Call a module on copies of inputs.

    Args:
        call: of the module and the inputs.
        module: in the mode of the case already; its buffers, and whatever it keeps, are changed as the call does.
        case: tells the mode of gradients.
        xs: as :meth:`Case.inputs` makes them.
        gradients: compute them where the case asks for them.
        before: what :func:`kept` said of the module last.
    """
    wanted = case.gradients in ("all", "parameters")
    mode = torch.inference_mode() if case.gradients == "inference" else torch.set_grad_enabled(wanted)
    before = kept(module) if before is None else before
    with mode:
        leaves = [None if x is None else x.clone() for x in xs]
        for x in leaves:
            if x is not None and wanted and case.gradients == "all":
                x.requires_grad_()
        given = case.container(leaves)
        with scaled(module, case):
            result = call(module, given)
            outcome = Outcome()
            outputs: dict[str, Tensor] = {}
            outcome.forms["the form of the output"] = _flat(result, given, leaves, "outputs", outputs)
            if isinstance(given, list):
                outcome.forms["the list that was given"] = _flat(given, None, leaves, "items of the list", outputs)
            present = [x for x in leaves if x is not None]
            owned = {_storage(x) for x in present}
            outcome.facts["sharing memory with an input"] = [_storage(y) in owned for y in outputs.values()]
            outcome.facts["requires_grad of the output"] = [y.requires_grad for y in outputs.values()]
            outcome.tensors |= {name: y.detach() for name, y in outputs.items()}
            if wanted and gradients:
                outcome.tensors |= _gradients(module, outputs.values(), [x for x in present if x.requires_grad])
    outcome.tensors |= {f"values of input {i} after the call": x.detach() for i, x in enumerate(present)}
    outcome.tensors |= {f"values of {name} after the call": b.detach() for name, b in module.named_buffers()}
    outcome.facts["the mode after the call"] = [part.training for part in module.modules()]
    outcome.facts["the random state after the call"] = RandomState()
    outcome.kept = kept(module)
    outcome.changed = changed(before, outcome.kept)
    return outcome


def _gradients(module: nn.Module, outputs: Any, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of leaves and parameters for random ones of the outputs, which are the same at every call."""
    generator = torch.Generator().manual_seed(1)
    named = dict(module.named_parameters())
    reached = [y for y in outputs if y.requires_grad]
    if not reached or not (leaves or named):
        return {}
    given = [torch.rand(y.shape, generator=generator, dtype=y.dtype).to(y.device) for y in reached]
    # A sum: gradients that are handed to autograd are looked through for symbolic sizes, by a large import.
    total = torch.stack([(y * dy).sum() for y, dy in zip(reached, given, strict=True)]).sum()
    # A shortcut that was given leaves out the child that would have made one.
    grads = torch.autograd.grad(total, [*leaves, *named.values()], allow_unused=True, materialize_grads=True)
    names = [*(f"input {i}" for i in range(len(leaves))), *named]
    return {f"gradients of {name}": grad for name, grad in zip(names, grads, strict=True)}
