"""What foreign modules are: classes whose instances were found to compute what one of the library's computes.

Code bases have an Identity of their own, convolutions that only treat empty inputs differently, batch norms that never
train or that activate as well. Such a class is known by what it does: whoever can run it (:mod:`dla_fast.swap.proven`)
registers as the prover, and is asked once about every class with the same options.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Kinds, by what is computed: the library's own modules of that name, and beside them
# - "norm_act": a norm, then its child ``act``,
# - "frozen", "frozen_act": a norm by four buffers that are never updated, without and with such a child,
# - "conv_norm": a convolution, then its child ``norm`` and what its attribute ``activation`` says,
# - "unit": a child that convolves, one that normalises and one that activates, see :mod:`dla_fast.swap.units`,
# - "unit_relu": the same where the activation is a ReLU that is no child.
EXACT: dict[type, str] = {
    nn.Conv2d: "conv",
    nn.ConvTranspose2d: "transposed",
    nn.BatchNorm2d: "norm",
    nn.SyncBatchNorm: "norm",
    nn.Identity: "identity",
}
NORMS = ("norm", "norm_act", "frozen", "frozen_act")
NORM_ACTS = ("norm_act", "frozen_act")
FROZEN = ("frozen", "frozen_act")
CONVS = ("conv", "conv_norm")
UNITS = ("unit", "unit_relu")

# Widths, and marks that PyTorch and those who train with it leave on modules.
_IGNORED = frozenset({
    *nn.Module().__dict__, "in_channels", "out_channels", "num_features", "_is_torch_compile", "_is_hf_initialized",
    "_is_fsdp_managed_module", "torchdynamo_force_dynamic",
})  # fmt: skip
_SIMPLE = (type(None), bool, int, float, str)

# A kind, and what else the prover has to say of it.
Known = tuple[str, Any]
_NOTHING: Known = ("", None)
_known: dict[tuple[Any, ...], Known] = {}
# Of modules that differ in functions alone, where all so far are one kind: what a compiler can look up.
_classes: dict[tuple[Any, ...], Known] = {}
_proofs: dict[type, int] = {}
_MOST, _MOST_OF_A_CLASS = 4096, 64
_proving = threading.local()
_prover: Callable[[nn.Module], Known] | None = None


def register_prover(prover: Callable[[nn.Module], Known]) -> None:
    """Let ``prover`` say what modules of classes not seen before are: a kind, "" for none, and a remark on it."""
    global _prover
    _prover = prover


def original_class(module: object) -> type:
    """The class of a module before it was swapped."""
    return getattr(type(module), "_dla_fast_original", type(module))


def kind(module: nn.Module) -> str:
    """What a module is, "" for nothing that is known here. Hooks are not looked at."""
    return EXACT.get(type(module)) or known(module)[0]


def known(module: nn.Module) -> Known:
    """What a module of a foreign class is, and the prover's remark."""
    if torch.compiler.is_compiling():
        # Which function an attribute is cannot be looked up there.
        return _NOTHING if _has_others(module) else _classes.get(_plain_key(module), _NOTHING)
    key = _key(module)
    if key is None:
        return _NOTHING
    found = _known.get(key)
    if found is None:
        if _prover is None or not _can_prove():
            return _NOTHING
        found = _prove(module, key, _prover)
    return found


def _prove(module: nn.Module, key: tuple[Any, ...], prover: Callable[[nn.Module], Known]) -> Known:
    """What the prover says, kept; nothing for whoever asks while it is proven, of this thread."""
    busy: set[Any] = _proving.__dict__.setdefault("keys", set())
    cls = original_class(module)
    # One whose numbers change from call to call would be run in every one of them.
    if key in busy or _proofs.get(cls, 0) >= _MOST_OF_A_CLASS:
        return _NOTHING
    _proofs[cls] = _proofs.get(cls, 0) + 1
    busy.add(key)
    try:
        found = prover(module)
    finally:
        busy.discard(key)
    if len(_known) >= _MOST:
        # Classes that are made anew for every model must not be kept for ever.
        _known.clear()
        _classes.clear()
        _proofs.clear()
    _known[key] = found
    same = _plain_key(module)
    _classes[same] = found if _classes.get(same, found) == found else _NOTHING
    return found


def _can_prove() -> bool:
    """Whether modules can be run on copies here and now: nobody watches, fakes or traces what is called."""
    return not (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _is_plain(value: Any) -> bool:
    """A number, a string, or several."""
    return type(value) in _SIMPLE or (type(value) in (tuple, list) and all(type(v) in _SIMPLE for v in value))


def _is_function(value: Any) -> bool:
    """A function or class that holds nothing else, and so keeps nothing alive."""
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    return isinstance(value, type) or (isinstance(value, types.BuiltinFunctionType) and not _is_bound(value))


def _is_bound(function: types.BuiltinFunctionType) -> bool:
    return not isinstance(function.__self__, (types.ModuleType, type(None), type))


def _has_others(module: nn.Module) -> bool:
    """Whether a module has attributes besides numbers and strings."""
    for name, value in module.__dict__.items():
        if name not in _IGNORED and not name.startswith("_dla_fast") and not _is_plain(value):
            return True
    return False


def _plain_key(module: nn.Module) -> tuple[Any, ...]:
    """Its class, its children's, which parameters there are, and its own numbers and strings."""
    key: list[Any] = [original_class(module)]
    for name, child in module._modules.items():
        key += (name, None if child is None else original_class(child))
    for name, value in module.__dict__.items():
        if name not in _IGNORED and _is_plain(value):
            key += (name, tuple(value) if isinstance(value, list) else value)
    for name, held in (*module._parameters.items(), *module._buffers.items()):
        key += (name, held is None)
    return tuple(key)


def _key(module: nn.Module) -> tuple[Any, ...] | None:
    """All that its forward can depend on but values, widths and what its children do; None for what is too much."""
    key: list[Any] = [_plain_key(module), getattr(original_class(module), "forward", None)]
    for name, value in module.__dict__.items():
        if name in _IGNORED or name.startswith("_dla_fast") or _is_plain(value):
            continue
        simple = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not all(type(v) in _SIMPLE or _is_function(v) for v in simple):
            return None
        key += (name, simple)
    try:
        hash(tuple(key))
    except TypeError:
        return None
    return tuple(key)
