"""memory="low": what is marked, that poolings keep a byte an output, and that both are undone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from swap_helpers import Root
from torch import nn

import dla_fast
from dla_fast import models
from dla_fast.nn import BasicBlock
from dla_fast.nn.memory import LOW, set_memory
from dla_fast.nn.pool import MaxPool2d, max_pool
from dla_fast.proof.measure import saved_bytes

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def values(*size, dtype=torch.float64, layout="contiguous"):
    """A map with ties and, among them, zeros of both signs."""
    x = torch.randint(-2, 3, size).to(dtype) * 0.5
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def both(x, side, call=max_pool):
    """Output and gradient by ``call``, and by PyTorch."""
    found = []
    for pool in (call, F.max_pool2d):
        y = pool(x, side)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        found.append((y, *torch.autograd.grad(y, x, dy)))
    return found


def saved(call, x):
    known = [*call.parameters(), *call.buffers()] if isinstance(call, nn.Module) else []
    return saved_bytes(lambda: call(x), exclude=[x, *known])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [2, 3, 16])
def test_pooling_is_pytorchs(side, dtype, layout):
    x = values(2, 5, side * 3, side, dtype=dtype, layout=layout)
    (y, dx), (expected, gradient) = both(x, side)
    assert torch.equal(y, expected)
    assert torch.equal(dx, gradient)
    assert (y.stride(), dx.stride()) == (expected.stride(), gradient.stride())
    # It keeps a byte of an output, or where PyTorch keeps its input and an int64 nothing else.
    assert saved(lambda x: max_pool(x, side), x) == y.numel()
    assert saved(lambda x: F.max_pool2d(x, side), x) == 8 * y.numel()


def test_pooling_passes_nan_on():
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    x[0, 0, 1, 2] = float("nan")
    (y, dx), (expected, gradient) = both(x.requires_grad_(), 2)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(dx, gradient)
    x = torch.randn(1, 1, 2, 2, requires_grad=True)
    y = max_pool(x, 2)
    (dx,) = torch.autograd.grad(y, x, torch.full_like(y, float("nan")))
    assert dx.isnan().sum() == 1
    assert dx.nan_to_num(0).count_nonzero() == 0


@pytest.mark.parametrize("size", [(1, 2, 5, 4), (0, 2, 4, 4), (2, 4, 4)])
def test_what_windows_do_not_tile_is_pytorchs(size):
    x = values(*size)
    (y, dx), (expected, gradient) = both(x, 2)
    assert torch.equal(y, expected)
    assert torch.equal(dx, gradient)


def test_pooling_is_differentiated_twice():
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: max_pool(x, 2).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: max_pool(x, 2).square(), x)


def test_pooling_under_transforms():
    x = torch.randn(3, 2, 4, 4)
    found = torch.vmap(torch.func.grad(lambda x: max_pool(x[None], 2).square().sum()))(x)
    expected = torch.vmap(torch.func.grad(lambda x: F.max_pool2d(x[None], 2).square().sum()))(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2, 1),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, 2, dilation=2),
        nn.MaxPool2d((2, 1)),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, return_indices=True),
        type("Mine", (nn.MaxPool2d,), {})(2),
        nn.AvgPool2d(2),
    ],
    ids=str,
)
def test_another_pooling_is_left_alone(pool):
    model = nn.Sequential(pool)
    before = type(pool)
    assert not dla_fast.swap_(model, memory="low").swapped
    assert type(pool) is before


class Net(nn.Module):
    """A pooling, a root and a run of convolution and norm."""

    def __init__(self):
        super().__init__()
        self.down = nn.MaxPool2d(2, stride=2)
        self.root = Root(8, 4)
        self.project = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        y = self.down(x)
        return self.root(y, self.project(y))


def tree():
    torch.manual_seed(0)
    return Net().double()


def trained(model, x):
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("units", [("nodes",), ("convs",), ("nodes", "convs")])
def test_swapped_low_on_memory_and_back(units):
    model, x = tree(), torch.randn(2, 4, 6, 8, dtype=torch.float64, requires_grad=True)
    keys, expected = list(model.state_dict()), trained(copy.deepcopy(model), x)
    report = dla_fast.swap_(model, units=units, memory="low")
    assert [e.name for e in report.swapped if e.kind == "pool"] == ["down"]
    assert "down" in str(report)
    assert isinstance(model.down, nn.MaxPool2d)
    again = pickle.loads(pickle.dumps(model))
    for one in (model, copy.deepcopy(model), again):
        assert list(one.state_dict()) == keys
        assert LOW in one.down.__dict__
        assert (LOW in one.root.conv.__dict__) == ("nodes" in units)
        assert (LOW in one.project[0].__dict__) == ("convs" in units)
        for a, e in zip(trained(one, x), expected, strict=True):
            torch.testing.assert_close(a, e)
    low = saved(model, x)
    dla_fast.unswap_(model)
    assert type(model.down) is nn.MaxPool2d
    assert not any(LOW in m.__dict__ for m in model.modules())
    dla_fast.swap_(model, units=units)
    assert type(model.down) is nn.MaxPool2d
    assert low < saved(model, x)


def test_modules_of_this_package_keep_their_mode():
    """Swapping what is around them, and undoing that, is not about them."""
    model = nn.Sequential(BasicBlock(4, 4), Net())
    set_memory(model[0], "low")
    for memory in ("default", "low"):
        assert dla_fast.swap_(model, memory=memory).swapped
        assert LOW in model[0].conv1.__dict__
        dla_fast.unswap_(model)
        assert LOW in model[0].conv1.__dict__
        assert LOW not in model[1].root.conv.__dict__


def test_what_is_left_out_is_not_marked():
    model = tree()
    dla_fast.swap_(model, memory="low", filter_fn=lambda name, module: name != "root")
    assert LOW not in model.root.conv.__dict__
    assert LOW in model.project[0].__dict__
    # Another call changes the mode of what is swapped already.
    dla_fast.swap_(model, memory="default", filter_fn=lambda name, module: name != "root")
    assert LOW not in model.project[0].__dict__


def test_poolings_are_nobodys_backend():
    report = dla_fast.swap_(tree(), backend="cpu", memory="low", on_unsupported="raise")
    assert "pool" in {e.kind for e in report.swapped}


def test_a_dry_run_marks_nothing():
    model = tree()
    assert "pool" in {e.kind for e in dla_fast.swap_(model, memory="low", dry_run=True).swapped}
    assert not any(LOW in m.__dict__ for m in model.modules())


@pytest.mark.parametrize(
    "call", [lambda m: dla_fast.swap_(tree(), memory=m), lambda m: models.create_model("dla34", memory=m)]
)
def test_an_unknown_mode_is_told(call):
    with pytest.raises(ValueError, match="memory: expected 'default' or 'low', got 'tiny'"):
        call("tiny")


@pytest.mark.parametrize("name", ["dla34", "dla60", "dla34up"])
def test_networks_save_less_and_give_the_same(name):
    torch.manual_seed(0)
    net = models.create_model(name, num_classes=3, memory="low").double().train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def found():
        out = net(x)
        y = out[0] if isinstance(out, tuple) else out
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return torch.autograd.grad(y, [p for p in net.parameters() if p.requires_grad], dy)

    with dla_fast.use_backend("reference"):
        expected = found()
    for a, e in zip(found(), expected, strict=True):
        assert (a - e).norm() <= 1e-8 * e.norm()
    known = [x, *net.parameters(), *net.buffers()]
    low = saved_bytes(lambda: net(x), exclude=known)
    set_memory(net, "default")
    assert low < 0.85 * saved_bytes(lambda: net(x), exclude=known)


def test_own_poolings_are_plain_until_memory_is_low():
    x = values(1, 2, 4, 4)
    pool = MaxPool2d(2, 2)
    assert saved(pool, x) == 8 * 8
    set_memory(pool, "low")
    assert saved(pool, x) == 8
    assert not pool.state_dict()
