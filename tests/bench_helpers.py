"""What the tests of runs share: a record as bench writes it."""

from __future__ import annotations

from typing import Any


def record(**changes: Any) -> dict[str, Any]:
    """A timed case of dla_fast, with ``changes``."""
    base = {
        "suite": "nodes",
        "case": "a",
        "op": "aggregate",
        "mode": "inference",
        "impl": "dla_fast",
        "device": "cpu",
        "dtype": "float32",
        "layout": "channels_last",
        "batch": 8,
        "threads": 2,
        "shape": "8+8 -> 8 @ 28x28",
        "side": 28,
        "median_ms": 1.0,
        "p20_ms": 0.98,
        "p80_ms": 1.02,
        "floor_ms": 0.5,
        "bytes": 1e6,
        "flops": 1e7,
        "peak_bytes": None,
        "saved_bytes": None,
    }
    return {**base, **changes}
