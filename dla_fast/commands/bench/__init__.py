"""``python -m dla_fast bench``: dla_fast beside its peers and the machine's floor, on ops and on whole networks."""

from dla_fast.commands.bench.cases import (
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
from dla_fast.commands.bench.command import add_arguments, run
from dla_fast.commands.bench.eager import EagerNode
from dla_fast.commands.bench.peers import PEERS
from dla_fast.commands.bench.records import geometric_mean
from dla_fast.proof.measure import interleave

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "MODES",
    "PEERS",
    "Case",
    "EagerNode",
    "Rates",
    "add_arguments",
    "geometric_mean",
    "ida_cases",
    "interleave",
    "measure_rates",
    "network_cases",
    "op_cases",
    "run",
]
