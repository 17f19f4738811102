"""Every op in plain PyTorch: the definition of right, and the fallback where no kernel can run."""

from dla_fast.reference.activation import ACTIVATIONS, ActSpec, activate, parse_act
from dla_fast.reference.aggregate import aggregate
from dla_fast.reference.batch_norm_act import batch_norm_act
from dla_fast.reference.merge import merge
from dla_fast.reference.upsample import upsample
from dla_fast.reference.upsample_add import upsample_add

__all__ = [
    "ACTIVATIONS",
    "ActSpec",
    "activate",
    "aggregate",
    "batch_norm_act",
    "merge",
    "parse_act",
    "upsample",
    "upsample_add",
]
