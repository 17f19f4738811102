"""Triton's kernels as operators: registered here, imported on the first call.

Importing Triton takes longer than importing this package, and compiles nothing until a kernel is launched. So what is
registered is a stand-in for each operator, and ``dla_fast.kernels`` stays unimported until one is called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch

# Triton reads this when it is imported: kernels then run on the CPU, one operation after the other, in NumPy.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

# The dispatch key of the kernels: the interpreter is for checking them, on tensors of the CPU alone.
KEY = "CPU" if INTERPRETED else "CUDA"
DEVICE = KEY.lower()

# Operator -> where in dla_fast.kernels it is.
KERNELS = {
    "conv_norm_act_inference": "conv_norm_act",
    "conv_norm_act_stage": "conv_norm_act",
    "conv_norm_act_backward": "conv_norm_act_backward",
    "moments": "moments",
    "tail": "tail",
    "tail_backward_reduce": "tail",
    "tail_backward_apply": "tail",
    "upsample": "upsample",
    "upsample_add": "upsample",
    "upsample_backward": "upsample",
}


def _deferred(name: str, module: str) -> Callable[..., Any]:
    found: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(f"dla_fast.kernels.{module}"), name))
        return found[0](*args)

    return call


def register(library: torch.library.Library) -> None:
    """Register the stand-ins in the namespace that ``library`` defines."""
    for name, module in KERNELS.items():
        library.impl(name, _deferred(name, module), KEY)


def _find_missing() -> str | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed: pip install 'triton>=3.6'"
    if [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()] < [3, 6]:
        return f"triton {version} is too old: the kernels need 3.6"
    if not INTERPRETED and torch.version.cuda is None and torch.version.hip is None:
        return (
            f"no GPU: torch {torch.__version__} is a CPU build; "
            "with TRITON_INTERPRET=1 set before the start the kernels run on cpu tensors, slowly"
        )
    return None


_missing = _find_missing()


def missing() -> str | None:
    """Why no call can be served by Triton in this process, None where one may be. Asks for no device."""
    return _missing


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """Why tensors of this device type and dtype cannot be served, None where they can."""
    if INTERPRETED and device != "cpu":
        return f"TRITON_INTERPRET is set: runs on cpu tensors, not {device}"
    if device != DEVICE:
        return f"runs on {DEVICE} tensors, not {device}; with TRITON_INTERPRET=1 set before the start on cpu tensors"
    if INTERPRETED and dtype == torch.bfloat16:
        return "Triton's interpreter reads bfloat16 as integers; it has float16"
    return None
