"""swap_ on IDA ladders as detectors and segmenters write them."""

from __future__ import annotations

import collections
import copy
import pickle

import pytest
import torch
from swap_helpers import relative
from torch import nn

import dla_fast
from dla_fast.swap import ida


def transposed(channels, f):
    return nn.ConvTranspose2d(channels, channels, 2 * f, stride=f, padding=f // 2, groups=channels, bias=False)


class DeformConv(nn.Module):
    """Called so in detectors whose deformable convolution has become a plain one."""

    def __init__(self, inputs, outputs, make=None):
        super().__init__()
        self.actf = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
        self.conv = make(inputs, outputs) if make else nn.Conv2d(inputs, outputs, 3, padding=1, bias=True)

    def forward(self, x):
        return self.actf(self.conv(x))


class Gated(nn.Module):
    """A convolution that no kernel knows."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_channels, self.out_channels = inputs, outputs
        self.value = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.gate = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x):
        return self.value(x) * self.gate(x).sigmoid()


def sequential(inputs, outputs, kernel):
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SegmenterIDAUp(nn.Module):
    """(layers) -> (x, y), the first layer projected too, concat; the caller's list untouched."""

    def __init__(self, out=6, channels=(6, 8, 5), factors=(1, 2, 4)):
        super().__init__()
        self.count = len(channels)
        for i, (c, f) in enumerate(zip(channels, factors, strict=True)):
            setattr(self, f"proj_{i}", nn.Identity() if c == out else sequential(c, out, 1))
            setattr(self, f"up_{i}", nn.Identity() if f == 1 else transposed(out, f))
        for i in range(1, self.count):
            setattr(self, f"node_{i}", sequential(2 * out, out, 3))

    def forward(self, layers):
        layers = [getattr(self, f"up_{i}")(getattr(self, f"proj_{i}")(x)) for i, x in enumerate(layers)]
        x, y = layers[0], []
        for i in range(1, self.count):
            x = getattr(self, f"node_{i}")(torch.cat([x, layers[i]], 1))
            y.append(x)
        return x, y


class DetectorIDAUp(nn.Module):
    """(layers, startp, endp) -> None: adds, and writes into the caller's list."""

    def __init__(self, out=6, channels=(6, 8, 5), factors=(1, 2, 4), make=None):
        super().__init__()
        for i in range(1, len(channels)):
            setattr(self, f"proj_{i}", DeformConv(channels[i], out, make))
            setattr(self, f"node_{i}", DeformConv(out, out, make))
            setattr(self, f"up_{i}", transposed(out, factors[i]))

    def forward(self, layers, startp, endp):
        for i in range(startp + 1, endp):
            j = i - startp
            layers[i] = getattr(self, f"up_{j}")(getattr(self, f"proj_{j}")(layers[i]))
            layers[i] = getattr(self, f"node_{j}")(layers[i] + layers[i - 1])


class ReturningIDAUp(nn.Module):
    """(layers) -> layers, written into: concat, the newly upsampled map first."""

    def __init__(self, out=6, channels=(6, 8, 5), factors=(1, 2, 4), reverse=True, node=3):
        super().__init__()
        self.count, self.reverse = len(channels), reverse
        for i in range(1, self.count):
            setattr(self, f"proj_{i}", sequential(channels[i], out, 3))
            setattr(self, f"up_{i}", transposed(out, factors[i]))
            setattr(self, f"node_{i}", sequential(2 * out, out, node))

    def forward(self, layers):
        for i in range(1, self.count):
            layers[i] = getattr(self, f"up_{i}")(getattr(self, f"proj_{i}")(layers[i]))
            both = [layers[i], layers[i - 1]] if self.reverse else [layers[i - 1], layers[i]]
            layers[i] = getattr(self, f"node_{i}")(torch.cat(both, 1))
        return layers


class ListIDAUp(nn.Module):
    """ModuleLists, a range of the caller's list, add."""

    def __init__(self, out=6, channels=(6, 8, 5), factors=(1, 2, 4)):
        super().__init__()
        self.projs, self.ups, self.nodes = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for c, f in zip(channels[1:], factors[1:], strict=True):
            self.projs.append(DeformConv(c, out))
            self.ups.append(transposed(out, f))
            self.nodes.append(DeformConv(out, out))

    def forward(self, mlvl_features, start_level, end_level):
        for i in range(start_level, end_level - 1):
            j = i - start_level
            mlvl_features[i + 1] = self.ups[j](self.projs[j](mlvl_features[i + 1]))
            mlvl_features[i + 1] = self.nodes[j](mlvl_features[i + 1] + mlvl_features[i])


KINDS = {
    "segmenter": SegmenterIDAUp,
    "detector": DetectorIDAUp,
    "unknown convolution": lambda: DetectorIDAUp(make=Gated),
    "returning": ReturningIDAUp,
    "returning, previous first, 1x1": lambda: ReturningIDAUp(reverse=False, node=1),
    "lists": ListIDAUp,
}


def call(module, layers):
    if isinstance(module, (DetectorIDAUp, ListIDAUp)):
        return module(layers, 1, len(layers))
    return module(layers)


def levels(module, **kwargs):
    sides = [torch.randn(2, c, s, s, **kwargs) for c, s in ((6, 8), (8, 4), (5, 2))]
    extra = [torch.randn(2, 3, 8, 8, **kwargs)] if isinstance(module, (DetectorIDAUp, ListIDAUp)) else []
    return [*extra, *sides]


def flat(result):
    if isinstance(result, (list, tuple)):
        return [t for item in result for t in flat(item)]
    return [] if result is None else [result]


@pytest.fixture
def fused_calls(monkeypatch):
    """Grows with every call of a swapped ladder that takes the fused path; verification runs on copies."""
    calls = []
    run = ida.run_ida

    def counted(module, *args):
        if isinstance(module, ida.FusedIDA):
            calls.append(module)
        return run(module, *args)

    monkeypatch.setattr(ida, "run_ida", counted)
    return calls


def randomise(module):
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        if t.is_floating_point():
            nn.init.uniform_(t, 0.5, 1.5) if "running_var" in name else nn.init.normal_(t, 0, 0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_same_outputs_gradients_list_and_keys(fused_calls, kind, training, layout):
    module = KINDS[kind]().double().train(training)
    randomise(module)
    twin = copy.deepcopy(module)
    report = dla_fast.swap_(twin)
    alone = "0 of 4 units fused whole; proj_1, proj_2, node_1, node_2: the tail alone, behind Gated"
    remark = alone if kind == "unknown convolution" else ""
    assert [(e.kind, e.reason) for e in report.swapped] == [("merge", remark)], report
    assert list(twin.state_dict()) == list(module.state_dict())
    start = [x.to(memory_format=layout) for x in levels(module, dtype=torch.float64)]
    outcomes = []
    for m in (module, twin):
        leaves = [x.clone().requires_grad_() for x in start]
        given = list(leaves)
        result = call(m, given)
        tensors = [*flat(result), *given]
        loss = sum((i + 1) * t.square().mean() for i, t in enumerate(tensors))
        grads = torch.autograd.grad(loss, [*leaves, *m.parameters()])
        written = [a is not b for a, b in zip(leaves, given, strict=True)]
        outcomes.append((type(result), result is given, written, [*tensors, *grads, *m.buffers()]))
    assert fused_calls == [twin]
    before, after = outcomes
    assert before[:3] == after[:3]
    for a, b in zip(after[3], before[3], strict=True):
        assert a.shape == b.shape
        # The gradient of a bias before a batch norm is truly zero: rounding, not to be compared with itself.
        assert (a - b).abs().max() <= 1e-9 * max(b.abs().max().item(), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_restored_copied_and_pickled(kind):
    module = KINDS[kind]().eval()
    cls, parameters = type(module), list(module.parameters())
    dla_fast.swap_(module)
    assert isinstance(module, cls)
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    again = dla_fast.swap_(module)
    assert not again.swapped
    assert again.skipped[0].reason == "already swapped (backend auto)"
    layers = levels(module)
    want = list(layers)
    call(module, want)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):  # noqa: S301
        assert type(other) is type(module)
        got = list(layers)
        call(other, got)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert dla_fast.unswap_(module) == 1
    assert type(module) is cls


def test_only_the_norm_is_fused_behind_an_unknown_convolution():
    module = dla_fast_swapped(DetectorIDAUp(make=Gated))
    seen = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    with Record(), torch.no_grad():
        call(module, levels(module))
    assert seen.count("upsample_add") == 2
    assert seen.count("tail") == 4
    assert "conv_norm_act_inference" not in seen
    assert "native_batch_norm" not in seen


def dla_fast_swapped(module):
    module.eval()
    assert dla_fast.swap_(module).swapped
    return module


def test_a_detector_s_neck(fused_calls):
    """Ladders inside ladders, as a detector runs them, with its roots beside."""

    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.ida_0 = DetectorIDAUp(8, (8, 12), (1, 2))
            self.ida_1 = DetectorIDAUp(6, (6, 8, 8), (1, 2, 2))

        def forward(self, layers):
            out = [layers[-1]]
            for k in range(len(layers) - 1):
                getattr(self, f"ida_{k}")(layers, len(layers) - k - 2, len(layers))
                out.insert(0, layers[-1])
            return out

    neck = Neck().eval()
    twin = copy.deepcopy(neck)
    report = dla_fast.swap_(twin)
    assert [e.name for e in report.swapped] == ["ida_0", "ida_1"]
    layers = [torch.randn(1, c, 16 >> i, 16 >> i) for i, c in enumerate((6, 8, 12))]
    with torch.no_grad():
        want, got = neck(list(layers)), twin(list(layers))
    assert len(fused_calls) == 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_ladder_that_has_changed_runs_its_own_way(fused_calls):
    module = dla_fast_swapped(SegmenterIDAUp())
    layers = levels(module)
    want, _ = module(layers)
    assert len(fused_calls) == 1
    seen = []
    module.node_1.register_forward_hook(lambda *a: seen.append("node"))
    module.up_2.register_forward_hook(lambda *a: seen.append("up"))
    got, _ = module(layers)
    assert seen == ["node", "up"]
    torch.testing.assert_close(got, want)
    module.node_2[1] = nn.InstanceNorm2d(6)
    assert module(layers)[0].shape == want.shape
    with pytest.raises(RuntimeError):
        module([x.double() for x in layers])
    assert len(fused_calls) == 3, "inputs of another dtype go the original's way, and fail as there"


def test_autocast(fused_calls):
    module = SegmenterIDAUp().eval()
    twin = dla_fast_swapped(copy.deepcopy(module))
    layers = levels(module)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = module(layers)[0], twin(layers)[0]
    assert got.dtype == want.dtype
    assert relative(got.float(), want.float()) < 0.03
    assert len(fused_calls) == 1


@pytest.mark.parametrize("kind", ["segmenter", "detector", "returning", "lists"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_of_layers_of_two_dtypes(fused_calls, kind, training):
    """The backbone's first level in float32, as its own norms left it, and the others in bfloat16."""
    module = KINDS[kind]().train(training)
    randomise(module)
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin).swapped
    start = [x if i < 2 else x.bfloat16() for i, x in enumerate(levels(module))]
    runs = []
    for m in (module, twin):
        leaves = [x.clone().requires_grad_() for x in start]
        given = list(leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = [*flat(call(m, given)), *given]
        grads = torch.autograd.grad(sum(t.float().square().mean() for t in made), [*leaves, *m.parameters()])
        runs.append(([t.dtype for t in (*made, *grads)], [*made, *grads]))
    assert fused_calls == [twin]
    assert runs[0][0] == runs[1][0]
    for got, want in zip(runs[1][1], runs[0][1], strict=True):
        # The gradient of a bias before a batch norm is truly zero.
        assert (got - want).float().abs().max() <= 0.06 * max(want.float().abs().max().item(), 0.02)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "up_1", nn.Upsample(scale_factor=2)), "up_1: not a depthwise transposed convolution"),
        (lambda m: delattr(m, "node_1"), "nodes are numbered"),
        (lambda m: delattr(m, "up_2"), "projections are numbered"),
        (lambda m: setattr(m, "forward", m.forward), "its forward is replaced on the instance"),
    ],
)
def test_reasons(change, reason):
    module = SegmenterIDAUp()
    change(module)
    report = dla_fast.swap_(module, units="ladders")
    assert not report.swapped
    assert report.skipped[0].reason.startswith(reason), report.skipped[0].reason


def test_another_order_is_not_taken_for_a_ladder():
    class Scaled(SegmenterIDAUp):
        def forward(self, layers):
            x, y = super().forward(layers)
            return 2 * x, y

    report = dla_fast.swap_(Scaled(), units="ladders")
    assert not report.swapped
    assert "forward gives something else" in report.skipped[0].reason


def test_our_own_ladders_are_fused_already():
    report = dla_fast.swap_(dla_fast.nn.DLAUp((4, 6, 8)))
    assert [(e.name, e.reason) for e in report.skipped] == [
        ("ida_0", "already fused: dla_fast.nn.IDAUp"),
        ("ida_1", "already fused: dla_fast.nn.IDAUp"),
    ]


@pytest.mark.parametrize("kind", ["segmenter", "detector", "returning", "unknown convolution"])
def test_what_belongs_to_a_ladder_is_swapped_once(fused_calls, kind):
    """Its Sequentials are the ladder's, whether they were swapped before it or not, and stay so at the next swap."""
    module = KINDS[kind]().eval()
    randomise(module)
    layers = levels(module)
    want = list(layers)
    call(module, want)
    for first in ((), "convs"):
        twin = copy.deepcopy(module)
        before = len(dla_fast.swap_(twin, units=first).swapped) if first else 0
        assert before == (4 if first else 0)
        report = dla_fast.swap_(twin)
        assert [(e.name, e.kind) for e in report.swapped] == [("", "merge")]
        assert not dla_fast.swap_(twin).swapped
        fused_calls.clear()
        seen = collections.Counter()

        class Record(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, seen=seen):
                seen[func._schema.name.split("::")[1]] += 1
                return func(*args, **(kwargs or {}))

        got = list(layers)
        with Record(), torch.no_grad():
            call(twin, got)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert fused_calls == [twin]
        # A node that upsamples one of its inputs on the way leaves nothing to upsample.
        assert seen["upsample"] == 0
        assert dla_fast.unswap_(twin) == before + 1
