"""What the tests of bench and of its runs share: cases and settings that take no time, a record as bench writes it."""

from __future__ import annotations

from typing import Any

import torch

from dla_fast import cli
from dla_fast.bench import Case, Rates, timing

OPS = ("aggregate", "merge", "batch_norm_act", "upsample", "upsample_add")
CPU = torch.device("cpu")
RATES = Rates(1e10, 1e11)
TINY = Case("tiny", (8, 4), 8, 4, 4)
FIELDS = {
    "case",
    "op",
    "mode",
    "impl",
    "device",
    "dtype",
    "layout",
    "batch",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "floor_ms",
}
QUICK = ["--rounds", "3", "--seconds", "0.02"]


def quick(*wanted: str, rotate: int | None = None) -> timing.Settings:
    return timing.Settings(CPU, rounds=3, peers=wanted or ("eager",), seconds=0.02, rotate=rotate)


def run(*arguments: object) -> int:
    return cli.main(["bench", *map(str, arguments), *QUICK])


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
