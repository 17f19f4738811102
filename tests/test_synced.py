"""SyncBatchNorm: two processes give what one gives for their joint batch, with one collective each way."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import serving
import synced_cases
import torch
import torch.distributed as dist
from nn_helpers import randomise, relative
from swap_helpers import Root, inputs
from test_unit import Operators
from torch import nn

import dla_fast
from dla_fast.nn import stock
from dla_fast.nn.batch_norm import is_plain, sync_group
from dla_fast.nn.unit import run_unit
from dla_fast.swap import nodes
from dla_fast.swap.processes import asks_others, local

BOUNDS = {"outputs": 1e-9, "inputs": 1e-8, "parameters": 1e-8, "buffers": 1e-9}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has found, see synced_cases.py."""
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    if serving.INTERPRETED:
        pytest.skip("what lies between the operators is the same, and interpreting them here takes long")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(synced_cases.main, (str(folder),), nprocs=synced_cases.WORLD)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(synced_cases.WORLD)]


def test_two_processes_are_one_of_the_joint_batch(ranks):
    wrong = []
    for rank, found in enumerate(ranks):
        assert len(found["joint"]) == 2 * len(synced_cases.CASES) + sum(
            c[-1] is not None for c in synced_cases.CASES.values()
        )
        for name, case in found["joint"].items():
            wrong += [(rank, name, kind, e) for kind, e in case["errors"].items() if not e <= BOUNDS[kind]]
    assert not wrong


def test_one_collective_in_the_forward_and_one_in_the_backward(ranks):
    for found in ranks:
        for name, case in found["joint"].items():
            once = ["all_gather"] * case["units"] + ["all_reduce"] * case["units"]
            assert case["calls"] == [once, once], name


def test_swapping_asks_no_other_process(ranks):
    assert not any(case["collectives of swap_"] for found in ranks for case in found["joint"].values())


def test_process_groups_and_evaluation(ranks):
    for found in ranks:
        for name, value in found["groups"].items():
            if name.endswith("calls"):
                assert value == (["all_gather"] if name == "both, calls" else []), name
            else:
                assert value <= 1e-9, name


def test_distributed_data_parallel(ranks):
    for found in ranks:
        assert len(found["parallel"]) > 50
        assert max(found["parallel"].values()) <= 1e-9, found["parallel"]


def test_low_precision(ranks):
    for found in ranks:
        for name, (dtype, error) in found["low_precision"].items():
            assert dtype == ("torch.float32" if name.endswith("float32") else "torch.bfloat16")
            assert error <= (1e-5 if name.endswith("float32") else 5e-2), name


def test_what_is_not_wanted_is_not_asked_for(ranks):
    for found in ranks:
        for backend in ("auto", "reference"):
            assert found["wanted"][f"{backend}, none"] == found["wanted"][f"{backend}, norm"] == ["all_gather"]
            assert found["wanted"][f"{backend}, error"] <= 1e-9


def test_what_cannot_be_is_told(ranks):
    for rank, found in enumerate(ranks):
        told = found["told"]
        for backend in ("auto", "reference"):
            assert told[f"{backend}, one value"].startswith("ValueError: xs: expected more than 1 value per channel")
            assert told[f"{backend}, nothing"] == [0, 6, 4, 3]
            assert told[f"{backend}, nothing changes"] == ["bn.num_batches_tracked"]
            assert told[f"{backend}, twice"].startswith("RuntimeError: batch statistics of several processes")
            assert told[f"{backend}, batched"].startswith("RuntimeError: batch statistics of several processes")
        assert told["traced"].startswith("ValueError: SyncBatchNorm expected input tensor to be on GPU")
        assert told["transformed"].startswith("RuntimeError: During a grad")
        assert found["failing"]["raised"] == ("RuntimeError", "MismatchError")[rank]


NORMS = [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False, "momentum": 0.5}]


@pytest.mark.parametrize("options", NORMS, ids=str)
def test_without_a_group_it_is_the_stock_module(options):
    conv, bn = nn.Conv2d(4, 6, 3, padding=1).double(), nn.SyncBatchNorm(6, **options).double()
    fused = copy.deepcopy(bn)
    x = torch.randn(3, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    for training in (True, True, False):
        results = []
        for norm in (bn, fused):
            norm.train(training)
            if norm is fused:
                with Operators() as seen:
                    y = run_unit([x], conv, norm)
                assert seen.fused() == (0 if dla_fast.backend.selected() == "reference" else 1)
            else:
                y = torch.relu(norm(conv(x)))
            leaves = [x, conv.weight, *norm.parameters()]
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves), *(b.double() for b in norm.buffers())])
        for got, want in zip(*results, strict=True):
            assert relative(got, want) <= 1e-9


@pytest.mark.parametrize("training", [True, False])
def test_roots_converted_before_or_after_swapping_stay_fused(monkeypatch, training):
    node, calls, run = randomise(Root()).train(training), [], nodes.run_fused
    before, after = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(node)), copy.deepcopy(node)
    for twin in (before, after):
        assert dla_fast.swap_(twin).swapped
    nn.SyncBatchNorm.convert_sync_batchnorm(after)
    monkeypatch.setattr(nodes, "run_fused", lambda module, *rest: calls.append(module) or run(module, *rest))
    xs = inputs()
    want = node(*xs)
    for twin in (before, after):
        torch.testing.assert_close(twin(*xs), want)
        for got, buffer in zip(twin.buffers(), node.buffers(), strict=True):
            torch.testing.assert_close(got, buffer)
    assert calls == [before, after]


def _mean_of_all(x):
    return gathered(x)


def gathered(x):
    dist.all_reduce(x)
    return x


class OwnSync(nn.BatchNorm2d):
    """As code bases write them: alone it is a batch norm."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        return x - _mean_of_all(x.mean((0, 2, 3), keepdim=True))


class Ordinary(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


def test_who_asks_other_processes(monkeypatch):
    class SyncInName(nn.BatchNorm2d):
        pass

    class Inherited(OwnSync):
        pass

    asking = [nn.SyncBatchNorm(4), OwnSync(4), SyncInName(4), Inherited(4)]
    assert all(map(asks_others, asking))
    assert not any(map(asks_others, [nn.BatchNorm2d(4), Ordinary(4), Root(), nn.Sequential()]))
    assert stock.kind(Ordinary(4)) == "norm"
    for norm in asking[1:]:
        assert stock.kind(norm) == ""
        model = nn.Sequential(norm)
        assert local(model) is model
        with monkeypatch.context() as patches:
            patches.setattr(dist, "is_initialized", lambda: True)
            with pytest.raises(TypeError, match="may wait for other processes"):
                local(model)
    assert type(local(nn.Sequential(nn.SyncBatchNorm(4)))[0]) is nn.BatchNorm2d


def test_frozen():
    root = nn.SyncBatchNorm.convert_sync_batchnorm(randomise(Root(12, 6)))
    twin = copy.deepcopy(root)
    assert dla_fast.swap_(twin).swapped
    with pytest.raises(ValueError, match="training mode"):
        dla_fast.freeze_(twin)
    assert dla_fast.freeze_(twin.eval()).units == 1
    xs = [torch.randn(2, 6, 4, 3) for _ in range(2)]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(twin(*xs), root.eval()(*xs))


def test_where_a_call_is_taken_apart_the_module_runs(monkeypatch):
    conv, sync = nn.Conv2d(4, 4, 1).requires_grad_(False), nn.SyncBatchNorm(4).requires_grad_(False)
    x = torch.randn(2, 4, 3, 3)
    assert is_plain(sync)
    assert sync_group(sync) is None
    plain = []
    torch.func.vmap(lambda x: plain.append(is_plain(sync)) or x)(x)
    assert plain == [False]
    called = []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, z: called.append(self.training) or z)
    run_unit([x], conv, sync)
    assert not called
    torch.jit.trace(lambda x: run_unit([x], conv, sync), x, check_trace=False)
    assert called == [True]
    sync.eval()
    torch.jit.trace(lambda x: run_unit([x], conv, sync), x, check_trace=False)
    assert called == [True]


@pytest.mark.parametrize("training", [True, False])
def test_compiled(training):
    torch._dynamo.reset()
    root = nn.SyncBatchNorm.convert_sync_batchnorm(randomise(Root(12, 6))).train(training)
    twin = copy.deepcopy(root)
    assert dla_fast.swap_(twin).swapped
    xs, targets = [torch.randn(2, 6, 4, 3) for _ in range(2)], []

    def keep(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.testing.assert_close(torch.compile(twin, backend=keep, fullgraph=True)(*xs), root(*xs))
    for got, want in zip(twin.buffers(), root.buffers(), strict=True):
        torch.testing.assert_close(got, want)
    fused = any("dla_fast" in target for target in targets)
    assert fused == (not training and dla_fast.backend.selected() != "reference")
