"""Loading of the compiled extension, and why it is not there when it is not."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExtensionStatus:
    """What became of ``dla_fast._C``: whether it is loaded, what it was built for, or the reason it is missing."""

    loaded: bool
    reason: str | None
    built_torch: str | None = None
    built_cuda: str | None = None
    has_cuda: bool = False


def _load() -> ExtensionStatus:
    try:
        build = importlib.import_module("dla_fast._build")
    except ModuleNotFoundError:
        return ExtensionStatus(False, "the C++ extension was not built (python setup.py build_ext --inplace builds it)")
    built = {"built_torch": build.TORCH_VERSION, "built_cuda": build.CUDA_VERSION, "has_cuda": build.WITH_CUDA}
    if not build.WITH_CPU:
        return ExtensionStatus(False, build.REASON, **built)
    if torch.__version__ != build.TORCH_VERSION:
        reason = (
            f"the C++ extension was built for torch {build.TORCH_VERSION}, this is torch {torch.__version__}: "
            "rebuild it with pip install --no-build-isolation --force-reinstall --no-deps dla_fast"
        )
        warnings.warn(f"dla_fast: {reason}; running on the PyTorch reference until then", RuntimeWarning, stacklevel=2)
        return ExtensionStatus(False, reason, **built)
    try:
        importlib.import_module("dla_fast._C")
    except ImportError as error:
        reason = f"the C++ extension failed to load: {error}"
        warnings.warn(f"dla_fast: {reason}; running on the PyTorch reference", RuntimeWarning, stacklevel=2)
        return ExtensionStatus(False, reason, **built)
    return ExtensionStatus(True, None, **built)


STATUS = _load()
