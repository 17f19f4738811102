"""The only door to kernels: one set of operator schemas, stamped out per backend.

A backend is an operator namespace, ``torch.ops.dla_fast_<backend>``. The schemas, the fakes, the flop formulas and the
autograd formulas are written once, here, in Python; a backend brings kernels (C++ registers those of
``dla_fast_cpu``, Triton's are Python functions imported on the first call). So the operators exist, and can be traced,
without a compiled extension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dla_fast._extension import STATUS
from dla_fast.ops import batch_norm_act, conv_norm_act, cuda, tail, triton, upsample

__all__ = ["NAMESPACES", "STATUS", "missing", "namespace", "operator"]

# Backend -> the dispatch key its kernels are registered under. A backend joins the package by a line here.
NAMESPACES = {"cpu": "CPU", "cuda": "CUDA", "triton": triton.KEY}

# Unit -> the operators a backend needs kernels of to serve it.
_NODE = (
    "conv_norm_act_inference",
    "conv_norm_act_stage",
    "conv_norm_act_backward",
    "tail",
    "tail_backward_reduce",
)
UNITS = {
    "aggregate": _NODE,
    "aggregate_inference": ("conv_norm_act_inference",),
    "merge": _NODE,
    "conv_norm_act": _NODE,
    "batch_norm_act": ("moments", "tail", "tail_backward_reduce", "tail_backward_apply"),
    "upsample": ("upsample", "upsample_backward"),
    "upsample_add": ("upsample_add", "upsample_backward"),
}

_libraries: list[torch.library.Library] = []
_eager: dict[tuple[str, str], Callable[..., Any]] = {}


def _define(backend: str, key: str) -> None:
    library = torch.library.Library(f"dla_fast_{backend}", "DEF")
    _libraries.append(library)
    parts = (tail, conv_norm_act, batch_norm_act, upsample)
    for part in parts:
        for schema in part.SCHEMAS:
            library.define(schema)
    for part in parts:
        for op, eager in part.register(library, backend, key).items():
            _eager[backend, op] = eager


for _backend, _key in NAMESPACES.items():
    _define(_backend, _key)
triton.register(_libraries[-1])


def namespace(backend: str) -> Any:
    """The operators of a backend."""
    return getattr(torch.ops, f"dla_fast_{backend}")


def operator(backend: str, op: str) -> Callable[..., Any]:
    """An operator of a unit: a node of the graph where one is being captured, else called eagerly."""
    return getattr(namespace(backend), op) if torch.compiler.is_compiling() else _eager[backend, op]


def missing(backend: str, op: str) -> str | None:
    """Why ``backend`` has no kernels for the unit ``op``; None when it has them."""
    if backend not in NAMESPACES:
        return f"this version of dla_fast has no {backend} kernels"
    if op not in UNITS:
        return f"this version of dla_fast has no {backend} kernel for {op}"
    if backend == "triton":
        return triton.missing()
    return _missing[backend, op]


def find_missing(backend: str, op: str, key: str) -> str | None:
    """Why no kernels of the unit ``op`` are registered for a dispatch key; None when they are."""
    reason = cuda.missing() if backend == "cuda" and key == "CUDA" else STATUS.reason
    lacking = [
        name
        for name in UNITS[op]
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"dla_fast_{backend}::{name}", key)
    ]
    return (reason or f"no kernel for {', '.join(lacking)}") if lacking else None


# Asked once: kernels are registered when the extension is loaded, which the import above has done.
_missing = {
    (backend, op): find_missing(backend, op, NAMESPACES[backend]) for backend in ("cpu", "cuda") for op in UNITS
}
