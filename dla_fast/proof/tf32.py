"""What rounding float32 to TF32 costs a product, as a yardstick: PyTorch's own ops with rounded operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# TF32 has ten bits behind the point.
EPS = 2.0**-10


def rounded(t: Tensor) -> Tensor:
    """float32 rounded to TF32, ties away from zero as cvt.rna.tf32 does; NaN stays NaN."""
    bits = (t.view(torch.int32) + 0x1000) & -0x2000
    return torch.where(t.isnan(), t, bits.view(torch.float32))


class RoundedProducts(TorchDispatchMode):
    """Convolutions of float32 round their operands to TF32, and so do their gradients.

    It is what a GPU's matrix units do, the same on every device: which kernel cuDNN takes for a shape, and whether
    that uses them, is not for the caller to know. Transposed ones are left as they are: ours use no matrix units.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        # input, weight, bias, stride, padding, dilation, transposed; the backward has the gradient before them.
        operands, transposed = {
            aten.convolution.default: (2, 6),
            aten.convolution_backward.default: (3, 7),
        }.get(func, (0, 0))
        if operands and not args[transposed] and args[0].dtype == torch.float32:
            args = (*map(rounded, args[:operands]), *args[operands:])
        return func(*args, **(kwargs or {}))
