"""Which kernels a run will launch, known without running it: its own cases, on meta tensors that stand for a GPU's.

The cases are the run's, so the list cannot drift from it. Operators of Triton's namespace call the kernels' host
functions, which choose tiles and launch as ever; :func:`dla_fast.kernels.launch.record` keeps the launches.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.case import Case, Setting
from dla_fast import backend
from dla_fast.ops import cuda, triton
from dla_fast.ops.layout import is_channels_last

META = torch.device("meta")


@dataclass(frozen=True)
class Pointer:
    """A tensor among a launch's arguments; all that the compiler sees of one that the allocator made."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Job:
    """A specialisation to compile, as plain values that can be sent to another process.

    Attributes:
        module: where the kernel is, and
        kernel: its name there.
        args: its arguments, tensors as :class:`Pointer`.
        constexprs: by name.
        options: of the compiler.
    """

    module: str
    kernel: str
    args: tuple[Any, ...]
    constexprs: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel and its constants, for people."""
        constants = " ".join(f"{k}={v}" for k, v in self.constexprs)
        return f"{self.module.rpartition('.')[2]}.{self.kernel} {constants}"

    @property
    def key(self) -> Any:
        """What of it decides the machine code: integers count by their divisibility alone."""
        return self.module, self.kernel, _kind(self.args), self.constexprs, self.options


def _kind(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(map(_kind, arg))
    if isinstance(arg, int):
        return 1 if arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31)
    return arg if isinstance(arg, Pointer) or arg is None else type(arg)


def _plain(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(map(_plain, arg))
    return Pointer(arg.dtype) if isinstance(arg, Tensor) else arg


def job_of(launched: Any) -> Job:
    """A recorded launch (see :class:`dla_fast.kernels.launch.Launch`) as a job."""
    function = launched.kernel.fn
    return Job(
        function.__module__,
        function.__name__,
        _plain(launched.args),
        tuple(launched.constexprs.items()),
        tuple(launched.config.options().items()),
    )


class _Standing(TorchDispatchMode):
    """Sends Triton's operators to their host functions, and answers where a value is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "dla_fast_triton":
            name = func._schema.name.partition("::")[2]
            module = triton.KERNELS.get(name)
            if module is not None:
                return getattr(importlib.import_module(f"dla_fast.kernels.{module}"), name)(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0.0 if args[0].dtype.is_floating_point else 0
        if func is torch.ops.aten.equal.default and args[0].is_meta:
            return True
        result = func(*args, **kwargs)
        if func in _CONVOLUTIONS:
            # input, weight, or the gradient, input, weight
            x, weight = args[_CONVOLUTIONS[func] :][:2]
            return as_cudnn(x, weight, result) if x.is_meta else result
        return result


# Operator -> where its input is among the arguments.
_CONVOLUTIONS = {torch.ops.aten.convolution.default: 0, torch.ops.aten.convolution_backward.default: 1}


def as_cudnn(x: Tensor, weight: Tensor, result: Any) -> Any:
    """Results of a convolution in the layout that cuDNN gives them; those of meta tensors are contiguous.

    The rule is ATen's ``cudnn_conv_suggest_memory_format``: channels_last where the input or the weight is, but for
    float64.
    """
    if x.dtype == torch.float64 or not (is_channels_last(x) or is_channels_last(weight)):
        return result

    def arranged(t: Tensor | None) -> Tensor | None:
        return t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t

    return arranged(result) if isinstance(result, Tensor) else tuple(map(arranged, result))


@contextlib.contextmanager
def standing_in(arch: int, *, with_cuda: bool = True) -> Iterator[list[Any]]:
    """Let meta tensors stand for those of a GPU; gives the launches that its kernels would have had.

    Args:
        arch: of the GPU, 90 for sm_90.
        with_cuda: whether the C++ kernels serve what they are preferred for, as they do where they are built.
    """
    from dla_fast.kernels import config, launch, library

    changed: list[tuple[Any, str, Any]] = [
        (triton, "DEVICE", "meta"),
        (triton, "INTERPRETED", False),
        (triton, "_missing", None),
        (cuda, "DEVICE", "meta"),
        (library, "DEVICE", "meta"),
        (backend.ops, "_missing", dict(backend.ops._missing)),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    chosen = backend._chosen
    try:
        for module, name, value in changed:
            setattr(module, name, value)
        backend._chosen = {key: value for key, value in chosen.items() if key[1] == "cpu"}
        for name, op in backend.ops._missing:
            if name == "cuda":
                backend.ops._missing[name, op] = None if with_cuda else "left out"
        for op in ("aggregate", "merge", "conv_norm_act"):
            # Of these the C++ kernels have inference at most.
            backend.ops._missing["cuda", op] = "no kernel for training"
        with config.assume(arch), launch.record() as launches, _Standing():
            yield launches
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        backend._chosen = chosen


def drawn(
    cases: Callable[[Setting], Iterable[Case]], arch: int, small: bool = False
) -> Iterator[tuple[str, list[Job], str]]:
    """(label, launches, error) of every case of a block; the error is empty where it ran."""
    with standing_in(arch):
        # Which backends are there decides which cases there are.
        listed = list(cases(Setting(META, small)))
    for case in listed:
        error = ""
        with standing_in(arch) as launches:
            try:
                case.run()
            except Exception as failure:
                error = f"{type(failure).__name__}: {str(failure)[:300]}"
        yield case.label, distinct(map(job_of, launches)) if case.launches else [], error


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Without those that come to the same machine code."""
    found: dict[Any, Job] = {}
    for job in jobs:
        found.setdefault(job.key, job)
    return list(found.values())


def jobs_of(call: Callable[[], object], arch: int) -> list[Job]:
    """The launches of anything that runs on meta tensors."""
    with standing_in(arch) as launches:
        call()
    return distinct(map(job_of, launches))
