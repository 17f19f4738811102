"""Model surgery: swap modules of existing models for fused ones, and back."""

from dla_fast.swap.report import SwapEntry, SwapReport
from dla_fast.swap.surgery import swap_, unswap_

__all__ = ["SwapEntry", "SwapReport", "swap_", "unswap_"]
