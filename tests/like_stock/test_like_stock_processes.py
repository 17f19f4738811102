"""Several processes: parallel training on two, whole models handed from one to another, and forked workers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import process_cases
import serving
import torch
import torch.distributed as dist
from pairs import assert_alike, Seen

pytestmark = pytest.mark.skipif(serving.INTERPRETED, reason="what lies between the operators is the same")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has seen, see process_cases.py."""
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(process_cases.main, (folder, sys.path), nprocs=process_cases.WORLD)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(process_cases.WORLD)]


@pytest.mark.parametrize("name", process_cases.SCENARIOS)
def test_parallel_training(ranks, name):
    for found in ranks:
        stock, swapped = (found[name, swaps] for swaps in (False, True))
        assert "raised" not in stock, stock["raised"]
        assert "raised" not in swapped, swapped["raised"]
        assert_alike([Seen(stock), Seen(swapped)], 0.1 if "half" in name else 1e-9)
