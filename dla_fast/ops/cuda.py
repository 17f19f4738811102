"""What the CUDA C++ kernels are compiled for, and what they leave to others."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch

from dla_fast._extension import STATUS
from dla_fast.ops.precision import tf32_products

DEVICE = "cuda"


def missing() -> str | None:
    """Why no kernel is there; None where they are built."""
    if STATUS.has_cuda and STATUS.loaded:
        return None
    return STATUS.reason or STATUS.cuda_reason or "the CUDA kernels were not built"


def built_for(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether one of the architectures, as in TORCH_CUDA_ARCH_LIST, runs on a device of this compute capability."""
    for name in architectures:
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if parts is None:
            return True  # a name such as Hopper, or native
        major, minor, specific, ptx = int(parts[1]), int(parts[2]), parts[3], parts[4]
        # Machine code runs on its own generation from its own minor version on, PTX on everything that comes after.
        if (major, minor) == capability or (major == capability[0] and minor < capability[1] and not specific):
            return True
        if ptx and (major, minor) <= capability:
            return True
    return False


F = TypeVar("F", bound=Callable[..., object])


def constant_when_traced(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which would import all of torch's compiler with the package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Whether the current device runs the kernels, asked once per device.
_runs: dict[int, str | None] = {}


@constant_when_traced
def _refuses_device() -> str | None:
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    index = torch.cuda.current_device()
    if index not in _runs:
        capability = torch.cuda.get_device_capability(index)
        known = STATUS.cuda_architectures
        _runs[index] = None
        if known and not built_for(known, capability):
            device = f"this device is {capability[0]}.{capability[1]}"
            _runs[index] = (
                f"built for compute capability {', '.join(known)}, {device}: Triton or the reference serves it"
            )
    return _runs[index]


def refuses(device: str, dtype: torch.dtype) -> str | None:
    """Why tensors of this device type and dtype cannot be served, None where they can."""
    if device != DEVICE:
        return f"runs on {DEVICE} tensors, not {device}"
    return _refuses_device() if DEVICE == "cuda" else None


@constant_when_traced
def refuses_aggregate(dtype: torch.dtype) -> str | None:
    """Why the inference of an aggregation node of this dtype cannot be served, None where it can."""
    if dtype == torch.float64:
        return "its aggregation kernel multiplies float16, bfloat16 and TF32, not float64"
    if dtype == torch.float32 and not tf32_products():
        return "its aggregation kernel multiplies float32 as TF32, and torch.backends.cudnn.conv.fp32_precision is not"
    return None
