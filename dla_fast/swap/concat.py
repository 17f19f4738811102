"""Modules that concatenate in their own forward: whose children are called as before, up to what reads the maps.

A family is a small class, see :class:`ConcatAdapter` and :mod:`dla_fast.swap.families`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dla_fast import functional
from dla_fast.arguments import autocast
from dla_fast.backend import use_backend
from dla_fast.checks import convolved
from dla_fast.nn import stock
from dla_fast.nn.batch_norm import is_plain, parameter
from dla_fast.nn.conv import is_plain_conv
from dla_fast.reference.activation import ActSpec, activate
from dla_fast.swap import verify
from dla_fast.swap.calls import PLAIN, run_unit_on, undisturbed, unit_dtype
from dla_fast.swap.nodes import MAX_INPUTS, FusedNode, class_reason
from dla_fast.swap.probe import Case
from dla_fast.swap.reader import (
    Passed,
    Reader,
    at,
    attributes_of,
    children_of,
    is_passed,
    pass_by,
    reader_of,
    same_attributes,
)

# Stands for a norm that is folded into its convolution.
_NO_NORM = nn.BatchNorm2d(1, affine=False, track_running_stats=False)
# What a family is run on: mode, images, height, width.
_RUNS = ((False, 2, 4, 6), (True, 3, 5, 4), (False, 1, 3, 12))
# And without a mode, where one is tried at length.
_SIZES = ((1, 1, 1), (2, 8, 8), (1, 130, 1), (1, 1, 130), (1, 33, 20), (1, 64, 64))


@dataclass(frozen=True)
class ConcatSpec:
    """What swapping found out about a module that concatenates.

    Attributes:
        adapter: whose ``forward`` is run in place of the module's.
        reader: what reads the concatenation.
        passed: further modules whose calls are left out.
        children: names of the module's children, and whether each is None.
        attributes: the module's own numbers and strings, on which its forward may depend.
        arguments: how many arguments a call has at most.
        backend: the backend its reader is forced to, or "auto" for whichever is in force.
    """

    adapter: ConcatAdapter
    reader: Reader
    passed: tuple[Passed, ...]
    children: tuple[tuple[str, bool], ...]
    attributes: tuple[tuple[str, Any], ...]
    arguments: int
    backend: str


class Merge:
    """Calls what reads the concatenation of maps, without the concatenation."""

    def __init__(self, module: nn.Module, spec: ConcatSpec) -> None:
        self.module, self.spec, self.count = module, spec, 0

    def __call__(
        self, xs: Sequence[Tensor], residual: Tensor | None = None, act: bool = True, in_place: bool = False
    ) -> Tensor:
        """``child(torch.cat(xs, 1))``, or ``act(bn(conv(torch.cat(xs, 1))) + residual)`` where the child is three.

        Args:
            xs: maps (N, C_i, H, W).
            residual: None, or what is added in front of the activation.
            act: False leaves the activation, and the residual, to the caller.
            in_place: it is added in place, so that the sum has the norm's dtype whatever the residual's is.

        Raises:
            TypeError: a residual, or no activation, where the adapter's ``child`` is one.
        """
        module, child, reader = self.module, self.spec.adapter.child, self.spec.reader
        self.count += 1
        if isinstance(xs, Tensor):
            raise TypeError("merge: expected a list of maps, got one tensor; pass merge([x, y])")
        if isinstance(child, str) and (residual is not None or not act):
            raise TypeError(f"merge: {child} is one child, which neither adds a residual nor leaves its activation out")
        given, xs = xs, list(xs)
        if any(x.dtype != xs[0].dtype for x in xs):
            # Under autocast the convolution casts what the concatenation has made wider.
            xs = autocast(xs)
        conv, bn = cast(Any, at(module, reader.conv)), None if reader.bn is None else cast(Any, at(module, reader.bn))
        ending: ActSpec = reader.act if act else "identity"
        known = is_plain_conv(conv) if bn is None else is_plain(bn)
        dtype = unit_dtype(xs, conv, _NO_NORM if bn is None else bn) if known else None
        if dtype is None:
            return self._one_by_one(torch.cat(list(given), 1), residual, act, in_place)
        if residual is not None and not _is_added(residual, xs, conv, dtype):
            y = self._run(xs, conv, bn, "identity", None)
            y = activate(_sum(y, residual, in_place), ending)
        else:
            y = self._run(xs, conv, bn, ending, residual)
        for path in reader.rest:
            y = cast(Any, at(module, path))(y)
        return y

    def _run(self, xs: list[Tensor], conv: Any, bn: Any, act: ActSpec, residual: Tensor | None) -> Tensor:
        added: int | Tensor | None = next((i for i, x in enumerate(xs) if x is residual), residual)
        if len(xs) > MAX_INPUTS:
            xs, added = [torch.cat(xs, 1)], residual
        if bn is not None:
            return run_unit_on(self.spec.backend, xs, conv, bn, act=act, residual=added)
        with contextlib.nullcontext() if self.spec.backend == "auto" else use_backend(self.spec.backend):
            return _folded(xs, conv, act, added)

    def _one_by_one(self, x: Tensor, residual: Tensor | None, act: bool, in_place: bool) -> Tensor:
        children: Any = self.module._modules
        child = self.spec.adapter.child
        if isinstance(child, str):
            return cast(Tensor, children[child](x))
        for name in child[:2]:
            x = children[name](x)
        if residual is not None:
            x = _sum(x, residual, in_place)
        return cast(Tensor, children[child[2]](x)) if act and len(child) > 2 else x


def _sum(y: Tensor, residual: Tensor, in_place: bool) -> Tensor:
    z = y + residual
    return z.to(y.dtype) if in_place else z


def _is_added(residual: Any, xs: Sequence[Tensor], conv: Any, dtype: torch.dtype) -> bool:
    """Whether a residual is of the output's dtype and shape."""
    n, _, *sides = xs[0].shape
    k, s, d = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    shape = (n, conv.out_channels, *(convolved(side, k, s, d) for side in sides))
    return is_plain_conv(conv) and type(residual) in PLAIN and residual.dtype == dtype and residual.shape == shape


def _folded(xs: Sequence[Tensor], conv: Any, act: ActSpec, residual: int | Tensor | None) -> Tensor:
    """A convolution whose norm is folded into it: behind it comes one that divides by 1, exactly."""
    weight = parameter(conv, "weight")
    mean, var = weight.new_zeros(conv.out_channels), weight.new_ones(conv.out_channels)
    return functional.conv_norm_act(
        xs, weight, None, None, mean, var, training=False, eps=0.0, conv_bias=parameter(conv, "bias"),
        stride=conv.stride[0], dilation=conv.dilation[0], groups=conv.groups, residual=residual, act=act,
    )  # fmt: skip


class FusedConcat(FusedNode):
    """A module whose reader takes the maps as they are: its adapter's ``forward`` in place of its own.

    Every call first checks that what is left out is still there, else runs the original forward: the modules of the
    reader, of their classes and without hooks; the module's own numbers, strings and names of children; no export or
    tracing in progress; no global module hooks. Where the maps have several dtypes, the reader is called as it is.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        spec = self._dla_fast_spec
        if kwargs or len(args) > spec.arguments or not undisturbed() or not _is_there(self, spec):
            return super().forward(*args, **kwargs)
        return spec.adapter.forward(self, Merge(self, spec), *args)

    def _dla_fast_units(self) -> Iterable[tuple[nn.Module | None, nn.Module | None]]:
        reader = self._dla_fast_spec.reader
        return [(at(self, reader.conv), None if reader.bn is None else at(self, reader.bn))]


def _is_there(module: nn.Module, spec: ConcatSpec) -> bool:
    """Whether a module still is what was swapped."""
    if children_of(module) != spec.children or not same_attributes(module, spec.attributes):
        return False
    return all(is_passed(module, was) for was in (*spec.reader.passed, *spec.passed))


def _fits(spec: ConcatSpec, module: nn.Module, xs: Sequence[Any]) -> bool:
    return _is_there(module, spec)


def _arguments(forward: Any, first: int) -> tuple[int, int]:
    """How many arguments by position a call has at least and at most, after the first ones.

    Raises:
        ValueError: the signature cannot be told, or it takes others.
        TypeError: as before.
    """
    parameters = list(inspect.signature(forward).parameters.values())[first:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(p.kind not in kinds for p in parameters):
        raise ValueError("expected arguments by position")
    return sum(p.default is p.empty for p in parameters), len(parameters)


def first_channels(module: nn.Module) -> int:
    """Channels that the first convolution inside takes, by the order of registration.

    Raises:
        ValueError: there is none.
    """
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            return child.in_channels
    raise ValueError("holds no convolution")


class ConcatAdapter:
    """A family of modules that concatenate maps (N, C_i, H, W) and let a convolution, norm and activation read them.

    Subclass it with :attr:`child`, :meth:`resembles` and :meth:`forward`, and hand an instance to
    :func:`dla_fast.register_adapter`. What :meth:`forward` computes is compared with the module's own forward before a
    module is swapped: on copies, in evaluation and training, outputs, gradients and buffers, on maps of several sizes
    whose channels the first convolution tells; :meth:`calls` and :meth:`arguments` say otherwise where that is not how
    the module is called. An adapter holds nothing but what can be pickled and compared: swapped modules refer to it,
    and their pickles need its class to be importable.
    """

    unit = "nodes"
    kind = "aggregate"
    op = "conv_norm_act"
    node: type[FusedNode] = FusedConcat

    child: ClassVar[str | tuple[str, ...]] = ""
    """Name of the child that is called on the concatenation: one that holds a convolution, a norm and an activation, in
    this order (or with the norm folded away), and possibly more behind them. Or names of convolution, norm and
    activation, where the module calls them itself."""

    passes: ClassVar[tuple[str, ...]] = ()
    """Names of further children that :meth:`forward` does not call, but looks into."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *sorted(self.__dict__)))

    def check(self) -> None:
        """Refuse what is not written to the end.

        Raises:
            TypeError: :attr:`child` or :attr:`passes` are no names, or :meth:`resembles` or :meth:`forward` is missing.
        """
        name, child, passes = type(self).__name__, self.child, self.passes
        names = [child] if isinstance(child, str) else child
        if not names or not all(isinstance(n, str) and n for n in names) or len(names) > 3:
            raise TypeError(f"adapter: expected {name}.child to be a name, or a tuple of two or three, got {child!r}")
        if not isinstance(passes, tuple) or not all(isinstance(n, str) for n in passes):
            raise TypeError(f"adapter: expected {name}.passes to be a tuple of names, got {passes!r}")
        for method in ("resembles", "forward"):
            if getattr(type(self), method) is getattr(ConcatAdapter, method):
                raise TypeError(f"adapter: {name} does not define {method}")

    def resembles(self, module: nn.Module) -> bool:
        """Whether the module belongs in the report at all: what its children are called, mostly."""
        raise NotImplementedError

    def forward(self, module: Any, merge: Merge, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward does, with ``merge(xs)`` in place of ``child(torch.cat(xs, 1))``.

        Args:
            module: the swapped module.
            merge: called with the maps, see :meth:`Merge.__call__`; exactly once.
            args: the call's arguments, by position; one with others runs the module's own forward.
        """
        raise NotImplementedError

    def calls(self, module: nn.Module, n: int, height: int, width: int) -> Sequence[Sequence[Sequence[int] | None]]:
        """Shapes of the maps of each kind of call on which a module is compared, None for one that is left out.

        Raises:
            ValueError: it cannot be told.
        """
        return [[(n, first_channels(module), height, width)]]

    def arguments(self, xs: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of a call with such maps."""
        return tuple(xs)

    def match(self, module: nn.Module, backend: str) -> ConcatSpec | str:
        reason = class_reason(module)
        if reason is not None:
            return reason
        reader = reader_of(module, self.child)
        if isinstance(reader, str):
            return reader
        passed = []
        for name in self.passes:
            child = module._modules.get(name)
            was = f"no child {name}" if child is None else pass_by(child, (name,))
            if isinstance(was, str):
                return was
            passed.append(was)
        try:
            least, most = _arguments(cast(Any, stock.original_class(module)).forward, 1)
            needed, taken = _arguments(self.forward, 2)
        except (TypeError, ValueError) as error:
            return f"forward: {error}"
        name = type(self).__name__
        if taken == 0:
            return f"{name}.forward takes no argument of a call: expected (self, module, merge, x, ...)"
        if least > taken or needed > most:
            return f"forward takes {least} to {most} arguments, {name}.forward {needed} to {taken}"
        try:
            # Arguments that no comparison brings are none that a call may bring.
            tried = max(len(self.arguments(given)) for given in self.calls(module, 2, 8, 8))
        except Exception as error:  # whatever an adapter of one's own raises
            return f"{name}.calls or .arguments: {type(error).__name__}: {error}"
        parts = [at(module, path) for path in (reader.conv, reader.bn) if path is not None]
        if len({t.device for part in parts if part for t in [*part.parameters(), *part.buffers()]}) > 1:
            return "the parameters and buffers of what reads the concatenation lie on several devices"
        return ConcatSpec(
            self, reader, tuple(passed), children_of(module), attributes_of(module), min(most, taken, tried), backend
        )

    def placement(self, module: nn.Module, spec: ConcatSpec) -> tuple[torch.device, torch.dtype]:
        weight = cast(Any, at(module, spec.reader.conv)).weight
        return weight.device, weight.dtype

    def verify(self, module: nn.Module, spec: ConcatSpec) -> str | None:
        weight = cast(Any, at(module, spec.reader.conv)).weight

        def original(m: nn.Module, xs: Sequence[Any]) -> Any:
            _seed(weight.device)
            return m.forward(*self.arguments(xs))

        def fused(m: nn.Module, xs: Sequence[Any], name: str) -> Any:
            _seed(weight.device)
            merge = Merge(m, replace(spec, backend=name))
            made = self.forward(m, merge, *self.arguments(xs))
            if merge.count != 1:
                raise TypeError(f"{type(self).__name__}.forward called merge {merge.count} times, expected once")
            return made

        try:
            cases = [Case(training, given) for training, *size in _RUNS for given in self.calls(module, *size)]
            shapes = [given for size in _SIZES for given in self.calls(module, *size)]
        except Exception as error:  # whatever an adapter of one's own raises
            return f"{type(self).__name__}.calls: {type(error).__name__}: {error}"
        fits = partial(_fits, spec)
        return verify.compare(module, weight, cases, original, fused, spec.backend, shapes=shapes, fits=fits)

    def remark(self, module: nn.Module, spec: ConcatSpec) -> str:
        return "its norm is folded away" if spec.reader.bn is None else ""

    def owned(self, module: nn.Module, spec: ConcatSpec) -> Iterable[nn.Module]:
        for was in (*spec.reader.passed, *spec.passed):
            found = at(module, was.path)
            if found is not None:
                yield found


def _seed(device: torch.device) -> None:
    """Let both calls of a comparison draw the same random numbers; whoever compares has put the state aside."""
    torch.default_generator.manual_seed(0)
    if device.type not in ("cpu", "meta"):
        with torch.get_device_module(device).device(device):
            torch.get_device_module(device).manual_seed(0)
