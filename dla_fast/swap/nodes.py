"""What a swapped module becomes: its own class, extended by a fused ``forward``.

A swapped module keeps its ``__dict__`` untouched; only its class changes, to a subclass of the class it had, made here
once per original class and specification. Being a subclass, it keeps ``isinstance``, ``super()``, helper methods and
class attributes, so the original forward runs on it unchanged whenever the fused one does not apply. Such a class can
not be imported by name; pickling and copying go through :func:`rebuild` instead, which makes it again from the
original class.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dla_fast.nn import stock
from dla_fast.nn.batch_norm import is_plain, parameter
from dla_fast.nn.conv import is_plain_conv
from dla_fast.nn.frozen import KEY
from dla_fast.nn.memory import mark
from dla_fast.nn.unit import run_plain_unit
from dla_fast.reference.activation import ActSpec
from dla_fast.swap.calls import fused_act, is_act, run_unit_on, undisturbed, unit_dtype
from dla_fast.swap.found import find, keep, look, recall

MAX_INPUTS = 8

# The options that leave of a Conv2d a plain matrix product over the channels.
CONV1X1 = {
    "kernel_size": (1, 1),
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}

_classes: dict[tuple[type, type, Any], type[FusedNode]] = {}


class FusedNode(nn.Module):
    """Base of every class a swapped module gets; never instantiated by itself."""

    _dla_fast_original: ClassVar[type[nn.Module]]
    _dla_fast_spec: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not passed on: a model zoo's class registry must not see the fused class."""

    def _dla_fast_units(self) -> Iterable[tuple[nn.Module | None, nn.Module | None]]:
        """The convolutions that ``forward`` runs as units, each with the norm behind it: what can be frozen."""
        return ()

    def _dla_fast_keepers(self) -> Iterable[nn.Module]:
        """The modules that say how much is kept for the backward pass."""
        return [conv for conv, _ in self._dla_fast_units() if conv is not None]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, arguments, *rest = reduced
        cls = type(self)
        return rebuild, (cls.__bases__[0], cls._dla_fast_original, cls._dla_fast_spec, *arguments[1:]), *rest

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script compiles the source of ``forward``, so it gets the original one, and this module for good:
        scripting writes what this returns into the parent, hence the same object and no copy."""
        warnings.warn(
            f"torch.jit.script needs the original forward: {type(self).__name__} was unswapped; "
            "call dla_fast.swap_ again to run the eager model fused",
            stacklevel=2,
        )
        restore(self)
        return self


def fused_class(node: type[FusedNode], original: type[nn.Module], spec: Any) -> type[FusedNode]:
    """The subclass of ``original`` whose forward is that of ``node``.

    Raises:
        TypeError: ``original`` cannot be extended.
    """
    known = _classes.get((node, original, spec))
    if known is not None:
        return known
    body = {
        "_dla_fast_original": original,
        "_dla_fast_spec": spec,
        "__module__": __name__,
        "__doc__": node.__doc__,
        "forward": _forward_of(node, original),
    }
    made = types.new_class(f"Fused{original.__name__}", (node, original), exec_body=lambda ns: ns.update(body))
    return _classes.setdefault((node, original, spec), made)


def _forward_of(node: type[FusedNode], original: type[nn.Module]) -> Any:
    """The forward of ``node``, whose signature is the original's: exporters and tracers ask for names of arguments."""
    fused: Any = node.forward
    made: Any = types.FunctionType(
        fused.__code__, fused.__globals__, fused.__name__, fused.__defaults__, fused.__closure__
    )
    made.__dict__.update(fused.__dict__)
    made.__kwdefaults__, made.__qualname__, made.__doc__ = fused.__kwdefaults__, fused.__qualname__, fused.__doc__
    made.__wrapped__ = original.forward
    return made


def _traced(module: FusedNode, args: Any) -> Any:
    """The original forward where torch.fx traces a swapped module by itself: it has one value for all of ``*args``."""
    forward: Any = type(module)._dla_fast_original.forward
    flags = forward.__code__.co_flags & ~(inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    code = forward.__code__.replace(co_argcount=2, co_flags=flags)
    return types.FunctionType(code, forward.__globals__, closure=forward.__closure__)(module, args)


def rebuild(node: type[FusedNode], original: type[nn.Module], spec: Any, *arguments: Any) -> FusedNode:
    """An empty swapped module, which unpickling and copying fill."""
    cls = fused_class(node, original, spec)
    return cls.__new__(cls, *arguments)


def class_reason(module: nn.Module) -> str | None:
    """Why an instance cannot be given a subclass of its class."""
    cls: Any = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is a scripted module"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if parametrize.is_parametrized(module):
        return "has parametrizations"
    if (
        cls.__reduce_ex__ is not object.__reduce_ex__
        or cls.__reduce__ is not object.__reduce__
        or hasattr(cls, "__getnewargs_ex__")
    ):
        return f"{cls.__name__} defines how it is pickled"
    return None


def rebind(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of an instance, past any ``__setattr__`` of its own."""
    object.__setattr__(module, "__class__", cls)


def original_class(module: object) -> type:
    """The class of a module before it was swapped."""
    return type(module)._dla_fast_original if isinstance(module, FusedNode) else type(module)


def restore(module: FusedNode) -> None:
    """Give a swapped module its class back; what was frozen inside of it is no longer, nor is it low on memory."""
    mark(module._dla_fast_keepers(), "default")
    for child in module.modules():
        child.__dict__.pop(KEY, None)
    rebind(module, type(module)._dla_fast_original)


@dataclass(frozen=True)
class AggregateSpec:
    """What swapping found out about an aggregation node.

    Attributes:
        bn: name of the norm's attribute, empty where the convolution holds it.
        act: name of the activation's attribute, empty for a ReLU that is no child, or that the norm holds.
        flag: name of the attribute that switches the residual.
        residual: its value.
        takes_list: forward takes one list of tensors, else each as an argument.
        backend: the backend this node is forced to, or "auto" for whichever is in force.
    """

    bn: str
    act: str
    flag: str
    residual: bool
    takes_list: bool
    backend: str


def is_plain_conv1x1(conv: nn.Conv2d) -> bool:
    """Whether an exact Conv2d has the options of :data:`CONV1X1`; written out, as every call asks."""
    return (
        conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


class FusedAggregate(FusedNode):
    """An aggregation node that runs through :func:`dla_fast.functional.aggregate`.

    Every call first checks that what the fused path replaces is still there, else runs the original forward: children
    of the expected types, with their options, without hooks or parametrizations; the residual flag as it was; plain
    tensors of one dtype; no export or tracing in progress; no global module hooks.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if type(args) is not tuple:
            return _traced(self, args)
        spec = self._dla_fast_spec
        xs = args
        if spec.takes_list and len(args) == 1 and type(args[0]) in (list, tuple):
            xs = args[0]
        elif spec.takes_list:
            xs = ()
        if kwargs or not 0 < len(xs) <= MAX_INPUTS:
            return super().forward(*args, **kwargs)
        found = find(self, "conv")
        # The flag may be an attribute of the class, which is not among the facts.
        if found is not None and getattr(self, spec.flag, None) is spec.residual:
            y = recall(self, found, xs, 0 if spec.residual else None)
            if y is not None:
                return y
        found = look(self, [("conv", spec.bn, spec.act)], spec.backend) if spec.bn and spec.act else None
        if not can_fuse(self, spec, xs):
            return super().forward(*args, **kwargs)
        y = run_fused(self, spec, xs)
        keep(self, found)
        return y

    def _dla_fast_units(self) -> Iterable[tuple[nn.Module | None, nn.Module | None]]:
        conv, bn, _ = node_parts(self, self._dla_fast_spec)
        return [(conv, bn)]


def node_parts(module: nn.Module, spec: AggregateSpec) -> tuple[nn.Module | None, nn.Module | None, ActSpec | None]:
    """Convolution, norm and activation of a node as they are now; None for what is not there or not known."""
    children: Any = module._modules
    conv = children.get("conv")
    if not spec.bn:
        silent = conv is not None and getattr(conv, "activation", None) is None
        return conv, conv._modules.get("norm") if silent else None, "relu"
    bn, act = children.get(spec.bn), children.get(spec.act)
    if spec.act:
        return conv, bn, fused_act(act) if is_act(act) else None
    if bn is not None and stock.kind(bn) in stock.NORM_ACTS:
        own = bn._modules["act"]
        return conv, bn, fused_act(own) if is_act(own) else None
    return conv, bn, "relu"


def can_fuse(module: nn.Module, spec: AggregateSpec, xs: Sequence[Tensor]) -> bool:
    """Whether the module still is what was swapped, and the call one that the fused path answers as the original."""
    conv, bn, act = node_parts(module, spec)
    if conv is None or bn is None or act is None or not undisturbed():
        return False
    # One that holds its norm applies it, unless it is a Conv2d itself.
    if not is_plain_conv(conv) or not is_plain(bn) or (spec.bn and stock.kind(conv) != "conv"):
        return False
    if not is_plain_conv1x1(conv) or getattr(module, spec.flag, None) is not spec.residual:
        return False
    dtype = unit_dtype(xs, conv, bn)
    # Adding a residual of another dtype, or of fewer channels, promotes or widens the output.
    return dtype is not None and (
        not spec.residual or (xs[0].dtype == dtype and xs[0].shape[1] == parameter(conv, "weight").shape[0])
    )


def run_fused(module: nn.Module, spec: AggregateSpec, xs: Sequence[Tensor]) -> Tensor:
    """The fused call itself, on the backend the node is forced to, if any."""
    conv, bn, act = cast("tuple[Any, Any, ActSpec]", node_parts(module, spec))
    residual = 0 if spec.residual else None
    if spec.backend == "auto":
        return run_plain_unit(xs, conv, bn, act, residual)
    return run_unit_on(spec.backend, xs, conv, bn, act=act, residual=residual)
