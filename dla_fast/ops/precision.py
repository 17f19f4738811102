"""float32's switch: whether products of float32 may round their operands to TF32, as PyTorch's convolutions read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# Reading or writing the older allow_tf32 can raise once this one is set.
_switch: Any = torch.backends.cudnn


def tf32_products() -> bool:
    """Whether the switch is on."""
    return bool(_switch.conv.fp32_precision == "tf32")


@contextlib.contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """Set the switch for a while.

    Args:
        precision: ``"tf32"``, or ``"ieee"`` for products of float32 as it is.
    """
    before = _switch.conv.fp32_precision
    _switch.conv.fp32_precision = precision
    try:
        yield
    finally:
        _switch.conv.fp32_precision = before
