"""Which implementation serves a call, and why not the others."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch

from dla_fast import ops
from dla_fast.ops import cuda, triton

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS = ("aggregate", "merge", "conv_norm_act", "batch_norm_act", "upsample", "upsample_add")
# What ``auto`` tries, best first. By reasoning, until a GPU has measured it: C++ for what only moves memory, since its
# loads and stores are written out; Triton for products of matrices, since it has the tiles and pipelines for them.
PREFERENCE = {
    "aggregate": ("triton", "cuda", "cpu"),
    "merge": ("triton", "cuda", "cpu"),
    "conv_norm_act": ("triton", "cuda", "cpu"),
    "batch_norm_act": ("cuda", "triton", "cpu"),
    "upsample": ("cuda", "triton", "cpu"),
    "upsample_add": ("cuda", "triton", "cpu"),
}

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_logger = logging.getLogger("dla_fast")
_logged: set[tuple[str, str]] = set()


def _disabled() -> bool:
    return os.environ.get("DLA_FAST_DISABLE", "0") not in ("", "0")


def _backend_from_environment() -> str:
    name = os.environ.get("DLA_FAST_BACKEND", "") or "auto"
    if name != "auto" and name not in BACKENDS:
        # Not an error: doctor, which tells what is wrong, must still start.
        warnings.warn(
            f"DLA_FAST_BACKEND: unknown backend {name!r}, expected auto, {', '.join(BACKENDS)}; using auto",
            RuntimeWarning,
            stacklevel=2,
        )
        name = "auto"
    return "reference" if _disabled() else name


# The choice of the thread or task that asks; unset where it has made none.
_choices: ContextVar[_Choice] = ContextVar("dla_fast_backend")


class _Choice:
    """A backend that calls are asked to run on.

    Attributes:
        name: ``auto`` or a backend.
        outer: the choice that is in force again once this one is left; None of the default, which is never left.
        in_force: the choice of whoever asks, or where none was made the one that is asked.
    """

    # torch.compile cannot call a ContextVar; what a property reads in C it takes for an attribute, and guards on it.
    in_force: Any = property(_choices.get)

    def __init__(self, name: str, outer: _Choice | None) -> None:
        self.name, self.outer = name, outer


_default = _Choice(_backend_from_environment(), None)
# What is chosen inside of code that is being compiled. It is written in the compiler's eyes only, never for others.
_traced: str | None = None


def selected() -> str:
    """The backend in force for the calling thread or task: ``auto`` or a forced one."""
    name: str = _traced or _default.in_force.name
    return name


def asked_by() -> str | None:
    """Who forced the backend in force, for a message; None where it is ``auto``."""
    name = selected()
    if name == "auto":
        return None
    if _disabled():
        return f"DLA_FAST_DISABLE={os.environ['DLA_FAST_DISABLE']}"
    if os.environ.get("DLA_FAST_BACKEND") == name:
        return f"DLA_FAST_BACKEND={name}"
    return f"use_backend({name!r})"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call inside on one backend.

    The choice belongs to the thread and the asyncio task that makes it. Tasks that it starts inside begin with it, and
    threads that run in a copy of its context (``contextvars.copy_context``, ``asyncio.to_thread``); any other thread,
    DataParallel's too, begins with the default. What a call is served by serves its backward pass, whichever thread
    runs that. Activation checkpointing runs the forward pass again with the choice that is in force at the backward
    pass, in its thread: ``checkpoint(..., context_fn=lambda: (use_backend(name), use_backend(name)))`` makes it there.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``. A forced backend that cannot run a
            call raises RuntimeError with the reason; ``"auto"`` falls back to the reference. ``DLA_FAST_DISABLE=1``
            wins over any of them.

    Raises:
        ValueError: unknown name.
        RuntimeError: left in another thread or task than it was entered in, where it stays in force.
    """
    global _traced
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"name: unknown backend {name!r}, expected auto, {', '.join(BACKENDS)}")
    name = "reference" if _disabled() else name
    if torch.compiler.is_dynamo_compiling():
        before, _traced = _traced, name
        try:
            yield
        finally:
            _traced = before
        return
    choice = _Choice(name, _default.in_force)
    token = _choices.set(choice)
    try:
        yield
    finally:
        _leave(choice, token)


def _leave(choice: _Choice, token: Token[_Choice]) -> None:
    current = _default.in_force
    try:
        _choices.reset(token)
    except ValueError as error:
        # Not from None: that would hide what was raised inside.
        raise RuntimeError(
            f"use_backend({choice.name!r}) was entered in another thread or task, where it stays in force"
        ) from error
    if current is choice:
        current = choice.outer
    else:
        # Two generators may each hold a choice, and the first to begin may be the first to end.
        later = current
        while later.outer is not choice:
            later = later.outer
        later.outer = choice.outer
    _choices.set(current)


@cuda.constant_when_traced
def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, which torch 2.11's compiler takes to be true whatever it compiles for."""
    return torch.compiler.is_exporting()


def needs_reference() -> bool:
    """Whether the call is being taken apart (vmap, jvp, export, tracing), which only plain PyTorch ops survive."""
    if torch.compiler.is_compiling():
        return is_exporting()
    return (
        torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


@dataclass(frozen=True)
class Candidate:
    """One row of :func:`explain`: a backend, and the reason it cannot run the call (None when it can)."""

    backend: str
    reason: str | None
    chosen: bool


def can_run(backend: str, op: str, device: str, dtype: torch.dtype) -> str | None:
    """None when ``backend`` can run ``op`` on tensors of this device type and dtype, else the reason."""
    if backend == "reference":
        return None
    if dtype not in _DTYPES:
        return f"no kernels for {dtype}"
    reason = ops.missing(backend, op)
    if reason is not None:
        return reason
    if backend == "triton":
        return triton.refuses(device, dtype)
    if backend == "cuda":
        return cuda.refuses(device, dtype)
    return f"runs on cpu tensors, not {device}" if device != "cpu" else None


def _automatic(op: str, device: str, dtype: torch.dtype) -> str:
    # The interpreter serves only those who ask for it: it is there to check kernels, and slow.
    names = [name for name in PREFERENCE[op] if name != "triton" or device != "cpu"]
    return next((name for name in names if can_run(name, op, device, dtype) is None), "reference")


# What does not change while the process runs, asked once: a call should not pay for it. Other devices than the CPU are
# asked for when they are met, since the import must not touch them.
_chosen = {(op, "cpu"): _automatic(op, "cpu", torch.float32) for op in OPS}


# All of it a constant, the look at the table too: a guard on the table would fail as soon as tracing has filled it.
@cuda.constant_when_traced
def _chosen_for(op: str, device: str) -> str:
    if (op, device) not in _chosen:
        _chosen[op, device] = _automatic(op, device, torch.float32)
    return _chosen[op, device]


def _log_once(op: str, device: str, dtype: torch.dtype) -> None:
    if (op, device) not in _logged:
        _logged.add((op, device))
        why = "; ".join(f"{name}: {can_run(name, op, device, dtype)}" for name in PREFERENCE[op])
        _logger.info("%s runs on the PyTorch reference (%s)", op, why)


def resolve(op: str, device: str, dtype: torch.dtype) -> str:
    """The backend that serves a call of ``op`` now.

    Raises:
        RuntimeError: a backend is forced and cannot run it.
    """
    name = selected()
    if name == "auto":
        backend = "reference"
        if dtype in _DTYPES:
            backend = _chosen_for(op, device)
        if backend == "reference" and not torch.compiler.is_compiling():
            _log_once(op, device, dtype)
        return backend
    reason = can_run(name, op, device, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for and cannot run {op}: {reason}")
    return name


def serves_inference(op: str, device: str, dtype: torch.dtype) -> str | None:
    """The backend that serves a call of ``op`` without gradients, where that is another than for training.

    CUDA C++ has an aggregation kernel for inference alone. On an H200 Triton's takes 0.5 to 0.65 of its time for one
    image (benchmarks/results), so it serves where it is asked for, and where there is no Triton.

    Args:
        op: one of :data:`OPS`.
        device: a device type.
        dtype: the dtype of the inputs.
    """
    if op != "aggregate" or device != cuda.DEVICE:
        return None
    name = selected()
    if name not in ("auto", "cuda"):
        return None
    if name == "auto" and can_run("triton", op, device, dtype) is None:
        return None
    if can_run("cuda", "aggregate_inference", device, dtype) or cuda.refuses_aggregate(dtype):
        return None
    return "cuda"


def explain(op: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Candidate]:
    """Every backend with the reason it cannot serve ``op``, and the one that does.

    Args:
        op: one of :data:`OPS`.
        device: a device type, as in ``tensor.device.type``.
        dtype: the dtype of the inputs.
    """
    if op not in OPS:
        raise ValueError(f"op: unknown op {op!r}, expected one of {', '.join(OPS)}")
    asked = selected()
    chosen = _automatic(op, device, dtype) if asked == "auto" else asked
    return [Candidate(name, can_run(name, op, device, dtype), name == chosen) for name in BACKENDS]
