"""swap_ on residual blocks and on runs of convolution, norm and activation, and on whole networks with all of them."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import randomise, relative
from swap_helpers import Root
from torch import nn
from torch.nn.utils import parametrizations

import dla_fast
from dla_fast.swap import block, convs

# Nodes, blocks and convs.
NETWORKS = {
    "dla34": (6, 12, 7),
    "dla46_c": (6, 12, 6),
    "dla46x_c": (6, 12, 6),
    "dla60x_c": (8, 16, 6),
    "dla60": (8, 16, 7),
    "dla60x": (8, 16, 7),
    "dla102": (14, 28, 7),
    "dla102x": (14, 28, 7),
    "dla102x2": (14, 28, 7),
    "dla169": (23, 46, 7),
    "resnet18": (0, 8, 3),
    "resnet50": (0, 16, 4),
    "torchvision resnet18": (0, 8, 3),
    "torchvision resnet50": (0, 16, 4),
    # A stem of three convolutions, and shortcuts that are pooled first.
    "resnet26d": (0, 8, 5),
    # Blocks of two 3x3 convolutions in a ModuleList are none that are known.
    "dla60_res2net": (8, 0, 7),
}


def create(timm, name: str) -> nn.Module:
    if name.startswith("torchvision "):
        return getattr(importlib.import_module("torchvision.models"), name.split()[1])(num_classes=10)
    return timm.create_model(name, num_classes=10)


class BasicBlock(nn.Module):
    """Shaped like the original DLA's, which detectors have copied."""

    def __init__(self, inplanes=8, planes=8, stride=1, dilation=1):
        super().__init__()
        options = {"kernel_size": 3, "padding": dilation, "bias": False, "dilation": dilation}
        self.conv1 = nn.Conv2d(inplanes, planes, stride=stride, **options)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, **options)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride

    def forward(self, x, residual=None):
        if residual is None:
            residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += residual
        return self.relu(out)


class BottleneckX(nn.Module):
    """The original's split block, its activations children of their own."""

    def __init__(self, inplanes=8, planes=8, stride=1, act=nn.ReLU):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, 8, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(8), act()
        self.conv2 = nn.Conv2d(8, 8, 3, stride, 1, groups=4, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(8), act()
        self.conv3 = nn.Conv2d(8, planes, 1, bias=False)
        self.bn3, self.act3 = nn.BatchNorm2d(planes), act()

    def forward(self, x, shortcut=None, children=None):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(y)))))
        return self.act3(y + (x if shortcut is None else shortcut))


class Projected(BasicBlock):
    """A ResNet's: the shortcut is made by a child, if there is one."""

    def __init__(self, inplanes=8, planes=12, stride=2):
        super().__init__(inplanes, planes, stride)
        self.drop_block, self.se = nn.Identity(), None
        self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        return super().forward(x, x if self.downsample is None else self.downsample(x))


class Functional(BasicBlock):
    """Without activations among its children, the shortcut an empty Sequential."""

    act = staticmethod(F.relu)

    def __init__(self):
        super().__init__()
        del self.relu
        self.shortcut = nn.Sequential()

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Required(Functional):
    """As the examples have it: a shortcut is always given."""

    def __init__(self, inplanes=8, planes=8, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, 8, 3, stride, 1)
        del self.shortcut

    def forward(self, x, shortcut):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class Small(nn.Module):
    """Everything that swap_ knows but a ladder."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AvgPool2d(2)
        )
        self.first, self.second, self.third = Projected(), BasicBlock(12, 12), BottleneckX(12, 12, act=nn.SiLU)
        self.root = Root(36, 8)
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Conv2d(8, 5, 1))

    def forward(self, x):
        a = self.first(self.stem(x))
        b = self.second(a)
        return self.head(self.root(self.third(b, a), b, a))


@pytest.fixture
def fused_calls(monkeypatch):
    """Grows with every block and every run that takes the fused path; verification is over by then."""
    calls = []

    def counting(name, run):
        def counted(*args, **kwargs):
            calls.append(name)
            return run(*args, **kwargs)

        return counted

    monkeypatch.setattr(block, "run_block", counting("block", block.run_block))
    monkeypatch.setattr(convs, "run_unit_on", counting("run", convs.run_unit_on))
    return calls


def swapped_pair(module, **options):
    randomise(module)
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin, on_unsupported="raise", **options).swapped
    return module, twin


def outcome(module, *xs, training):
    module.train(training)
    leaves = [x.clone().requires_grad_() for x in xs]
    y = module(*leaves)
    # Not materialised: a child that a shortcut leaves out has no gradient on either side.
    grads = torch.autograd.grad(y.square().mean(), [*leaves, *module.parameters()], allow_unused=True)
    return [y, *grads, *module.buffers()]


def assert_same(module, twin, *xs, bound=1e-9):
    for training in (False, True):
        for got, want in zip(*(outcome(m, *xs, training=training) for m in (twin, module)), strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                # The gradient of a bias before a batch norm is truly zero: rounding, not to be compared with itself.
                assert (got - want).abs().max() <= bound * max(want.abs().max().item(), 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(timm, name):
    model = create(timm, name).double()
    twin = copy.deepcopy(model)
    report = dla_fast.swap_(twin, verify=False)
    nodes, blocks, runs = NETWORKS[name]
    assert report.counts() == {"nodes": nodes, "ladders": 0, "blocks": blocks, "convs": runs}
    assert not report.skipped, report
    assert list(twin.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        with torch.no_grad():
            y, z = model.train(training)(x), twin.train(training)(x)
        assert relative(z, y) <= 1e-8
    for got, want in zip(twin.buffers(), model.buffers(), strict=True):
        assert relative(got.double(), want.double()) <= 1e-8
    assert dla_fast.unswap_(twin) == nodes + blocks + runs
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", ["dla46x_c", "resnet18", "torchvision resnet18"])
def test_verified_whole_networks(timm, name):
    report = dla_fast.swap_(create(timm, name), on_unsupported="raise")
    assert len(report.swapped) == sum(NETWORKS[name])
    assert not report.skipped
    assert {e.reason for e in report.swapped} == {""}


BLOCKS = {
    "original": (BasicBlock, [(2, 8, 6, 4)]),
    "original, given a shortcut": (lambda: BasicBlock(8, 12, 2), [(2, 8, 6, 4), (2, 12, 3, 2)]),
    "dilated": (lambda: BasicBlock(8, 8, 1, 2), [(2, 8, 6, 4)]),
    "split": (BottleneckX, [(2, 8, 6, 4)]),
    "split, given a shortcut, silu": (
        lambda: BottleneckX(8, 12, 2, nn.SiLU),
        [(2, 8, 6, 4), (2, 12, 3, 2)],
    ),
    "projected": (Projected, [(2, 8, 6, 4)]),
    "functional activations": (Functional, [(2, 8, 6, 4)]),
    "required shortcut": (lambda: Required(4, 8, 2), [(2, 4, 6, 4), (2, 8, 3, 2)]),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks(fused_calls, case):
    make, shapes = BLOCKS[case]
    module, twin = swapped_pair(make().double())
    fused_calls.clear()
    assert_same(module, twin, *(torch.randn(shape, dtype=torch.float64) for shape in shapes))
    assert fused_calls.count("block") == 2


@pytest.mark.parametrize("act", [nn.ReLU(True), nn.LeakyReLU(0.2), nn.Hardswish(), nn.ReLU6(), None], ids=str)
def test_runs(fused_calls, act):
    layers = [nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), act]
    layers += [nn.Conv2d(6, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU()]
    module, twin = swapped_pair(nn.Sequential(*filter(None, layers)).double())
    fused_calls.clear()
    assert_same(module, twin, torch.randn(2, 4, 12, 12, dtype=torch.float64))
    assert fused_calls == ["run"] * 4
    assert isinstance(twin, nn.Sequential)
    assert dla_fast.unswap_(twin) == 1
    assert type(twin) is nn.Sequential


def test_a_sequential_without_runs_is_no_candidate():
    class Own(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    class Inherited(nn.Sequential):
        pass

    run = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.ModuleList(
        [
            nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU()),
            nn.Sequential(),
            Own(*run),
            Inherited(*run),
        ]
    )
    report = dla_fast.swap_(model)
    assert [(e.name, e.kind) for e in report.swapped] == [("4", "conv")]
    assert not report.skipped
    assert not dla_fast.swap_(model[4]).swapped


def test_units_choose():
    for units, kinds in (
        ("blocks", ["block"] * 3),
        (("nodes", "convs"), ["conv", "conv", "aggregate"]),
        (["ladders"], []),
        (("nodes", "ladders", "blocks", "convs"), ["conv", "block", "conv", "block", "block", "aggregate"]),
    ):
        model = Small()
        report = dla_fast.swap_(model, units=units)
        assert [e.kind for e in report.swapped] == kinds
        assert not report.skipped
    assert str(report).startswith("swapped 6 (nodes 1, blocks 3, convs 2), skipped 0\n")
    assert [e.reason for e in dla_fast.swap_(model, units="blocks").skipped] == ["already swapped (backend auto)"] * 3


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def test_everything_is_kept_and_restored(fused_calls):
    model = randomise(Small()).eval()
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    kept = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    keys, parameters, rng = list(model.state_dict()), list(model.parameters()), torch.get_rng_state()
    assert len(dla_fast.swap_(model, backend="reference").swapped) == 6
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not dla_fast.swap_(model).swapped
    fused_calls.clear()
    for journey in (copy.deepcopy, _through_pickle):
        twin = journey(model)
        torch.testing.assert_close(twin(x), want)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert fused_calls == ["run", "block", "run", "block", "block"] * 2
    assert dla_fast.unswap_(model) == 6
    for name, m in model.named_modules():
        cls, attributes = kept[name]
        assert type(m) is cls
        assert all(m.__dict__[k] is v for k, v in attributes.items())
    assert torch.equal(model(x), want)


CHANGES = {
    "forward hook": lambda m: m.conv2.register_forward_hook(lambda m, a, y: y * 2),
    "norm's pre-hook": lambda m: m.bn1.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "activation's hook": lambda m: m.relu.register_forward_hook(lambda m, a, y: y * 2),
    "replaced forward": lambda m: setattr(m.conv1, "forward", lambda x: x * 2),
    "weight norm": lambda m: parametrizations.weight_norm(m.conv1),
    "sync batch norm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "other norm": lambda m: setattr(m, "bn2", nn.GroupNorm(2, 8)),
    "other activation": lambda m: setattr(m, "relu", nn.GELU()),
    "another child": lambda m: setattr(m, "drop_path", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block_runs_its_original_forward(fused_calls, change):
    module, twin = swapped_pair(BasicBlock().eval())
    for m in (module, twin):
        torch.manual_seed(1)
        CHANGES[change](m)
        m.eval()
    fused_calls.clear()
    x = torch.randn(2, 8, 5, 4)
    assert torch.equal(twin(x), module(x))
    assert not fused_calls


def test_a_changed_run_is_called_child_by_child(fused_calls):
    layers = [layer for _ in range(2) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    module, twin = swapped_pair(nn.Sequential(*layers).eval())
    seen = []
    twin[1].register_forward_hook(lambda *_: seen.append("norm"))
    fused_calls.clear()
    x = torch.randn(2, 4, 5, 4)
    torch.testing.assert_close(twin(x), module(x))
    assert seen == ["norm"]
    assert fused_calls == ["run"]
    twin[4] = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(twin[4]))
    torch.testing.assert_close(twin(x), module(x))
    assert fused_calls == ["run"]
    twin.append(nn.Sigmoid())
    torch.testing.assert_close(twin(x), module(x).sigmoid())


def test_calls_that_do_not_fit_run_the_original_forward(fused_calls):
    module, twin = swapped_pair(BasicBlock(8, 8).eval())
    x, wide = torch.randn(2, 8, 5, 4), torch.randn(1, 8, 1, 1)
    fused_calls.clear()
    assert torch.equal(twin(x, wide), module(x, wide))
    assert torch.equal(twin(x, x.double()), module(x, x.double()))
    assert torch.equal(twin(x=x), module(x=x))
    assert not fused_calls
    torch.testing.assert_close(twin(x, residual=2 * x), module(x, 2 * x))
    assert fused_calls == ["block"]
    for wrong in ((x, x, x), (x, x[:, :4]), (x.double(),)):
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            module(*wrong)
        with pytest.raises(type(theirs.value)):
            twin(*wrong)
    module, twin = swapped_pair(Required().eval())
    for wrong in ((x,), (x, None)):
        with pytest.raises(TypeError):
            twin(*wrong)
    # What the original ignores, and what it might not.
    module, twin = swapped_pair(BottleneckX().eval())
    fused_calls.clear()
    torch.testing.assert_close(twin(x, x, None), module(x, x, None))
    torch.testing.assert_close(twin(x, children=[x]), module(x, children=[x]))
    assert fused_calls == ["block"]


def test_global_hooks_see_the_children(fused_calls):
    _, twin = swapped_pair(Small().eval())
    seen, x = [], torch.randn(2, 3, 8, 8)
    fused_calls.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m).__name__))
    try:
        twin(x)
    finally:
        handle.remove()
    assert not fused_calls
    assert (seen.count("Conv2d"), seen.count("BatchNorm2d")) == (11, 10)


def test_the_norms_flag_decides():
    module, twin = swapped_pair(Small())
    x = torch.randn(2, 3, 8, 8)
    for m in (module, twin):
        m.train()
        m.first.bn1.eval()
        m.stem[1].eval()
    torch.testing.assert_close(twin(x), module(x), rtol=1e-4, atol=1e-5)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value)
    assert module.first.bn1.num_batches_tracked == module.stem[1].num_batches_tracked == 0
    assert module.first.bn2.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(fused_calls, dtype):
    module, twin = swapped_pair(Small().eval())
    x = torch.randn(2, 3, 8, 8)
    want = module(x)
    fused_calls.clear()
    bound = 30 * torch.finfo(dtype).eps
    with torch.autocast("cpu", dtype):
        y, z = module(x), twin(x)
    assert y.dtype == z.dtype
    assert relative(z.float(), want) <= bound
    assert fused_calls == ["run", "block", "run", "block", "block"]
    half = twin.to(dtype)
    assert relative(half(x.to(dtype)).float(), want) <= bound
    assert len(fused_calls) == 10


def test_autocast_adds_a_float32_shortcut_as_eager_does(fused_calls):
    module, twin = swapped_pair(BottleneckX().eval())
    x = torch.randn(2, 8, 5, 4)
    fused_calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert twin(x).dtype == module(x).dtype == torch.float32
        assert not fused_calls
        assert twin(x, x.bfloat16()).dtype == module(x, x.bfloat16()).dtype == torch.bfloat16
    assert fused_calls == ["block"]


def test_compile_fullgraph():
    model, twin = swapped_pair(Small())
    x = torch.randn(2, 3, 8, 8)
    graphs = []

    def look(graph, example_inputs):
        graphs.append(str(graph.graph).count("dla_fast_"))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    y, z = model(x), torch.compile(twin, fullgraph=True, backend=look)(x)
    assert relative(z, y) <= 1e-4
    # Two runs, three blocks of two, two and three, and the node.
    assert graphs[0] >= 10
    for got, want in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_export_tracing_and_scripting(fused_calls):
    model, twin = swapped_pair(Small().eval())
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    fused_calls.clear()
    assert relative(torch.export.export(twin, (x,)).module()(x), want) <= 1e-5
    assert relative(torch.jit.trace(twin, (x,), check_trace=False)(x), want) <= 1e-5
    assert relative(torch.fx.symbolic_trace(twin.stem)(x), model.stem(x)) <= 1e-5
    assert not fused_calls
    with pytest.warns(UserWarning, match="torch.jit.script needs the original forward"):
        scripted = torch.jit.script(twin.stem)
    assert relative(scripted(x), model.stem(x)) <= 1e-5
    assert type(twin.stem) is nn.Sequential


def test_data_parallel_replicas(fused_calls):
    model, twin = swapped_pair(Projected().eval())

    def replica(module):
        made = module._replicate_for_data_parallel()
        for key, parameter in module._parameters.items():
            if parameter is None:
                made._parameters[key] = None
            else:
                setattr(made, key, parameter.view_as(parameter))
        for key, child in module._modules.items():
            made._modules[key] = None if child is None else replica(child)
        return made

    x = torch.randn(2, 8, 6, 4)
    fused_calls.clear()
    y = replica(twin)(x)
    torch.testing.assert_close(y, model(x))
    assert fused_calls == ["block", "run"]
    y.sum().backward()
    assert twin.conv1.weight.grad is not None


class Lying(BasicBlock):
    """Structured like a block, and something else when called."""

    lie = ""

    def forward(self, x, residual=None):
        if self.lie == "doubled":
            return super().forward(x, 2 * x if residual is None else residual)
        if self.lie == "ignored":
            return super().forward(x, x if residual is None or x.shape == residual.shape else residual)
        if self.lie == "behind":
            y = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
            return y + (x if residual is None else residual)
        if self.lie == "before the norm":
            y = self.conv2(self.relu(self.bn1(self.conv1(x)))) + (x if residual is None else residual)
            return self.relu(self.bn2(y))
        if self.lie == "training":
            return super().forward(x, residual) * (1 + self.training)
        if self.lie == "detached":
            return super().forward(x, (x if residual is None else residual).detach())
        if self.lie == "written":
            y = super().forward(x, residual)
            x.data.zero_()
            return y
        return super().forward(x, residual)


@pytest.mark.parametrize("lie", ["doubled", "ignored", "behind", "before the norm", "training", "detached", "written"])
def test_liars_fail_the_verification(lie):
    module = Lying()
    assert dla_fast.swap_(copy.deepcopy(module)).swapped
    module.lie = lie
    # Beside one that tells the truth: what is compared once is compared by all that it depends on.
    report = dla_fast.swap_(nn.ModuleList([Lying(), module]))
    assert [e.name for e in report.swapped] == ["0"]
    assert report.skipped[0].reason.startswith("verification failed: "), report


def _block(make=BasicBlock, **changes):
    module = make()
    for name, value in changes.items():
        setattr(module, name, value)
    return module


class OwnArguments(BasicBlock):
    def forward(self, x, scale, residual=None):
        return scale * super().forward(x, residual)


REFUSED = {
    "other conv": (lambda: _block(conv2=nn.LazyConv2d(8, 3)), "conv2: expected Conv2d, got LazyConv2d"),
    "other norm": (lambda: _block(bn2=nn.GroupNorm(2, 8)), "bn2: expected BatchNorm2d, got GroupNorm"),
    "activation": (lambda: _block(relu=nn.GELU()), "relu: no kernel ends with GELU"),
    "no activation": (lambda: _block(BottleneckX, act2=None), "no activation for bn2"),
    "other functional activation": (type("Smooth", (Functional,), {"act": staticmethod(F.gelu)}), "outputs differ"),
    "no norm": (lambda: _block(conv3=nn.Conv2d(8, 8, 1)), "no child bn3"),
    "further child": (lambda: _block(Projected, se=nn.Sigmoid()), "has more than a block: se (Sigmoid)"),
    "further parameter": (lambda: _block(gain=nn.Parameter(torch.ones(()))), "has more than a block: gain"),
    "features": (lambda: _block(bn1=nn.BatchNorm2d(4)), "bn1: 4 features, the convolution has 8"),
    "channels": (
        lambda: _block(conv2=nn.Conv2d(4, 8, 3, padding=1)),
        "conv2: 4 input channels, the one before gives 8",
    ),
    "no shortcut": (lambda: _block(Projected, downsample=None), "its input has not the output's shape"),
    "two shortcuts": (lambda: _block(Projected, shortcut=nn.Identity()), "both downsample and shortcut"),
    "devices": (lambda: _block(bn1=nn.BatchNorm2d(8, device="meta")), "lie on several devices"),
    "patched": (lambda: _block(forward=sum), "its forward is replaced on the instance"),
    "arguments": (lambda: _block(OwnArguments, downsample=None), "forward takes neither (x) nor (x, shortcut=None)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case):
    make, reason = REFUSED[case]
    module = make()
    report = dla_fast.swap_(module, units="blocks")
    assert not report.swapped
    assert [(e.name, e.kind) for e in report.skipped] == [("", "block")]
    assert reason in report.skipped[0].reason


def test_hooks_on_a_child_are_a_reason_and_those_of_a_shortcut_stay():
    module = Projected()
    module.conv1.register_forward_hook(lambda *_: None)
    assert dla_fast.swap_(module, units="blocks").skipped[0].reason == "conv1: has hooks"
    module, seen = Projected().eval(), []
    module.downsample.register_forward_hook(lambda *_: seen.append(1))
    assert len(dla_fast.swap_(module).swapped) == 2
    assert not seen, "verification calls nobody"
    module(torch.randn(2, 8, 6, 4))
    assert seen == [1]


def test_a_backend_that_cannot_run_is_a_reason():
    report = dla_fast.swap_(Small(), backend="cuda")
    assert not report.swapped
    assert {e.kind for e in report.skipped} == {"conv", "block", "aggregate"}
    assert all(e.reason.startswith("backend 'cuda' cannot run it: ") for e in report.skipped)


def test_a_forced_backend_is_not_the_shortcut_s():
    module, twin = swapped_pair(Projected().eval(), backend="reference", units="blocks")
    seen = []
    twin.downsample.register_forward_hook(lambda *_: seen.append(dla_fast.backend.selected()))
    x = torch.randn(2, 8, 6, 4)
    torch.testing.assert_close(twin(x), module(x))
    assert seen == ["auto"]


def test_meta_device():
    model = Small().to("meta")
    report = dla_fast.swap_(model)
    assert {e.reason for e in report.swapped} == {"verified on the CPU only (meta device)"}
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5, 2, 2)


def test_our_own_modules_are_fused_already():
    own = dla_fast.nn
    model = nn.ModuleList([own.BasicBlock(4, 4), own.ConvLevel(3, 4), own.Projection(4, 8), own.AggregationNode(4, 4)])
    report = dla_fast.swap_(model)
    assert [(e.kind, e.reason) for e in report.skipped] == [
        ("block", "already fused: dla_fast.nn.BasicBlock"),
        ("conv", "already fused: dla_fast.nn.ConvLevel"),
        ("conv", "already fused: dla_fast.nn.Projection"),
        ("aggregate", "already fused: dla_fast.nn.AggregationNode"),
    ]
    assert [e.kind for e in dla_fast.swap_(model, units="blocks").skipped] == ["block"]
