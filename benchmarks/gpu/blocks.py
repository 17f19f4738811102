"""The timetable: what is done in which order, in how many processes, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.gpu.case import Case, Setting
from benchmarks.gpu.checks import checks, roots
from benchmarks.gpu.kernels import bandwidth
from benchmarks.gpu.nets import nets
from benchmarks.gpu.nodes import nodes
from benchmarks.gpu.rest import rest
from benchmarks.gpu.ways import ways


@dataclass(frozen=True)
class Block:
    """A part of the run.

    Attributes:
        name: for the command line.
        title: for people.
        seconds: its share of the time; what one leaves the next may use.
        processes: how many share its cases. One where something is timed.
        cases: what it consists of.
        last: its kernels are compiled when it comes, not before everything.
    """

    name: str
    title: str
    seconds: float
    processes: int
    cases: Callable[[Setting], Iterator[Case]]
    last: bool = False

    @property
    def timed(self) -> bool:
        """Whether figures come of it, so that nothing else may run beside it."""
        return self.processes == 1


BLOCKS = {
    block.name: block
    for block in (
        Block("roots", "parity of dla34's roots", 25.0, 2, roots),
        Block("checks", "everything that can be right or wrong", 75.0, 8, checks),
        Block("nodes", "dla34's roots timed", 75.0, 1, nodes),
        Block("networks", "whole networks timed", 95.0, 1, nets),
        Block("ways", "kernels beside the library", 20.0, 1, ways),
        Block("bandwidth", "memory-bound kernels timed", 20.0, 1, bandwidth),
        Block("rest", "what is left", 100.0, 1, rest, last=True),
    )
}
# Processes that compile the peers of the timed blocks while the checks run.
PREPARING = 7
