"""The benchmarks: dla_fast beside its peers and the machine's floor, on ops and on whole networks."""

from dla_fast.bench.cases import (
    DTYPES,
    LAYOUTS,
    MODES,
    Case,
    Rates,
    ida_cases,
    measure_rates,
    network_cases,
    op_cases,
)
from dla_fast.bench.eager import EagerNode
from dla_fast.bench.peers import PEERS
from dla_fast.bench.records import geometric_mean
from dla_fast.proof.measure import interleave

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "MODES",
    "PEERS",
    "Case",
    "EagerNode",
    "Rates",
    "geometric_mean",
    "ida_cases",
    "interleave",
    "measure_rates",
    "network_cases",
    "op_cases",
]
