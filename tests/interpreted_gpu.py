"""What benchmarks.gpu compiles beforehand is what its cases launch: test_triton.py starts this file.

The launches of a case are drawn from meta tensors; here the case then runs on real ones, in the interpreter, and may
launch nothing that was not drawn.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.gpu import draw
from benchmarks.gpu.blocks import BLOCKS
from benchmarks.gpu.case import Setting
from dla_fast import use_backend
from dla_fast.bench.networks import Network
from dla_fast.kernels import launch, library
from dla_fast.kernels.config import DEFAULT_ARCH
from dla_fast.proof import measure

# Cases whose launches the interpreter can follow in seconds: a few of every kind.
CHOSEN = {
    "roots": ["dla34.level2.root parity"],
    "checks": [
        "upsample_add triton float16",
        "batch_norm_act triton float64",
        "moments triton",
    ],
    "nodes": ["dla34.level2.root inference batch 2 float32", "dla34.level2.root training batch 2 float32"],
    "networks": ["dla46_c inference batch 1 32x32 float32 channels_last"],
    "ways": ["backward 64+64->64 8x8 batch 2 float32", "inference 3x3 64+64->64 8x8 batch 1 float32"],
    "rest": ["latency 512+512->512 7x7"],
}


@pytest.fixture(autouse=True)
def _one_dtype(monkeypatch):
    """The interpreter has no bfloat16."""
    monkeypatch.setattr(Setting, "dtype", torch.float32)
    # Which of many cases are taken depends on how many backends there are.
    monkeypatch.setattr("benchmarks.gpu.checks.EVERY", 1)
    # Kernels and library serve what they serve on a GPU.
    monkeypatch.setattr(library, "DEVICE", "cpu")
    # An image that takes seconds where the run's smallest takes minutes.
    monkeypatch.setattr("benchmarks.gpu.nets.Network", lambda name, size, batch: Network(name, 32, 1))
    # What is launched once is launched as often as one likes.
    right, once = measure.interleave, {"rounds": 1, "warmup": 0, "min_sample_ms": 0.0}
    monkeypatch.setattr(measure, "interleave", lambda fns, **options: right(fns, **options | once))


def cases(block, device):
    return {case.label: case for case in BLOCKS[block].cases(Setting(torch.device(device), small=True))}


def drawn(block, label):
    with draw.standing_in(DEFAULT_ARCH):
        case = cases(block, "meta")[label]
    with use_backend("triton"):
        return {job.key: job for job in draw.jobs_of(case.run, DEFAULT_ARCH)}


@functools.cache
def launched(block, label):
    found = []
    right = launch.launch

    def noted(kernel, grid, args, constexprs, config, *rest):
        found.append(draw.job_of(launch.Launch(kernel, grid, args, constexprs, config)))
        right(kernel, grid, args, constexprs, config, *rest)

    case = cases(block, "cpu")[label]
    with use_backend("triton"), pytest.MonkeyPatch.context() as patches:
        patches.setattr(launch, "launch", noted)
        records = case.run()
    assert all(r.get("ok", True) and not r.get("error") for r in records), records
    return {job.key: job for job in found}


@pytest.mark.parametrize("block, label", [(b, label) for b, labels in CHOSEN.items() for label in labels])
def test_nothing_is_launched_that_was_not_drawn(block, label):
    beforehand = drawn(block, label)
    really = launched(block, label)
    assert really
    missing = [really[key].name for key in really.keys() - beforehand.keys()]
    assert not missing


def test_one_that_is_left_out_is_missed():
    block, label = "nodes", "dla34.level2.root training batch 2 float32"
    beforehand, really = drawn(block, label), launched(block, label)
    key = next(iter(really))
    del beforehand[key]
    assert really.keys() - beforehand.keys() == {key}
