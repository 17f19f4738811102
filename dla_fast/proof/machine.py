"""What reports say of the processor: one name for it, and one for the instruction set that the kernels use."""

from __future__ import annotations

import importlib
import platform

import torch

from dla_fast import _extension


def cpu_name() -> str:
    """The processor as its maker calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """What this package's CPU kernels use; without them torch's own."""
    if not _extension.STATUS.loaded:
        return of_torch(torch.backends.cpu.get_cpu_capability())
    return str(importlib.import_module("dla_fast._C").cpu_isa())


def of_torch(capability: str) -> str:
    """An instruction set that torch reports, told apart from that of the kernels."""
    return f"{capability} (of torch)"
