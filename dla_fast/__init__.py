"""Fused kernels for Deep Layer Aggregation networks in PyTorch."""

from dla_fast import functional, models, nn, reference
from dla_fast._version import __version__
from dla_fast.backend import use_backend
from dla_fast.swap import swap_, unswap_

__all__ = ["__version__", "functional", "models", "nn", "reference", "swap_", "unswap_", "use_backend"]
