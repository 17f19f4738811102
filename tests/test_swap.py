"""swap_ and unswap_: parity, identity of what is kept, what a swapped module survives, when it runs its own forward."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from swap_helpers import ListRoot, Pair, Root, inputs, relative
from torch import nn
from torch.nn.utils import parametrizations

import dla_fast
from dla_fast.swap import nodes

ROOTS = {
    "dla34": 6,
    "dla46_c": 6,
    "dla46x_c": 6,
    "dla60x_c": 8,
    "dla60": 8,
    "dla60x": 8,
    "dla102": 14,
    "dla102x": 14,
    "dla102x2": 14,
    "dla169": 23,
}


@pytest.fixture
def fused_calls(monkeypatch):
    """Grows by one with every call that takes the fused path."""
    calls = []
    run = nodes.run_fused

    def counted(module, spec, xs):
        calls.append(module)
        return run(module, spec, xs)

    monkeypatch.setattr(nodes, "run_fused", counted)
    return calls


def swapped_pair(module):
    """The module as it is, and a swapped copy."""
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin).swapped
    return module, twin


@pytest.mark.parametrize("name", ROOTS)
def test_every_timm_model(timm, fused_calls, name):
    model = timm.create_model(name, num_classes=10).eval()
    report = dla_fast.swap_(model, units="nodes")
    assert (len(report.swapped), report.skipped) == (ROOTS[name], [])
    assert {e.kind for e in report.swapped} == {"aggregate"}
    x = torch.randn(4, 3, 64, 64)
    start = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}

    def run(mode):
        model.train(mode == "train").load_state_dict(start, strict=False)
        with torch.no_grad():
            y = model(x)
        return y, {k: v.clone() for k, v in model.state_dict().items() if k in start}

    fused_calls.clear()
    got = {mode: run(mode) for mode in ("eval", "train")}
    assert len(fused_calls) == 2 * ROOTS[name]
    assert dla_fast.unswap_(model) == ROOTS[name]
    for mode, bound in (("eval", 1e-5), ("train", 1e-3)):
        y, after = run(mode)
        assert relative(got[mode][0], y) <= bound
        for key, value in after.items():
            torch.testing.assert_close(got[mode][1][key], value, rtol=bound, atol=bound)
    assert len(fused_calls) == 2 * ROOTS[name]


def test_everything_kept_is_the_same_object(timm):
    model = timm.create_model("dla34", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    optimizer.step()

    def state():
        return (
            [(k, id(v)) for k, v in model.named_parameters()],
            [(k, v.data_ptr()) for k, v in model.state_dict().items()],
            [(k, id(v)) for k, v in model.named_modules()],
            [id(optimizer.state[p]["momentum_buffer"]) for p in model.parameters()],
        )

    dicts = {name: (type(m), dict(m.__dict__), dict(m._modules)) for name, m in model.named_modules()}
    values = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    before, rng = state(), torch.get_rng_state()
    report = dla_fast.swap_(model)
    assert len(report.swapped) == 25
    assert state() == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert isinstance(model.level2.root, dicts["level2.root"][0])
    weight = model.level2.root.conv.weight.clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model.level2.root.conv.weight, weight)
    assert state() == before

    assert dla_fast.unswap_(model) == 25
    for name, module in model.named_modules():
        cls, attributes, children = dicts[name]
        assert type(module) is cls
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[k] is v for k, v in attributes.items())
        assert list(module._modules.items()) == list(children.items())
    assert dla_fast.unswap_(model) == 0


def test_second_swap_changes_nothing():
    model = Pair()
    dla_fast.swap_(model)
    classes = [type(m) for m in model.modules()]
    again = dla_fast.swap_(model, on_unsupported="raise")
    assert [e.reason for e in again.skipped] == ["already swapped (backend auto)"] * 2
    assert not again.swapped
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Identity(), nn.SiLU(), nn.LeakyReLU(0.2), nn.Hardswish()])
@pytest.mark.parametrize("cls", [Root, ListRoot])
@pytest.mark.parametrize("residual", [False, True])
def test_conventions_and_activations(fused_calls, act, cls, residual):
    node = cls(residual=residual)
    node.relu = act
    node, twin = swapped_pair(node)
    xs = inputs()
    args = [xs] if cls is ListRoot else xs
    fused_calls.clear()
    for training in (True, False):
        assert relative(twin.train(training)(*args), node.train(training)(*args)) <= 1e-5
    assert fused_calls == [twin] * 2


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1, "momentum": 0.5}],
    ids=str,
)
def test_batch_norm_options(options):
    node = Root()
    node.conv = nn.Conv2d(24, 8, 1, bias=True)
    node.bn = nn.BatchNorm2d(8, **options)
    node, twin = swapped_pair(node)
    for training in (True, True, False):
        xs = inputs()
        assert relative(twin.train(training)(*xs), node.train(training)(*xs)) <= 1e-5
    for key, value in node.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value)


def test_the_norms_flag_decides(fused_calls):
    node, twin = swapped_pair(Root().train())
    fused_calls.clear()
    for parent, child in ((True, False), (False, True)):
        xs = inputs()
        for m in (node, twin):
            m.training, m.bn.training = parent, child
        assert relative(twin(*xs), node(*xs)) <= 1e-5
        assert torch.equal(node.bn.num_batches_tracked, twin.bn.num_batches_tracked)
        torch.testing.assert_close(twin.bn.running_var, node.bn.running_var)
    assert node.bn.num_batches_tracked == 1
    assert len(fused_calls) == 2


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def _through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("journey", [copy.deepcopy, _through_pickle, _through_torch_save], ids=lambda f: f.__name__)
def test_copies_stay_swapped(fused_calls, journey):
    model = Pair().eval()
    dla_fast.swap_(model, backend="reference")
    xs = inputs()
    want = model(*xs)
    fused_calls.clear()
    copied = journey(model)
    assert type(copied.first) is type(model.first)
    assert torch.equal(copied(*xs), want)
    assert len(fused_calls) == 2
    assert copied.first.conv.weight is not model.first.conv.weight
    assert dla_fast.unswap_(copied) == 2
    assert [type(m) for m in copied.modules()] == [type(m) for m in Pair().modules()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_after_and_before_the_swap(fused_calls, dtype):
    xs = inputs(dtype=dtype)
    late = Pair().eval()
    early = copy.deepcopy(late).to(dtype)
    want = early(*xs)
    dla_fast.swap_(late)
    late.to(dtype)
    assert len(dla_fast.swap_(early).swapped) == 2
    fused_calls.clear()
    for model in (late, early):
        got = model(*xs)
        assert got.dtype == dtype
        assert relative(got.double(), want.double()) <= 4 * torch.finfo(dtype).eps
    assert len(fused_calls) == 4


def test_autocast(fused_calls):
    node, twin = swapped_pair(Root(residual=True).eval())
    fused_calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        for kind, fused in ((torch.bfloat16, 1), (torch.float32, 1)):
            xs = inputs(dtype=kind)
            got, want = twin(*xs), node(*xs)
            assert got.dtype == want.dtype
            assert relative(got.float(), want.float()) <= 2e-2
            # A float32 residual is added to a bfloat16 norm: eager decides the output's dtype.
            assert len(fused_calls) == fused


def test_mixed_dtypes_run_the_original_forward(fused_calls):
    node, twin = swapped_pair(Root().eval())
    xs = inputs()
    xs[1] = xs[1].half()
    fused_calls.clear()
    assert torch.equal(twin(*xs), node(*xs))
    node.bn.double(), twin.bn.double()
    with pytest.raises(RuntimeError):
        node(*inputs())
    with pytest.raises(RuntimeError):
        twin(*inputs())
    assert not fused_calls


def test_meta_device():
    model = Pair().to("meta")
    report = dla_fast.swap_(model)
    assert [e.reason for e in report.swapped] == ["verified on the CPU only (meta device)"] * 2
    assert model(*(x.to("meta") for x in inputs())).shape == (2, 8, 5, 3)


def test_hooks_of_the_node_fire(fused_calls):
    node, seen = Root(), []
    node.register_forward_hook(lambda m, a, y: seen.append(len(a)))
    node.register_full_backward_hook(lambda m, gx, gy: seen.append("backward"))
    assert dla_fast.swap_(node).swapped
    assert not seen
    fused_calls.clear()
    node(*inputs(requires_grad=True)).sum().backward()
    assert seen == [3, "backward"]
    assert fused_calls == [node]


CHANGES = {
    "forward hook": lambda node: node.conv.register_forward_hook(lambda m, a, y: y * 2),
    "pre-hook": lambda node: node.bn.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "activation's hook": lambda node: node.relu.register_forward_hook(lambda m, a, y: y * 2),
    "backward hook": lambda node: node.conv.register_full_backward_hook(lambda m, gx, gy: None),
    "replaced forward": lambda node: setattr(node.conv, "forward", lambda x: node.conv.weight.sum() * x[:, :8]),
    "weight norm": lambda node: parametrizations.weight_norm(node.conv),
    "other norm": lambda node: setattr(node, "bn", nn.GroupNorm(2, 8)),
    "other activation": lambda node: setattr(node, "relu", nn.GELU()),
    "other convolution": lambda node: setattr(node, "conv", nn.Conv2d(24, 8, 3, padding=1)),
    "stride": lambda node: setattr(node.conv, "stride", (2, 2)),
    "residual switched on": lambda node: setattr(node, "residual", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_afterwards_runs_the_original_forward(fused_calls, change):
    torch.manual_seed(0)
    node = Root().eval()
    twin = copy.deepcopy(node)
    assert dla_fast.swap_(twin).swapped
    for m in (node, twin):
        torch.manual_seed(1)
        CHANGES[change](m)
        m.eval()
    fused_calls.clear()
    xs = [x.requires_grad_() for x in inputs()]
    assert torch.equal(twin(*xs), node(*xs))
    assert not fused_calls


def test_global_hooks_see_the_children(fused_calls):
    _, twin = swapped_pair(Root())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m).__name__))
    fused_calls.clear()
    try:
        twin(*inputs())
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "FusedRoot"]
    twin(*inputs())
    assert fused_calls == [twin]


def test_data_parallel_replicas(fused_calls):
    _, twin = swapped_pair(Root(residual=True))
    xs = inputs()
    want = twin(*xs)
    replica = twin._replicate_for_data_parallel()
    for name, child in twin.named_children():
        replica._modules[name] = shallow = child._replicate_for_data_parallel()
        for key, parameter in child._parameters.items():
            if parameter is None:
                shallow._parameters[key] = None
            else:
                setattr(shallow, key, parameter.view_as(parameter))
    fused_calls.clear()
    got = replica(*xs)
    assert torch.equal(got, want)
    got.sum().backward()
    assert twin.conv.weight.grad is not None
    assert fused_calls == [replica]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compile_fullgraph(fused_calls, backend):
    node, twin = Pair(), Pair()
    twin.load_state_dict(node.state_dict())
    dla_fast.swap_(twin, backend=backend)
    graphs = []

    def look(graph, example_inputs):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(twin, fullgraph=True, backend=look)
    xs = [x.requires_grad_() for x in inputs()]
    got, want = compiled(*xs), node(*xs)
    assert ["dla_fast_cpu" in graph for graph in graphs] == [backend == "auto"]
    assert relative(got, want) <= 1e-5
    grads = [torch.autograd.grad(y.sum(), xs) for y in (got, want)]
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)
    assert twin.first.bn.num_batches_tracked == 1
    assert dla_fast.backend.selected() == "auto"


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_export_and_tracing(fused_calls):
    model, twin = swapped_pair(Pair().eval())
    xs = tuple(inputs())
    want = model(*xs)
    fused_calls.clear()
    for strict in (False, True):
        program = torch.export.export(twin, xs, strict=strict)
        assert relative(program.module()(*xs), want) <= 1e-5
        assert any("first.conv" in str(n.meta.get("nn_module_stack")) for n in program.graph.nodes)
    assert relative(torch.jit.trace(twin, xs, check_trace=False)(*xs), want) <= 1e-5
    assert relative(torch.fx.symbolic_trace(twin)(*xs), want) <= 1e-5
    assert not fused_calls
    assert [type(m).__name__ for m in twin.children()] == ["FusedRoot"] * 2


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripting_unswaps_with_a_warning(timm):
    model = timm.create_model("dla46_c", num_classes=10).eval()
    root = model.level2.root
    count = len(dla_fast.swap_(model).swapped)
    with pytest.warns(UserWarning, match="torch.jit.script needs the original forward"):
        scripted = torch.jit.script(model)
    x = torch.randn(1, 3, 64, 64)
    assert relative(scripted(x), model(x)) <= 1e-5
    assert model.level2.root is root
    assert len(dla_fast.swap_(model).swapped) == count == 24


def test_functional_transforms():
    model, twin = swapped_pair(Pair().eval())
    xs = inputs(dtype=torch.float32)
    scaled = {k: v * 0.5 for k, v in model.named_parameters()}
    want = torch.func.functional_call(model, scaled, tuple(xs))
    assert relative(torch.func.functional_call(twin, scaled, tuple(xs)), want) <= 1e-5
    batch = [torch.stack([x, 2 * x]) for x in xs]
    assert relative(torch.vmap(twin)(*batch), torch.stack([model(*xs), model(*(2 * x for x in xs))])) <= 1e-5
    _, got = torch.func.jvp(twin, tuple(xs), tuple(xs))
    assert relative(got, torch.func.jvp(model, tuple(xs), tuple(xs))[1]) <= 1e-5
