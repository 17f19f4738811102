"""Every op in plain PyTorch: the definition of right, and the fallback where no kernel can run."""

from dla_fast.reference.activation import ACTIVATIONS, ActSpec, activate, parse_act
from dla_fast.reference.batch_norm_act import batch_norm_act
from dla_fast.reference.conv_norm_act import aggregate, conv_norm_act, merge
from dla_fast.reference.upsample import upsample
from dla_fast.reference.upsample_add import upsample_add

__all__ = [
    "ACTIVATIONS",
    "ActSpec",
    "activate",
    "aggregate",
    "batch_norm_act",
    "conv_norm_act",
    "merge",
    "parse_act",
    "upsample",
    "upsample_add",
]
