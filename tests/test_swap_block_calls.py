"""When a swapped block or Sequential runs its original forward, and what both survive."""

from __future__ import annotations

import copy

import pytest
import torch
from block_helpers import BasicBlock, BottleneckX, Projected, Required, Small, count_fused_calls, swapped_pair
from nn_helpers import relative
from torch import nn
from torch.nn.utils import parametrizations

import dla_fast


@pytest.fixture
def fused_calls(monkeypatch):
    return count_fused_calls(monkeypatch)


CHANGES = {
    "forward hook": lambda m: m.conv2.register_forward_hook(lambda m, a, y: y * 2),
    "norm's pre-hook": lambda m: m.bn1.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "activation's hook": lambda m: m.relu.register_forward_hook(lambda m, a, y: y * 2),
    "replaced forward": lambda m: setattr(m.conv1, "forward", lambda x: x * 2),
    "weight norm": lambda m: parametrizations.weight_norm(m.conv1),
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
    assert fused_calls == ["run", "run"]
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


class Attributed(nn.Module):
    """A block whose forward reads attributes that do nothing at first."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.downsample = nn.AvgPool2d(2, 2)
        self.scale = 1.0

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y * self.scale + self.downsample(x))


def test_attributes_that_change(fused_calls):
    original, twin = swapped_pair(Attributed().eval())
    x = torch.randn(2, 8, 6, 6)
    assert relative(twin(x), original(x)) < 1e-5
    assert len(fused_calls) == 1
    original.scale = twin.scale = 0.1
    assert torch.equal(twin(x), original(x))
    assert len(fused_calls) == 1


def test_a_shortcut_that_is_broadcast(fused_calls):
    original, twin = swapped_pair(Attributed().eval())
    x = torch.randn(2, 8, 3, 3)
    assert relative(twin(x), original(x)) < 1e-5
    assert len(fused_calls) == 1


def test_a_sequential_that_iterates_otherwise():
    class Shorter(nn.Sequential):
        def __iter__(self):
            return iter([*self._modules.values()][:-1])

    model = Shorter(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Softmax(1))
    assert not dla_fast.swap_(model).swapped
