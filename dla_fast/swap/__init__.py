"""Model surgery: swap the units of existing models for fused ones, and back; freeze them for inference, and back."""

from dla_fast.nn import stock
from dla_fast.swap.adapters import Adapter, AdapterHandle, register_adapter
from dla_fast.swap.concat import ConcatAdapter
from dla_fast.swap.freeze import FreezeReport, freeze_, unfreeze_
from dla_fast.swap.proven import prove
from dla_fast.swap.report import SwapEntry, SwapReport
from dla_fast.swap.surgery import swap_, unswap_

stock.register_prover(prove)

__all__ = [
    "Adapter",
    "AdapterHandle",
    "ConcatAdapter",
    "FreezeReport",
    "SwapEntry",
    "SwapReport",
    "freeze_",
    "register_adapter",
    "swap_",
    "unfreeze_",
    "unswap_",
]
