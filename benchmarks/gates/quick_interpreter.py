"""Triton's interpreter without the work that it repeats, which is most of its time: the same kernels, the same values.

Nothing here touches what is loaded, computed or stored: only how often the language is patched, how often the same
description of a type or of a tensor's shape is made, and that a reduction combines whole slices, in the order in which
it combined their values one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import triton
from triton import language
from triton.runtime import interpreter

# Those whose interpreter is known here; another one's runs as it is.
VERSIONS = ("3.6.",)
# A reduction as Triton's own interpreter has it.
one_by_one = interpreter.ReduceOps.generic_reduce


def is_known() -> bool:
    """Whether this Triton's interpreter is one that :func:`install` patches."""
    return triton.__version__.startswith(VERSIONS)


def install(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Patch Triton; ``replace`` is setattr, or one that can be undone."""
    if not is_known():
        return
    core = language.core
    patch_lang, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    new_tensor, new_block = core.tensor.__init__, core.block_type.__init__
    dtypes: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, dict[str, Any]] = {}

    def patch(fn: FunctionType) -> Any:
        """Once a launch, and not at every call of a function inside it."""
        parts = [part for part in fn.__globals__.values() if part is language or part is core]
        if any(core.is_builtin(part.load) for part in parts):
            return patch_lang(fn)
        return SimpleNamespace(restore=lambda: None)

    def dtype(ty: Any) -> Any:
        if ty.name not in dtypes:
            dtypes[ty.name] = np_dtype(ty)
        return dtypes[ty.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *[side.value if isinstance(side, core.constexpr) else side for side in shape])
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            new_tensor(self, handle, type)
            tensors[type.name] = dict(self.__dict__)
        self.__dict__.update(tensors[type.name])
        self.handle, self.type = handle, type

    def reduce(self: Any, inputs: Any) -> Any:
        shape = inputs[0].handle.data.shape
        if self.axis is None or len(shape) < 2:
            return one_by_one(self, inputs)
        arrays = [one.handle.data for one in inputs]
        totals = [array.take(0, self.axis) for array in arrays]
        for i in range(1, shape[self.axis]):
            slices = (*totals, *(array.take(i, self.axis) for array in arrays))
            made = self.combine_fn.fn(
                *(self.to_tensor(part, one.dtype) for part, one in zip(slices, (*inputs, *inputs), strict=True))
            )
            for j, one in enumerate(made if isinstance(made, tuple) else (made,)):
                totals[j][...] = one.handle.data if isinstance(one, core.tensor) else one
        if self.keep_dims:
            totals = [np.expand_dims(total, self.axis) for total in totals]
        return [self.to_tensor(total, one.dtype) for total, one in zip(totals, inputs, strict=True)]

    replace(interpreter, "_patch_lang", patch)
    replace(interpreter.ReduceOps, "generic_reduce", reduce)
    replace(interpreter, "_get_np_dtype", dtype)
    replace(core.block_type, "__init__", block)
    replace(core.tensor, "__init__", tensor)
