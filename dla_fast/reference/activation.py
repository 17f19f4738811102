"""The activations a normalisation tail can end with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ActSpec = str | tuple[str, float]

ACTIVATIONS = ("identity", "relu", "silu", "leaky_relu", "hardswish")
DEFAULT_SLOPE = 0.01
_PARSED = {name: (name, DEFAULT_SLOPE if name == "leaky_relu" else 0.0) for name in ACTIVATIONS}


def parse_act(act: ActSpec) -> tuple[str, float]:
    """Normalise an activation to ``(name, slope)``.

    Args:
        act: one of :data:`ACTIVATIONS`, or ``("leaky_relu", negative_slope)``.

    Raises:
        ValueError: unknown name, or a slope given to an activation that has none.
        TypeError: neither a string nor a pair of a string and a number.
    """
    if isinstance(act, str):
        if act in _PARSED:
            return _PARSED[act]
        name, slope = act, DEFAULT_SLOPE
    elif isinstance(act, tuple) and len(act) == 2 and isinstance(act[0], str) and isinstance(act[1], (int, float)):
        name, slope = act[0], float(act[1])
        if name in ACTIVATIONS and name != "leaky_relu":
            raise ValueError(f"act: {name!r} takes no slope, got {act!r}; only 'leaky_relu' does")
    else:
        raise TypeError(f"act: expected a name or (name, slope), got {act!r}")
    if name not in ACTIVATIONS:
        raise ValueError(f"act: unknown activation {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return name, slope if name == "leaky_relu" else 0.0


def activate(x: Tensor, act: ActSpec) -> Tensor:
    """Apply an activation; NaN goes through every one of them."""
    name, slope = parse_act(act)
    if name == "relu":
        return torch.relu(x)
    if name == "silu":
        return F.silu(x)
    if name == "leaky_relu":
        return F.leaky_relu(x, slope)
    if name == "hardswish":
        # aten's CUDA kernel multiplies float64 by a sixth in float32.
        return x * (x + 3).clamp(0, 6) / 6 if x.dtype == torch.float64 else F.hardswish(x)
    return x
