"""swap_ on modules that concatenate in their own forward: whole networks, and what happens around a swapped one."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import serving
import torch
import torch.nn.functional as F
from nn_helpers import randomise, relative
from shapes_beyond import C3, ROWS, C2f, Detector, SPPFn, Unit, fold
from torch import nn

import dla_fast
from dla_fast.swap.concat import FusedConcat, Merge

# Nodes of each.
NETWORKS = {
    "ese_vovnet19b_dw": 4,
    "vovnet39a": 6,
    "cspresnet50": 4,
    "cspdarknet53": 5,
    "cs3darknet_s": 4,
    "selecsls42": 6,
    "hgnet_tiny": 5,
    "hgnetv2_b0": 6,
    "res2net50_14w_8s": 16,
    "dla60_res2net": 24,
    "dla60_res2next": 24,
    "torchvision deeplabv3": 1,
}

SEEN: list[nn.Module] = []


def create(timm, name: str) -> nn.Module:
    if name != "torchvision deeplabv3":
        return timm.create_model(name, num_classes=10)
    made = importlib.import_module("torchvision.models.segmentation")
    return made.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4)


@pytest.fixture
def merges(monkeypatch):
    """The modules whose reader ran fused, in order, since the last swap."""
    run = Merge._run

    def counted(self, *args):
        SEEN.append(self.module)
        return run(self, *args)

    monkeypatch.setattr(Merge, "_run", counted)
    yield SEEN
    SEEN.clear()


def assert_close(got, want, bound=1e-9):
    if isinstance(want, (list, tuple)):
        assert type(got) is type(want)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, bound)
    else:
        assert relative(got, want) <= bound


def pair(make=C2f, dtype=torch.float64, training=False, **options):
    """A module as it is, and swapped, which has not been called yet."""
    torch.manual_seed(0)
    module = randomise(make()).to(dtype).train(training)
    twin = copy.deepcopy(module)
    report = dla_fast.swap_(twin, units="nodes", **options)
    assert "" in [e.name for e in report.swapped], report
    SEEN.clear()
    return module, twin


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(timm, name, merges):
    torch.manual_seed(0)
    model = randomise(create(timm, name)).double().eval()
    twin = copy.deepcopy(model)
    report = dla_fast.swap_(twin, verify=False)
    assert report.counts()["nodes"] == NETWORKS[name]
    assert not [e for e in report.skipped if e.kind == "aggregate"], report
    assert list(twin.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        y, z = model(x), twin(x)
    if isinstance(y, dict):
        y, z = y["out"], z["out"]
    assert relative(z, y) <= 1e-9
    # DLA's roots are nodes of another kind.
    assert len(merges) == sum(isinstance(m, FusedConcat) for m in twin.modules()) >= NETWORKS[name] - 8
    dla_fast.unswap_(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", ["ese_vovnet19b_dw", "cs3darknet_s", "selecsls42", "hgnetv2_b0"])
def test_verified_whole_networks_train_alike(timm, name):
    torch.manual_seed(0)
    model = create(timm, name).double().train()
    twin = copy.deepcopy(model)
    report = dla_fast.swap_(twin, units="nodes", on_unsupported="raise")
    assert len(report.swapped) == NETWORKS[name]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    outcomes = []
    for m in (model, twin):
        torch.manual_seed(1)
        y = m(x)
        grads = torch.autograd.grad(y.square().mean(), list(m.parameters()))
        outcomes.append([y, *grads, *(b.double() for b in m.buffers())])
    for got, want in zip(outcomes[1], outcomes[0], strict=True):
        # Rounding grows through a training network of random weights, and an unreached gradient is nothing but that.
        assert (got - want).abs().max() <= 1e-7 * max(want.abs().max().item(), 1e-3)


@pytest.mark.parametrize("name", ROWS)
def test_copies_and_pickles_stay_swapped(name, merges):
    torch.manual_seed(0)
    row = ROWS[name]
    module = randomise(row.make()).double().eval()
    twin = copy.deepcopy(module)
    dla_fast.swap_(twin)
    arguments = row.inputs(torch.float64)
    with torch.no_grad():
        want = module(*copy.deepcopy(arguments))
        for journey in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
            arrived = journey(twin)
            assert [type(m) for m in arrived.modules()] == [type(m) for m in twin.modules()]
            merges.clear()
            assert_close(arrived(*copy.deepcopy(arguments)), want)
            assert merges
            assert {id(m) for m in merges} <= {id(m) for m in arrived.modules()}


# --- who watches --------------------------------------------------------------------------------------------------


PARTS = {
    "VoVNet's OsaBlock": ["conv_concat", "conv_concat.conv", "conv_concat.bn", "conv_concat.bn.act", "conv_mid"],
    "CSPNet's CrossStage": ["conv_transition", "conv_transition.conv", "conv_transition.bn"],
    "SelecSLS's block with a skip": ["conv6", "conv6.0", "conv6.1", "conv6.2"],
    "HGNet's block of version 2, affine, residual": ["aggregation", "aggregation.0", "aggregation.0.bn"],
    "Res2Net's Bottle2neck": ["conv3", "bn3"],
    "torchvision's ASPP": ["project", "project.0", "project.1"],
    "`C2f`, SiLU": ["cv2", "cv2.conv", "cv2.bn", "cv2.act"],
    "`SPPF`, folded": ["cv2.conv", "cv2.act"],
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_a_hook_on_what_is_left_out_runs_the_original_forward(name, part, merges):
    row = ROWS[name]
    _, twin = pair(row.make)
    arguments, seen = row.inputs(torch.float64), []
    handle = twin.get_submodule(part).register_forward_hook(lambda m, a, y: seen.append(m))
    with torch.no_grad():
        watched = twin(*copy.deepcopy(arguments))
        assert seen
        assert not merges
        assert_close(watched, twin._dla_fast_original.forward(twin, *copy.deepcopy(arguments)), 0)
        handle.remove()
        assert_close(twin(*copy.deepcopy(arguments)), watched)
    assert merges == [twin]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("the same, residual, attention, drop path", "attn"),
        ("HGNet's block of version 2, affine, residual", "aggregation.0.lab"),
        ("HGNet's block of version 2, affine, residual", "aggregation.1"),
        ("torchvision's ASPP", "project.3"),
        ("`C2f`, SiLU", "m.0.cv1"),
    ],
)
def test_a_hook_on_what_is_called_sees_the_call(name, part, merges):
    row = ROWS[name]
    _, twin = pair(row.make)
    seen = []
    twin.get_submodule(part).register_forward_hook(lambda m, a, y: seen.append(m))
    twin(*row.inputs(torch.float64))
    assert len(seen) == len(merges) == 1


def changed_unit(m):
    m.cv2 = Unit(32, 16).double().eval()
    m.cv2.conv, m.cv2.kept = nn.Conv2d(32, 16, 1).double(), nn.Identity()


CHANGES = {
    "another activation": lambda m: setattr(m.cv2, "act", nn.GELU()),
    "a negative slope": lambda m: setattr(m.cv2, "act", nn.LeakyReLU(0.3)),
    "another norm": lambda m: setattr(m.cv2, "bn", nn.GroupNorm(2, 16).double()),
    "no norm": lambda m: setattr(m.cv2, "bn", nn.Identity()),
    "folded since": fold,
    "another unit": changed_unit,
    "another number": lambda m: setattr(m, "c", 7),
    "one more child": lambda m: m.add_module("further", nn.Identity()),
    "a forward of its own": lambda m: setattr(m.cv2, "forward", lambda x: F.silu(m.cv2.conv(x))),
    "the method for folded ones": lambda m: setattr(m.cv2, "forward", m.cv2.forward_fuse),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_afterwards_runs_the_original_forward(change, merges):
    _, twin = pair()
    CHANGES[change](twin.eval())
    x = torch.randn(2, 12, 8, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(twin(x), twin._dla_fast_original.forward(twin, x))
    assert not merges


def test_called_otherwise_runs_the_original_forward(merges):
    module, twin = pair()
    x = torch.randn(2, 12, 8, 6, dtype=torch.float64)
    assert torch.equal(twin(x=x), module(x))
    with pytest.raises(TypeError, match="positional"):
        twin(x, x)
    assert not merges
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: None)
    try:
        assert torch.equal(twin(x), module(x))
    finally:
        handle.remove()
    assert not merges
    twin(x)
    assert merges == [twin]


def test_exchanged_parameters_and_children_are_those_of_the_call(merges):
    module, twin = pair()
    x = torch.randn(2, 12, 8, 6, dtype=torch.float64)
    for m in (module, twin):
        torch.manual_seed(3)
        m.cv2.conv.weight = nn.Parameter(torch.randn_like(m.cv2.conv.weight))
        m.cv1 = Unit(12, 16).double().eval()
        m.cv2.bn.eps = 0.1
    assert relative(twin(x), module(x)) <= 1e-9
    assert merges == [twin]


def test_synchronised_before_and_after(merges):
    """Without a process group it is a batch norm in evaluation; what it cannot run on a CPU is not run for it."""
    module, twin = pair()
    x = torch.randn(2, 12, 8, 6, dtype=torch.float64)
    want = module(x)
    nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    assert type(twin.cv2.bn) is nn.SyncBatchNorm
    assert relative(twin(x), want) <= 1e-9
    assert merges == [twin]
    dla_fast.unswap_(twin)
    assert [e.name for e in dla_fast.swap_(twin, units="nodes").swapped] == [""]
    merges.clear()
    assert relative(twin(x), want) <= 1e-9
    assert merges == [twin]


def test_data_parallel_replicas(merges):
    module, twin = pair()
    x = torch.randn(2, 12, 8, 6, dtype=torch.float64)

    def replica(m: nn.Module) -> nn.Module:
        made = m._replicate_for_data_parallel()
        for name, child in m._modules.items():
            made._modules[name] = replica(child)
        for name, parameter in m._parameters.items():
            made._parameters.pop(name, None)
            setattr(made, name, None if parameter is None else parameter.detach().clone())
        return made

    arrived = replica(twin)
    with torch.no_grad():
        assert relative(arrived(x), module(x)) <= 1e-9
    assert merges == [arrived]


# --- modes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [C2f, lambda: fold(C2f())], ids=["norms", "folded"])
def test_the_compiled_graph_has_the_fused_op(make):
    if serving.DISABLED:
        pytest.skip("the reference has no ops")
    module, twin = pair(make, torch.float32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(2, 12, 8, 6)
    with torch.no_grad():
        y = torch.compile(twin, fullgraph=True, backend=backend)(x)
        assert relative(y, module(x)) <= 1e-5
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes]
    assert sum("conv_norm_act_inference" in name for name in called) == 1
    assert not any("cat" in name for name in called)


@pytest.mark.parametrize("name", ["Res2Net's Bottle2neck", "`C2f`, SiLU", "`C2f`, folded", "VoVNet's OsaBlock"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast(name, training, merges):
    row = ROWS[name]
    module, twin = pair(row.make, torch.float32, training)
    (x,) = row.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = module(x), twin(x)
    assert z.dtype == y.dtype
    assert relative(z.float(), y.float()) <= 5e-2
    assert merges == [twin]


def test_maps_of_several_dtypes_are_concatenated(merges):
    module, twin = pair(C3, torch.float32)
    for m in (module, twin):
        m.cv2.act = Widened()
    x = torch.randn(2, 12, 8, 6)
    for m in (module, twin):
        m.cv3.double()
    assert torch.equal(twin(x), module(x))
    assert not merges


class Widened(nn.Module):
    def forward(self, x):
        return F.silu(x).double()


def test_a_forced_backend_serves_the_reader(monkeypatch, merges):
    from dla_fast import backend

    for make in (C2f, lambda: fold(C2f())):
        module, twin = pair(make, backend="reference")
        seen = []
        resolve = backend.resolve
        monkeypatch.setattr(backend, "resolve", lambda *a, r=resolve, s=seen: s.append(backend.selected()) or r(*a))
        x = torch.randn(2, 12, 8, 6, dtype=torch.float64)
        assert relative(twin(x), module(x)) <= 1e-9
        assert seen == ["reference"]
        monkeypatch.undo()


def test_frozen_for_inference():
    torch.manual_seed(0)
    module = randomise(Detector()).eval()
    twin = copy.deepcopy(module)
    dla_fast.swap_(twin, units="nodes")
    assert dla_fast.freeze_(twin).units == 3
    x = torch.randn(2, 3, 33, 32)
    with torch.inference_mode():
        for _ in range(3):
            assert relative(twin(x), module(x)) <= 1e-5
        for m in (module, twin):
            m.block.cv2.bn.weight.mul_(0.5)
        assert relative(twin(x), module(x)) <= 1e-5
    assert dla_fast.unfreeze_(twin) == 3


@pytest.mark.parametrize("name", ["Res2Net's Bottle2neck", "`SPPF`, SiLU", "DLA's Bottle2neck"])
def test_low_on_memory(name):
    row = ROWS[name]
    module, twin = pair(row.make, training=True, memory="low")
    arguments, outcomes = row.inputs(torch.float64), []
    for m in (module, twin):
        leaves = [x.clone().requires_grad_() for x in arguments]
        grads = torch.autograd.grad(m(*leaves).square().mean(), [*leaves, *m.parameters()])
        outcomes.append(grads)
    for got, want in zip(*outcomes, strict=True):
        assert (got - want).abs().max() <= 1e-8 * max(want.abs().max().item(), 1e-6)


def test_swapped_bit_by_bit_gives_the_same(merges):
    """First what the reader is made of, then the module: what owns it takes it over."""
    row = ROWS["torchvision's ASPP"]
    torch.manual_seed(0)
    module = randomise(row.make()).double().eval()
    twin = copy.deepcopy(module)
    first = dla_fast.swap_(twin, units="convs")
    assert "project" in [e.name for e in first.swapped]
    second = dla_fast.swap_(twin, units="nodes")
    assert [e.name for e in second.swapped] == [""]
    merges.clear()
    (x,) = row.inputs(torch.float64)
    assert relative(twin(x), module(x)) <= 1e-9
    assert merges == [twin]
    dla_fast.unswap_(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in module.modules()]


# --- who is left alone --------------------------------------------------------------------------------------------


class Clamped(C2f):
    def forward(self, x):
        return super().forward(x).clamp(max=0.5)


class Twice(C2f):
    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Reversed(C2f):
    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y[::-1], 1))


class Larger(C2f):
    def forward(self, x):
        y = super().forward(x)
        return y if x.shape[-1] < 10 else y * 2


class TrainsOtherwise(C2f):
    def forward(self, x):
        y = super().forward(x)
        return y + 1e-3 if self.training else y


class Noisy(C2f):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


class Detached(C2f):
    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1].detach()) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Summed(C3):
    """As reparametrised ones do it: the sides are added."""

    def __init__(self):
        super().__init__()
        self.cv3 = Unit(8, 16)

    def forward(self, x):
        return self.cv3(self.m(self.cv1(x)) + self.cv2(x))


class Pair(C3):
    def forward(self, x):
        y = super().forward(x)
        return y, y


class Keyword(C2f):
    def forward(self, x, *, flag=False):
        return super().forward(x)


class TwoArguments(C2f):
    def forward(self, x, y):
        return super().forward(x + y)


class Grouped(C2f):
    def __init__(self):
        super().__init__()
        self.cv2.bn = nn.GroupNorm(2, 16)


class Gelu(C2f):
    def __init__(self):
        super().__init__()
        self.cv2.act = nn.GELU()


class Transposed(C2f):
    def __init__(self):
        super().__init__()
        self.cv2.conv = nn.ConvTranspose2d(32, 16, 1)


class ActsFirst(C2f):
    """The unit's own forward does something else than its children tell."""

    def __init__(self):
        super().__init__()
        self.cv2 = Backwards(32, 16)


class Backwards(Unit):
    def forward(self, x):
        return self.bn(self.act(self.conv(x)))


LIARS = {
    Clamped: "verification failed: outputs",
    Twice: "verification failed: outputs",
    Reversed: "verification failed: outputs",
    Larger: "verification failed: outputs",
    TrainsOtherwise: "verification failed: outputs",
    Noisy: "verification failed: outputs",
    Detached: "verification failed: gradients",
    Summed: "verification failed: MismatchError",
    Pair: "verification failed",
    Keyword: "forward: expected arguments by position",
    TwoArguments: "forward takes 2 to 2 arguments, C2f.forward 1 to 1",
    Grouped: "cv2.bn: expected a batch norm, got GroupNorm",
    Transposed: "cv2.conv: expected a convolution, got ConvTranspose2d",
    ActsFirst: "verification failed: outputs",
}


@pytest.mark.parametrize("cls", LIARS)
def test_what_does_something_else_is_left_alone(cls):
    torch.manual_seed(0)
    module = cls()
    report = dla_fast.swap_(module)
    reasons = {e.name: e.reason for e in report.skipped}
    assert LIARS[cls] in reasons[""], report
    assert type(module) is cls


def test_an_activation_that_no_kernel_ends_with_is_called_behind(merges):
    module, twin = pair(Gelu)
    x = torch.randn(2, 12, 8, 6, dtype=torch.float64)
    assert relative(twin(x), module(x)) <= 1e-9
    assert merges == [twin]


@pytest.mark.parametrize("where", ["cv2", "cv2.conv", "cv2.bn", "cv2.act"])
def test_watched_before_the_swap(where):
    module = C2f()
    module.get_submodule(where).register_forward_hook(lambda m, a, y: None)
    (entry,) = [e for e in dla_fast.swap_(module).skipped if e.name == ""]
    assert entry.reason == f"{where}: has hooks"


def test_verification_leaves_everything_as_it_was():
    row = ROWS["the same, residual, attention, drop path"]
    module = row.make()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    rng = torch.get_rng_state()
    dla_fast.swap_(module, dry_run=True)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_poolings_are_as_many_as_the_module_says(merges):
    for n in (2, 4):
        module, twin = pair(lambda n=n: SPPFn(n=n))
        x = torch.randn(2, 16, 9, 8, dtype=torch.float64)
        assert relative(twin(x), module(x)) <= 1e-9
        twin.add = False
        merges.clear()
        # A flag that was another when it was verified: the original forward.
        assert relative(twin(x), module(x) - x) <= 1e-9
        assert not merges
