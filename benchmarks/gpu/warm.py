"""Compiling before it is needed: every specialisation of a run, and the host code that launches it, in many processes.

Triton compiles a kernel at its first launch. It keeps what it made on disk, under a hash of source, specialisation and
target; so a process that goes the same way up to the launch, with a driver that only says which GPU there is, leaves
behind what the run will find. No process here touches a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.draw import Job, Pointer


@dataclass(frozen=True)
class Made:
    """What became of a job.

    Attributes:
        name: the job's.
        seconds: to compile it.
        stub_seconds: to build its launcher.
        found: it lay in the cache already, launcher included.
        error: why there is nothing, else empty.
    """

    name: str
    seconds: float
    stub_seconds: float
    found: bool
    error: str = ""


class _Driver:
    """Says which GPU there is and nothing else: enough to compile, and no context is made."""

    def __init__(self, arch: int, launcher: Any) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        self.launcher_cls = launcher

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _NotLoaded:
    """Stands for a module that was built and not loaded."""

    def __getattr__(self, name: str) -> None:
        return None


def _without_library(nvidia: Any) -> None:
    """Where there is no libcuda: link against an empty one, and load nothing that was linked against it."""
    from triton.runtime import build

    folder = tempfile.mkdtemp(prefix="dla_fast-libcuda-")
    command = [os.environ.get("CC", "cc"), "-shared", "-x", "c", "/dev/null", "-o", f"{folder}/libcuda.so.1"]
    subprocess.run(command, check=True)
    nvidia.library_dirs = lambda: [nvidia.libdevice_dir, folder]
    build._load_module_from_path = lambda name, path: _NotLoaded()


@contextlib.contextmanager
def counting() -> Iterator[list[str]]:
    """Collect what is compiled inside: this package's kernels by name, and launchers."""
    import triton
    from triton.runtime import build

    found: list[str] = []
    listener, right = triton.knobs.compilation.listener, build._build

    def heard(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit and getattr(getattr(src, "fn", None), "__module__", "").startswith("dla_fast."):
            found.append(f"{src.fn.__module__.rpartition('.')[2]}.{src.fn.__name__}")
        if listener is not None:
            listener(src=src, cache_hit=cache_hit, **rest)

    def built(name: str, *arguments: Any, **more: Any) -> Any:
        found.append(name)
        return right(name, *arguments, **more)

    try:
        triton.knobs.compilation.listener = heard
        build._build = built
        yield found
    finally:
        triton.knobs.compilation.listener = listener
        build._build = right


_driver: _Driver | None = None


def start(arch: int, has_library: bool) -> None:
    """Make this process one that compiles for a GPU."""
    global _driver
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    if not has_library:
        _without_library(nvidia)
    _driver = _Driver(arch, nvidia.CudaLauncher)
    driver.set_active(_driver)
    # The helper library of the real driver, which every process would build at its first launch.
    nvidia.CudaUtils()
    torch.set_num_threads(1)


def has_library() -> bool:
    """Whether the NVIDIA driver's library can be linked against."""
    from triton.backends.nvidia import driver as nvidia

    try:
        nvidia.libcuda_dirs()
    except (AssertionError, OSError, subprocess.SubprocessError):
        return False
    return True


def _argument(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(map(_argument, arg))
    return torch.empty(1, dtype=arg.dtype, device="meta") if isinstance(arg, Pointer) else arg


def make(job: Job) -> Made:
    """Compile a job and build its launcher, as a launch would."""
    assert _driver is not None, "start() comes first"
    begun = time.perf_counter()
    middle = begun
    error = ""
    with counting() as compiled:
        try:
            kernel = getattr(importlib.import_module(job.module), job.kernel)
            arguments = _argument(job.args)
            made = kernel.run(*arguments, grid=(1,), warmup=True, **dict(job.constexprs), **dict(job.options))
            middle = time.perf_counter()
            _driver.launcher_cls(made.src, made.metadata)
        except Exception as failure:
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    end = time.perf_counter()
    return Made(job.name, middle - begun, end - middle, not compiled and not error, error)


class Pool:
    """Processes that compile jobs in the order they are given; each specialisation once."""

    def __init__(self, arch: int, processes: int) -> None:
        self.processes = processes
        self.executor = ProcessPoolExecutor(processes, get_context("spawn"), start, (arch, has_library()))
        self.futures: dict[Any, Future[Made]] = {}

    def submit(self, jobs: list[Job], done: Callable[[Made], None]) -> list[Future[Made]]:
        """Queue jobs; ``done`` is called with what became of each that was not asked for before."""
        asked = []
        for job in jobs:
            if job.key not in self.futures:
                future = self.futures[job.key] = self.executor.submit(make, job)
                future.add_done_callback(lambda f, job=job: done(_result(f, job)))
            asked.append(self.futures[job.key])
        return asked

    def close(self) -> None:
        """Let go of the processes."""
        self.executor.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Made], job: Job) -> Made:
    """What a job came to, also where its process died."""
    if future.cancelled():
        return Made(job.name, 0.0, 0.0, False, "cancelled")
    failure = future.exception()
    return (
        future.result() if failure is None else Made(job.name, 0.0, 0.0, False, f"{type(failure).__name__}: {failure}")
    )


def cache_in(folder: Path) -> dict[str, str]:
    """The environment in which all processes of a run share what is compiled."""
    # Named outright, since inductor else points Triton at a folder of its own.
    return {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
