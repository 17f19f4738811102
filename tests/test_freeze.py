"""freeze_ and unfreeze_: the unfrozen model's results in every mode, and what else a frozen model is put through."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from freeze_helpers import (
    LADDER_UNITS,
    TOLERANCE,
    Ladder,
    assert_same,
    counting,
    infer,
    ladder,
    needs_kernels,
    optimizer_step,
    states,
    unfrozen,
)
from model_helpers import randomise, relative, tiny
from swap_helpers import Pair, inputs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dla_fast
from dla_fast import use_backend
from dla_fast.models import DLASeg
from dla_fast.nn import AggregationNode
from dla_fast.nn import frozen as frozen_module
from dla_fast.ops import packed

calls = counting()


def swapped_timm(timm):
    model = timm.create_model("dla34", num_classes=5)
    dla_fast.swap_(model, verify=False)
    return model


NETWORKS = {
    "own": lambda timm: tiny(),
    "dense": lambda timm: DLASeg(tiny(features_only=True), num_classes=3),
    "timm": swapped_timm,
}
CASES = [(name, dtype) for name in ("own", "dense") for dtype in TOLERANCE] + [("timm", torch.float32)]


@needs_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name, dtype", CASES)
def test_networks(timm, calls, name, dtype, layout, mode):
    model = randomise(NETWORKS[name](timm)).eval().to(dtype)
    x = torch.randn(2, 3, 32, 64, dtype=dtype).to(memory_format=layout)
    with torch.no_grad():
        want = model(x)
    report = dla_fast.freeze_(model)
    assert report.bytes == 0
    with mode():
        for _ in range(2):
            y = model(x)
            if dtype.itemsize > 2:
                assert_same(y, want)
    assert calls == {"pack": report.units, "run": 2 * report.units}
    assert report.bytes > 0
    assert f"{report.units} units" in str(report)


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, layout):
    """A weight that a norm was folded into is rounded too: no more than the operators round between them.

    Over several draws: the error of one network's output is a matter of luck.
    """
    frozen = plain = 0.0
    for seed in range(8):
        torch.manual_seed(seed)
        model = randomise(tiny()).eval().to(dtype)
        x = torch.randn(2, 3, 32, 64, dtype=dtype).to(memory_format=layout)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            with use_backend("reference"):
                plain += ((model(x).double() - exact).norm() / exact.norm()).square().item()
        dla_fast.freeze_(model)
        frozen += ((infer(model, x).double() - exact).norm() / exact.norm()).square().item()
    assert frozen <= 4 * plain


@needs_kernels
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_goes_through(dtype, stride):
    model = nn.Sequential(nn.Conv2d(40, 40, 3, stride, 1), nn.BatchNorm2d(40), nn.ReLU()).eval().to(dtype)
    dla_fast.swap_(model)
    x = torch.randn(2, 40, 9, 9, dtype=dtype).to(memory_format=torch.channels_last)
    x[0, 3, 4, 4] = torch.nan
    want = infer(model, x).isnan()
    dla_fast.freeze_(model)
    assert want.any()
    assert torch.equal(infer(model, x).isnan(), want)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@needs_kernels
def test_maps_of_growing_sizes_are_not_all_kept():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    model = nn.Sequential(nn.Conv2d(8, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()).eval()
    dla_fast.swap_(model, verify=False)
    dla_fast.freeze_(model)
    before = resident()
    with torch.inference_mode():
        for height in range(100, 300, 4):
            model(torch.randn(1, 8, height, 200))
    largest = 300 * 200 * 64 * 4
    assert resident() - before < 6 * largest


def test_the_maps_of_a_model_that_is_gone_are_freed(monkeypatch):
    released = []
    monkeypatch.setattr(packed, "release_maps", lambda: released.append(None))
    model, x = ladder()
    dla_fast.freeze_(model)
    infer(model, x)
    del model
    gc.collect()
    assert released


def test_unfreezing_frees_the_maps_that_are_kept(monkeypatch):
    released = []
    monkeypatch.setattr(packed, "release_maps", lambda: released.append(None))
    model, x = ladder()
    dla_fast.freeze_(model)
    infer(model, x)
    assert not released
    dla_fast.unfreeze_(model)
    assert released


def test_nothing_else_changes():
    model, x = ladder()
    before = {name: (t, t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        want = model(x)
    assert dla_fast.freeze_(model).units == LADDER_UNITS
    infer(model, x)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, values, version) in before.items():
        assert after[name] is tensor
        assert tensor._version == version
        assert torch.equal(tensor, values)
    assert dla_fast.unfreeze_(model) == LADDER_UNITS
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        assert torch.equal(model(x), want)
    assert dla_fast.unfreeze_(model) == 0


def test_devices():
    model, x = ladder()
    report = dla_fast.freeze_(model)
    infer(model, x)
    model.to("meta")
    assert infer(model, x.to("meta")).shape == (2, 8, 6, 4)
    assert report.bytes == 0


def test_training_frees_what_is_kept():
    model, x = ladder()
    report = dla_fast.freeze_(model)
    infer(model, x)
    other = copy.deepcopy(model)
    dla_fast.unfreeze_(other)
    for m in (model, other):
        m.train()
        m(x).square().mean().backward()
    assert report.bytes == 0
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


@needs_kernels
def test_gradients_in_evaluation(calls):
    model, x = ladder()
    dla_fast.freeze_(model)
    infer(model, x)
    calls["run"] = 0
    other = copy.deepcopy(model)
    dla_fast.unfreeze_(other)
    with pytest.warns(UserWarning, match="gradients enabled") as said:
        grads = [torch.autograd.grad(model(x).sum(), list(model.parameters())) for _ in range(2)][1]
    assert len(said) == 1
    want = torch.autograd.grad(other(x).sum(), list(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
    assert calls["run"] == 0
    # An input alone may need a gradient; where nothing does, there is nothing to say.
    model.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert calls["run"] == 0
    dla_fast.unfreeze_(model)
    dla_fast.freeze_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    assert calls["run"] == LADDER_UNITS


@needs_kernels
def test_autocast(calls):
    model, x = ladder()
    dla_fast.freeze_(model)
    infer(model, x)
    calls["run"] = 0
    with torch.autocast("cpu", torch.bfloat16):
        y = infer(model, x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, unfrozen(model, x))
    assert calls["run"] == 0
    model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(infer(model, x.bfloat16()), unfrozen(model, x.bfloat16()))
    assert calls["run"] == LADDER_UNITS


@needs_kernels
def test_calls_that_are_taken_apart(calls):
    model, x = ladder()
    dla_fast.freeze_(model)
    want = infer(model, x)
    calls["run"] = 0
    others = {
        "compile": lambda: torch.compile(model, backend="eager", fullgraph=True)(x),
        "export": lambda: torch.export.export(model, (x,)).module()(x),
        "trace": lambda: torch.jit.trace(model, (x,), check_trace=False)(x),
        "vmap": lambda: torch.func.vmap(model)(torch.stack([x, x]))[1],
        "jvp": lambda: torch.func.jvp(model, (x,), (x,))[0],
    }
    with torch.no_grad():
        for name, call in others.items():
            assert relative(call(), want) < 1e-5, name
            assert calls["run"] == 0, name
        with FlopCounterMode(display=False) as counted:
            model(x)
        assert counted.get_total_flops() > 0
    with use_backend("reference"):
        assert relative(infer(model, x), want) < 1e-5
    # A view of what is negated once it is read.
    negated = torch.complex(x, -x).conj().imag
    assert relative(infer(model, negated), want) < 1e-5
    assert negated.is_neg()
    assert calls["run"] == LADDER_UNITS - 2


@needs_kernels
def test_threads(calls):
    """The first calls at once, each with values of its own, and calls while weights move in between."""
    model, _ = ladder()
    dla_fast.freeze_(model)
    images = [torch.randn(2, 8, 6, 4) for _ in range(4)]
    together = Barrier(4)

    def often(i):
        found = []
        for _ in range(3):
            together.wait()
            found.append([infer(model, images[i]) for _ in range(4)])
            if together.wait() == 0:
                optimizer_step(model)
            together.wait()
        return found

    replayed = copy.deepcopy(model)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(often, range(4)))
    for turn in range(3):
        for i, x in enumerate(images):
            want = infer(replayed, x)
            assert all(torch.equal(y, want) for y in results[i][turn])
        optimizer_step(replayed)
    assert calls["run"] == (4 * 3 * 4 + 3 * 4) * LADDER_UNITS


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@needs_kernels
@pytest.mark.parametrize("again", [copied, pickled, saved], ids=lambda f: f.__name__)
def test_copies(calls, again):
    model, x = ladder()
    dla_fast.freeze_(model)
    want = infer(model, x)
    other = again(model)
    assert len(states(other)) == LADDER_UNITS
    assert not {id(s) for s in states(other)} & {id(s) for s in states(model)}
    assert all(s.nbytes == 0 for s in states(other))
    assert len({id(s.model) for s in states(other)}) == 1
    calls["run"] = 0
    assert torch.equal(infer(other, x), want)
    assert calls["run"] == LADDER_UNITS
    optimizer_step(other)
    assert relative(infer(other, x), want) > 1e-3
    dla_fast.unfreeze_(other)
    assert torch.equal(infer(model, x), want)


@needs_kernels
def test_replicas(calls):
    """DataParallel's copies have the state of the original, and plain attributes for parameters."""
    model = randomise(nn.Sequential(AggregationNode(8, 8))).eval()
    x = torch.randn(2, 8, 5, 3)
    dla_fast.freeze_(model)
    want = infer(model, x)
    replica = model[0]._replicate_for_data_parallel()
    for name, child in model[0].named_children():
        part = child._replicate_for_data_parallel()
        for key, p in child._parameters.items():
            if p is None:
                part._parameters[key] = None
            else:
                setattr(part, key, p.detach() * 2)
        replica._modules[name] = part
    model[0].conv.weight.data.mul_(2)
    for p in model[0].bn.parameters():
        p.data.mul_(2)
    calls["run"] = 0
    got = infer(replica, x)
    assert calls["run"] == 0
    assert_same(got, unfrozen(model, x))
    assert relative(got, want) > 1e-3


@needs_kernels
def test_one_convolution_behind_two_norms(calls):
    first = randomise(AggregationNode(8, 8)).eval()
    second = randomise(AggregationNode(8, 8)).eval()
    second.conv = first.conv
    model, x = nn.Sequential(first, second), torch.randn(2, 8, 5, 3)
    assert dla_fast.freeze_(model).units == 1
    for _ in range(3):
        assert_same(infer(model, x), unfrozen(model, x))
    assert calls == {"pack": 2, "run": 6}


@needs_kernels
def test_many_sizes(calls, monkeypatch):
    """What is remembered of calls has a bound, and a weight is packed once for all of them."""
    monkeypatch.setattr(frozen_module, "CALLS", 2)
    model = randomise(AggregationNode([8, 16], 8, residual=True, act=("leaky_relu", 0.2))).eval()
    dla_fast.freeze_(model)
    for side in (3, 5, 7, 9, 3):
        xs = [torch.randn(1, c, side, 4) for c in (8, 16)]
        assert_same(infer(model, xs), unfrozen(model, xs))
        model.act = "silu" if model.act == "relu" else "relu"
        assert_same(infer(model, xs), unfrozen(model, xs))
    assert calls == {"pack": 1, "run": 10}
    (state,) = states(model)
    assert len(next(iter(state._folded.values())).calls) <= 2


@needs_kernels
def test_wrong_inputs_are_told_as_before(calls):
    model = AggregationNode(16, 8).eval()
    wrong = [torch.randn(2, 8, 5, 3), torch.randn(2, 8, 5, 4)]
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            infer(model, wrong)
        errors.append(str(error.value))
        dla_fast.freeze_(model)
    assert errors[0] == errors[1]
    assert calls["run"] == 0


@needs_kernels
def test_inference_tensors(calls):
    with torch.inference_mode():
        model = randomise(Ladder()).eval()
        x = torch.randn(2, 8, 6, 4)
    dla_fast.freeze_(model)
    assert_same(infer(model, x), unfrozen(model, x))
    with torch.inference_mode():
        model.load_state_dict({k: v * 0.7 for k, v in model.state_dict().items()})
    assert_same(infer(model, x), unfrozen(model, x))
    assert calls == {"pack": 2 * LADDER_UNITS, "run": 2 * LADDER_UNITS}


def test_errors():
    for function in (dla_fast.freeze_, dla_fast.unfreeze_):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
            function("model")
    with pytest.raises(ValueError, match=r"call dla_fast.swap_\(model\) before"):
        dla_fast.freeze_(Pair().eval())
    model, _ = ladder()
    model.block.bn2.train()
    with pytest.raises(ValueError, match=r"block.bn2 is in training mode; call model.eval\(\)"):
        dla_fast.freeze_(model)
    assert not states(model)
    # The mode of a norm that no unit has is none of its business.
    other = nn.Sequential(nn.BatchNorm2d(8), AggregationNode(8, 8).eval())
    assert dla_fast.freeze_(other).units == 1


def test_freezing_again():
    model, x = ladder()
    dla_fast.freeze_(model)
    want = infer(model, x)
    before = states(model)
    report = dla_fast.freeze_(model)
    assert report.units == LADDER_UNITS
    assert all(a is b for a, b in zip(states(model), before, strict=True))
    assert torch.equal(infer(model, x), want)
    assert dla_fast.unfreeze_(model) == LADDER_UNITS
    assert not states(model)


@needs_kernels
def test_swapping_before_and_after(calls):
    model, xs = randomise(Pair()).eval(), inputs()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    dla_fast.swap_(model, filter_fn=lambda name, module: name == "first")
    assert dla_fast.freeze_(model).units == 1
    infer(model, *xs)
    dla_fast.swap_(model)
    assert_same(infer(model, *xs), unfrozen(model, *xs))
    assert calls["run"] == 2
    assert dla_fast.freeze_(model).units == 2
    assert_same(infer(model, *xs), unfrozen(model, *xs))
    assert calls["run"] == 4
    dla_fast.unswap_(model)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert dla_fast.unfreeze_(model) == 0


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(self.conv(x)).tanh()


@needs_kernels
def test_units_of_a_sequential(calls):
    """Of what a swapped module holds, its units alone."""
    model = randomise(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU(), Foreign(), nn.Conv2d(8, 4, 1)))
    dla_fast.swap_(model.eval())
    assert dla_fast.freeze_(model).units == 1
    x = torch.randn(1, 8, 5, 3)
    assert_same(infer(model, x), unfrozen(model, x))
    assert calls == {"pack": 1, "run": 1}
    model[3].bn.train()
    dla_fast.freeze_(model)


def test_scripting_leaves_nothing():
    model = randomise(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())).eval()
    x = torch.randn(1, 8, 3, 3)
    dla_fast.swap_(model)
    dla_fast.freeze_(model)
    want = infer(model, x)
    with pytest.warns(UserWarning, match="was unswapped"):
        scripted = torch.jit.script(model)
    assert relative(infer(scripted, x), want) < 1e-5
    assert not states(model)
