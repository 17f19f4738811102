"""The time of a launch, predicted from what its machine code does: never measured here, but fitted to what was.

A launch takes

- ``latency``: the cycles of one program alone (:mod:`benchmarks.gates.emulate`), times the rounds in which its programs
  pass the processors, as many at a time as registers and shared memory let in;
- ``throughput``: the most that any of what programs share asks for: bytes of DRAM, bytes of the second-level cache,
  issue slots, the pipes, shared memory with the first-level cache, tensor cores.

Neither hides the other whole: a program waits while others do not fill the gap. The two are joined by a norm that is
their maximum where they are far apart. Its parameters are those of :class:`Machine`; a run on a GPU corrects them
(benchmarks/results/model/h200.json, tests/test_model.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.gates.emulate import Memory
from benchmarks.gates.launches import Features


@dataclass(frozen=True)
class Machine:
    """A GPU as the model knows it.

    Attributes:
        name: of the GPU.
        sms: processors.
        clock: cycles a second under load.
        copy: bytes a second of DRAM that a copy reaches, read and written.
        matrix: operations a second of the best bfloat16 product.
        cache: bytes a second of the second-level cache.
        far: cycles until a load from DRAM is answered.
        near: cycles until the second-level cache answers.
        start: cycles until a program's first instruction, its constants and code fetched.
        slots: share of a scheduler's issue slots that are filled at best.
        joint: exponent of the norm that joins latency and throughput where a processor holds one program, and
        fills: what each further one adds to it, since one program's waiting is filled by another's work.
        launch: seconds that a launch takes beside its programs.
        library: share of ``copy`` and of ``matrix`` that the library's kernels reach, and
        convolutions: what its 3 x 3 convolutions reach of ``matrix``: (output channels from which on, share).
    """

    name: str
    sms: int
    clock: float
    copy: float
    matrix: float
    cache: float
    far: float
    near: float
    start: float
    slots: float
    joint: float
    fills: float
    launch: float
    library: float = 0.85
    convolutions: tuple[tuple[int, float], ...] = ((0, 0.85),)

    @property
    def memory(self) -> Memory:
        """What a processor sees of the memory."""
        return Memory(self.far, self.near)


# Copy and product as benchmarks/results/gpu-h200.json has them; the clock that NVIDIA gives for the boost of an H200
# under load; the cache's rate as microbenchmarks give it for an H100. From far on: fitted to that run's times, see
# benchmarks/results/model/h200.json; near, far and start are what microbenchmarks give too
# (260, 600 to 800, 1000). Convolutions: that run's records of 3 x 3 merges, implementation "library".
H200 = Machine(
    name="H200", sms=132, clock=1.755e9, copy=4.188e12, matrix=8.11e14, cache=7.0e12, far=750.0, near=300.0,
    start=1500.0, slots=0.90, joint=2.4, fills=0.45, launch=1.0e-6, convolutions=((0, 0.58), (128, 0.60), (256, 0.92)),
)  # fmt: skip
MACHINES = {m.name: m for m in (H200,)}


# A sector of which a store writes a part is read, mended and written: fitted, and what error-correcting memory does.
TORN = 2.0


@dataclass(frozen=True)
class Time:
    """A launch's time in seconds, and what it is made of.

    Attributes:
        total: all of it.
        latency: programs one after the other.
        parts: seconds of each thing that programs share.
        launch: beside the programs.
    """

    total: float
    latency: float
    parts: dict[str, float]
    launch: float

    @property
    def bound(self) -> str:
        """What it waits for most."""
        every = {**self.parts, "latency": self.latency, "launch": self.launch}
        return max(every, key=lambda name: every[name])


def predict(f: Features, machine: Machine) -> Time:
    """The time of a launch."""
    per_sm = f.programs / machine.sms
    resident = max(f.resident, 1)
    rounds = per_sm / resident
    # A last round that is not full takes as long as a full one; behind many its programs start as others end.
    rounds = math.ceil(rounds) if rounds <= 3 else rounds
    latency = (f.cycles + machine.start) * rounds / machine.clock
    # Of what a processor has, the busiest one decides: with fewer programs than processors, one of them.
    share = max(per_sm, 1.0) * f.warps / machine.clock
    parts = {
        "memory": (f.bytes + TORN * f.torn) / machine.copy,
        "cache": f.asked / machine.cache,
        "issue": share * f.issued / 4 / machine.slots,
        **{name: share * cycles / 4 / machine.slots for name, cycles in f.pipes.items()},
        "shared": share * (f.banks + f.lines),
        "matrix": share * f.matrix,
    }
    together = min(resident, math.ceil(per_sm))
    most, p = max(parts.values()), machine.joint + machine.fills * (together - 1)
    total = (latency**p + most**p) ** (1 / p) + machine.launch
    return Time(total, latency, parts, machine.launch)


def library_time(bytes_: float, flops: float, machine: Machine, channels: int = 0) -> Time:
    """The time of one of the library's kernels: nothing is known of it but what it has to do, and how well it does.

    Args:
        bytes_: of its tensors.
        flops: operations.
        machine: the GPU.
        channels: of a 3 x 3 convolution's output, else 0.
    """
    reached = machine.library
    if channels:
        reached = max((least, share) for least, share in machine.convolutions if channels >= least)[1]
    parts = {"memory": bytes_ / machine.copy / machine.library, "matrix": flops / machine.matrix / reached}
    return Time(max(parts.values()) + machine.launch, 0.0, parts, machine.launch)
