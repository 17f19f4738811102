"""Launching kernels: what a launch costs the host, launches recorded instead of run, and what ships described.

A kernel's parameters are first its arguments (tensors, None, integers, floats and tuples of them), then its constexprs.
Host functions go through :func:`launch` alone, so a test can count launches, and the list of specialisations is drawn
from the very same functions, called on meta tensors inside :func:`record`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from dla_fast.kernels.config import TileConfig

# Whether @triton.jit gave interpreted functions: decided by the environment when the kernels are imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def _mend_interpreter() -> None:
    """Triton 3.6 interprets ``range(0, n)`` by int() of an array of one element, which NumPy refuses from 2.4 on."""
    from triton.runtime import interpreter

    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None:
        return

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if INTERPRETED:
    _mend_interpreter()

_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
_INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments in order, its constexprs by name, and its configuration."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    config: TileConfig


@dataclass(frozen=True)
class Specialisation:
    """A kernel as ``triton.compile(ASTSource(kernel, signature, constexprs, attrs), target, options)`` takes it.

    Attributes:
        name: unique, for reports.
        op: the operator it serves, as in ``torch.ops.dla_fast_triton``.
        kernel: the function that ``@triton.jit`` made.
        signature: parameter name -> type, ``"constexpr"``, or a tuple of them.
        constexprs: path of a parameter (its index, and the index inside a tuple) -> value.
        attrs: path -> attributes of a parameter: divisibility by 16.
        options: of the compiler: warps of a program, stages of the software pipeline.
        dtype: storage dtype, ``"bf16"`` and so on.
        config: the tile configuration as text.
        gemm: whether it multiplies matrices.
        grid: the grid of the example it was drawn from.
    """

    name: str
    op: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, int]
    dtype: str
    config: str
    gemm: bool
    grid: tuple[int, ...]


_recorded: list[Launch] | None = None
_counts: list[list[str]] = []
_runners: dict[Any, Any] = {}


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Record launches instead of running them; host functions may then be called on meta tensors."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@contextlib.contextmanager
def count() -> Iterator[list[str]]:
    """Collect the name of every kernel that is launched inside, on any thread."""
    names: list[str] = []
    _counts.append(names)
    try:
        yield names
    finally:
        _counts.remove(names)


def _name(kernel: Any) -> str:
    return str(kernel.fn.__name__)


def _kind(arg: Any) -> Any:
    """What of an argument Triton compiles for: a dtype and alignment, an integer's divisibility, a constant."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return 1 if arg == 1 else (arg % 16 == 0, arg in _INT32)
    if isinstance(arg, tuple):
        return tuple(map(_kind, arg))
    return arg.__class__


@dataclass
class Memo:
    """The compiled kernel of a plan, for calls whose arguments differ in nothing but their addresses."""

    compiled: Any = None
    device: int | None = None
    constants: tuple[Any, ...] = ()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constexprs: dict[str, Any],
    config: TileConfig,
    memo: Memo | None = None,
    tensors: Sequence[Tensor | None] = (),
) -> None:
    """Launch a kernel on the current stream of its tensors' device.

    The first launch of a specialisation goes through Triton's own front end, which compiles it or finds it in its
    cache; later ones go to the compiled kernel, which costs the host a third of that.

    Args:
        kernel: what ``@triton.jit`` made.
        grid: programs in each of one to three dimensions; an empty grid launches nothing.
        args: the kernel's arguments, without constexprs, in order.
        constexprs: every constexpr by name, in order.
        config: warps and stages.
        memo: kept by a caller that makes this launch again with the same arguments but for the tensors' addresses.
        tensors: beside a memo, every tensor among the arguments, and None for those that are absent.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constexprs, config))
        return
    for names in _counts:
        names.append(_name(kernel))
    if INTERPRETED:
        kernel[grid](*args, **constexprs)
        return
    if memo is None:
        _launch_compiled(kernel, grid, args, constexprs, config)
    elif not _aligned(tensors):
        # Rare, and another specialisation: the long way finds it.
        _launch_compiled(kernel, grid, args, constexprs, config)
    elif memo.compiled is None or memo.device != torch.cuda.current_device():
        compiled, memo.device = _launch_compiled(kernel, grid, args, constexprs, config)
        memo.compiled, memo.constants = compiled[(*grid, 1, 1)[:3]], tuple(constexprs.values())
    else:
        memo.compiled(*args, *memo.constants)


def _aligned(tensors: Iterable[Tensor | None]) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes, as the allocators' do."""
    address = 0
    for t in tensors:
        if t is not None:
            address |= t.data_ptr()
    return address % 16 == 0


def _launch_compiled(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constexprs: dict[str, Any], config: TileConfig
) -> tuple[Any, int]:
    """Launch by what Triton would compile for; gives the compiled kernel and the device it is loaded on."""
    device = next(a for a in args if isinstance(a, Tensor)).device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _launch_compiled(kernel, grid, args, constexprs, config)
    constants = tuple(constexprs.values())
    key = (kernel, device, config, constants, _kind(args))
    compiled = _runners.get(key)
    if compiled is None:
        compiled = _runners[key] = kernel[grid](*args, **constexprs, **config.options())
    else:
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
    return compiled, device


def _describe(arg: Any, path: tuple[int, ...], annotation: str, out: Specialisation) -> Any:
    """The type of an argument; its constants and attributes go into ``out``."""
    if isinstance(arg, tuple):
        return tuple(_describe(a, (*path, i), annotation, out) for i, a in enumerate(arg))
    if arg is None or (isinstance(arg, int) and arg == 1):
        out.constexprs[path] = arg
        return "constexpr"
    if isinstance(arg, Tensor):
        # A meta tensor stands for one that the caching allocator made, which is aligned.
        if arg.device.type == "meta" or arg.data_ptr() % 16 == 0:
            out.attrs[path] = [["tt.divisibility", 16]]
        return _TYPES[arg.dtype]
    if isinstance(arg, int):
        if arg % 16 == 0:
            out.attrs[path] = [["tt.divisibility", 16]]
        return "i32" if arg in _INT32 else "i64"
    return annotation or "fp32"


def specialisation(op: str, dtype: torch.dtype, launched: Launch, label: str = "") -> Specialisation:
    """Describe a recorded launch as something to compile ahead of time."""
    kernel = launched.kernel
    kind = _TYPES[dtype].removeprefix("*")
    constants = "-".join(
        f"{k.lower()}{v}"
        for k, v in launched.constexprs.items()
        if not k.startswith("B") and v is not False and v is not None
    )
    out = Specialisation(
        name=" ".join(filter(None, (_name(kernel), kind, str(launched.config), constants, label))),
        op=op,
        kernel=kernel,
        signature={},
        constexprs={},
        attrs={},
        options=launched.config.options(),
        dtype=kind,
        config=str(launched.config),
        gemm=launched.config.block_k > 0,
        grid=launched.grid,
    )
    values = (*launched.args, *launched.constexprs.values())
    for i, (param, value) in enumerate(zip(kernel.params, values, strict=True)):
        if param.is_constexpr:
            out.constexprs[i,] = value
            out.signature[param.name] = "constexpr"
        else:
            out.signature[param.name] = _describe(value, (i,), param.annotation_type, out)
    return out


def distinct(specialisations: Iterable[Specialisation]) -> Sequence[Specialisation]:
    """Without those that Triton would compile to the same thing; those that differ in absent arguments are numbered."""
    seen: dict[str, Specialisation] = {}
    for s in specialisations:
        key = repr((s.kernel, s.signature, s.constexprs, s.attrs, s.options))
        seen.setdefault(key, s)
    names: dict[str, int] = {}
    unique = []
    for s in seen.values():
        names[s.name] = names.get(s.name, 0) + 1
        unique.append(s if names[s.name] == 1 else replace(s, name=f"{s.name} #{names[s.name]}"))
    return unique
