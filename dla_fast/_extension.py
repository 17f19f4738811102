"""Loading of the compiled extension, and why it is not there when it is not."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

_HERE = os.path.dirname(os.path.abspath(__file__))
_REBUILD = (
    "in dla_fast's checkout run python setup.py build_ext --inplace, "
    "or pip install --no-build-isolation --force-reinstall --no-deps ."
)


@dataclass(frozen=True)
class ExtensionStatus:
    """What became of ``dla_fast._C``: whether it is loaded, what it was built for, or the reason it is missing.

    Attributes:
        loaded: the operators of the extension are registered.
        reason: why it is not loaded, None when it is.
        built_torch: version of torch it was built for.
        built_cuda: version of CUDA that torch was built for.
        has_cuda: the CUDA kernels are in it.
        cuda_reason: why they are not.
        cuda_architectures: what they are compiled for, as in TORCH_CUDA_ARCH_LIST.
        compiler: what compiled it.
    """

    loaded: bool
    reason: str | None
    built_torch: str | None = None
    built_cuda: str | None = None
    has_cuda: bool = False
    cuda_reason: str | None = None
    cuda_architectures: tuple[str, ...] = ()
    compiler: str | None = None


def _hidden() -> str | None:
    """The folder of another dla_fast that is built, which an import would have found but for the sources here."""
    folders = (os.path.join(entry or os.curdir, "dla_fast") for entry in sys.path)
    return next((folder for folder in folders if os.path.isfile(os.path.join(folder, "_build.py"))), None)


def _build_record() -> tuple[ModuleType | None, str | None]:
    """The record of the build beside this file; without it the folder of a build that these sources hide, if any.

    Python looks into the current folder first, so in a checkout it takes the sources there, built or not. The import
    hook of an editable install then finds for it what is missing, in another checkout: a library of other sources.
    """
    try:
        build = importlib.import_module("dla_fast._build")
    except ModuleNotFoundError:
        return None, _hidden()
    folder = os.path.dirname(str(build.__file__))
    return (build, None) if os.path.realpath(folder) == os.path.realpath(_HERE) else (None, folder)


def _sanitizer_missing(sanitizer: str | None) -> str | None:
    """An extension built with ASan ends the process that loads it without ASan's runtime, so ask first."""
    if sanitizer == "address" and "asan" not in os.environ.get("LD_PRELOAD", ""):
        return "the C++ extension was built with AddressSanitizer: set LD_PRELOAD=$(g++ -print-file-name=libasan.so)"
    return None


def _load() -> ExtensionStatus:
    """Load the extension. What goes wrong is said once and remembered: the package works without it."""
    build, hidden = _build_record()
    built_torch = getattr(build, "TORCH_VERSION", None)

    def status(loaded: bool, reason: str | None, warning: bool = False) -> ExtensionStatus:
        if warning:
            warnings.warn(f"dla_fast: {reason}; running on the PyTorch reference", RuntimeWarning, stacklevel=4)
        return ExtensionStatus(
            loaded,
            reason,
            built_torch=built_torch,
            built_cuda=getattr(build, "CUDA_VERSION", None),
            has_cuda=getattr(build, "WITH_CUDA", False),
            cuda_reason=getattr(build, "CUDA_REASON", None),
            cuda_architectures=tuple(getattr(build, "CUDA_ARCHITECTURES", ())),
            compiler=getattr(build, "COMPILER", None),
        )

    if hidden is not None:
        # What is installed works, and somebody took the trouble of building it: this is worth a warning.
        reason = f"the C++ extension was not built in {_HERE}, and these sources hide the dla_fast in {hidden}"
        advice = "run from another folder than the checkout, or build in it: python setup.py build_ext --inplace"
        return status(False, f"{reason}; {advice}", warning=True)
    if build is None:
        return status(False, f"the C++ extension was not built: {_REBUILD}")
    if not getattr(build, "WITH_CPU", False):
        return status(False, getattr(build, "REASON", None) or "the C++ extension was not built")
    if torch.__version__ != built_torch:
        reason = f"the C++ extension was built for torch {built_torch}, this is torch {torch.__version__}"
        return status(False, f"{reason}; rebuild it: {_REBUILD}", warning=True)
    missing = _sanitizer_missing(getattr(build, "SANITIZE", None))
    if missing is not None:
        return status(False, missing, warning=True)
    try:
        importlib.import_module("dla_fast._C")
    # Whatever a broken library raises, an undefined symbol or an operator registered twice, must not break the import.
    except Exception as error:
        return status(False, f"the C++ extension failed to load: {error}; rebuild it: {_REBUILD}", warning=True)
    return status(True, None)


STATUS = _load()
