"""The only door to kernels: one set of operator schemas, stamped out per backend."""

from __future__ import annotations

from dla_fast._extension import STATUS

__all__ = ["STATUS", "missing"]


def missing(backend: str, op: str) -> str | None:
    """Why ``backend`` has no kernels for ``op``; None when it has them."""
    return f"no {backend} kernel for {op} yet"
