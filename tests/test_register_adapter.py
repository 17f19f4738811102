"""Adapters of one's own: registered, asked first, taken back; what is wrong with one is said when it is registered."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from nn_helpers import randomise, relative
from swap_helpers import Root
from torch import nn

import dla_fast
from dla_fast.swap import adapters
from dla_fast.swap.concat import FusedConcat
from dla_fast.swap.root_adapter import RootAdapter


class Join(nn.Module):
    """Concatenates what it makes; of no kind that is known."""

    def __init__(self, channels=8):
        super().__init__()
        self.near, self.far = (nn.Conv2d(channels, channels, 3, padding=d, dilation=d) for d in (1, 2))
        self.join = nn.Sequential(nn.Conv2d(2 * channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU())

    def forward(self, x):
        return x + self.join(torch.cat([self.near(x), self.far(x)], 1))


class JoinAdapter(dla_fast.swap.ConcatAdapter):
    child = "join"

    def resembles(self, module):
        return isinstance(module, Join)

    def forward(self, module, merge, x):
        return x + merge([module.near(x), module.far(x)])


class Wrong(JoinAdapter):
    def forward(self, module, merge, x):
        return x + merge([module.far(x), module.near(x)])


class Weighed(nn.Module):
    """Two maps and a shortcut in front of the activation, called by hand."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x, y):
        z = self.norm(self.conv(torch.cat([x, y], 1)))
        z += y
        return self.act(z)


class WeighedAdapter(dla_fast.swap.ConcatAdapter):
    child = ("conv", "norm", "act")

    def resembles(self, module):
        return isinstance(module, Weighed)

    def forward(self, module, merge, x, y):
        return merge([x, y], residual=y, in_place=True)

    def calls(self, module, n, height, width):
        return [[(n, 8, height, width), (n, 8, height, width)]]


class Bare(WeighedAdapter):
    """The same, with the addition by hand."""

    def forward(self, module, merge, x, y):
        z = merge([x, y], act=False)
        return module.act((z + y).to(z.dtype))


class Reluctant(RootAdapter):
    """Roots that are to stay as they are."""

    def match(self, module, backend):
        return "left to me"


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = adapters._registered
    yield
    assert adapters._registered == before


X = (2, 8, 6, 5)


def outcome(module, *xs):
    leaves = [x.clone().requires_grad_() for x in xs]
    y = module(*leaves)
    return [y, *torch.autograd.grad(y.square().mean(), [*leaves, *module.parameters()]), *module.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "adapter", "count"), [(Join, JoinAdapter, 1), (Weighed, WeighedAdapter, 2), (Weighed, Bare, 2)]
)
def test_a_module_of_ones_own(make, adapter, count, training):
    torch.manual_seed(0)
    module = randomise(make()).double().train(training)
    twin = copy.deepcopy(module)
    with dla_fast.register_adapter(adapter()):
        report = dla_fast.swap_(twin, on_unsupported="raise")
    assert ("", "aggregate", "") in [(e.name, e.kind, e.reason) for e in report.swapped]
    assert isinstance(twin, FusedConcat)
    xs = [torch.randn(X, dtype=torch.float64) for _ in range(count)]
    for got, want in zip(outcome(twin, *xs), outcome(module, *xs), strict=True):
        # The gradient of a bias before a batch norm is truly zero.
        assert (got - want).abs().max() <= 1e-9 * max(want.abs().max().item(), 1e-5)
    assert list(twin.state_dict()) == list(module.state_dict())
    for journey in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert type(journey(twin)) is type(twin)
    assert dla_fast.unswap_(twin) == len(report.swapped)
    assert type(twin) is make


def test_what_it_gets_wrong_is_found():
    module = Join()
    with dla_fast.register_adapter(Wrong()):
        report = dla_fast.swap_(module, units="nodes")
    assert [e.reason[:20] for e in report.skipped] == ["verification failed:"]
    assert type(module) is Join


def test_it_is_asked_first_and_taken_back():
    root = Root()
    handle = dla_fast.register_adapter(Reluctant())
    assert [e.reason for e in dla_fast.swap_(root).skipped] == ["left to me"]
    handle.remove()
    handle.remove()
    assert len(dla_fast.swap_(root).swapped) == 1


def test_the_newest_is_asked_first():
    with dla_fast.register_adapter(JoinAdapter()):
        with dla_fast.register_adapter(Wrong()):
            assert not dla_fast.swap_(Join(), units="nodes", dry_run=True).swapped
        assert dla_fast.swap_(Join(), units="nodes", dry_run=True).swapped
    assert not dla_fast.swap_(Join(), units="nodes", dry_run=True).skipped


def test_registering_twice_is_registering_once():
    first, second = dla_fast.register_adapter(JoinAdapter()), dla_fast.register_adapter(JoinAdapter())
    assert adapters._registered.count(JoinAdapter()) == 1
    second.remove()
    assert JoinAdapter() not in adapters._registered
    first.remove()


def test_what_was_swapped_needs_no_registration():
    module = Join()
    with dla_fast.register_adapter(JoinAdapter()):
        dla_fast.swap_(module)
    twin = pickle.loads(pickle.dumps(module))
    report = dla_fast.swap_(twin)
    assert [(e.name, e.kind, e.reason) for e in report.skipped] == [("", "aggregate", "already swapped (backend auto)")]
    x = torch.randn(X)
    assert relative(twin(x), module(x)) <= 1e-6
    # Another that resembles it says nothing of what it has not swapped.
    with dla_fast.register_adapter(Wrong()):
        assert [e.reason for e in dla_fast.swap_(twin).skipped] == ["already swapped (backend auto)"]
    assert dla_fast.unswap_(twin) == 1


def test_units_and_filters_are_asked():
    model = nn.Sequential(Join(), Join())
    with dla_fast.register_adapter(JoinAdapter()):
        assert not dla_fast.swap_(model, units="ladders").swapped
        report = dla_fast.swap_(model, units="nodes", filter_fn=lambda name, module: name == "1")
    assert [e.name for e in report.swapped] == ["1"]
    assert report.counts()["nodes"] == 1


class Lacking:
    unit, kind, op, node = "nodes", "aggregate", "conv_norm_act", FusedConcat

    def resembles(self, module):
        return False


def adapter(**members):
    return type("Mine", (JoinAdapter,), members)()


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (JoinAdapter, TypeError, r"expected an instance, got the class JoinAdapter; pass JoinAdapter\(\)"),
        (object(), TypeError, "expected object.unit to be a string, got None"),
        (Lacking(), TypeError, "expected Lacking.match to be a method, got None"),
        (adapter(unit=3), TypeError, "expected Mine.unit to be a string, got 3"),
        (adapter(unit="trees"), ValueError, "expected Mine.unit to be one of 'nodes', .*, got 'trees'"),
        (adapter(op="conv"), ValueError, "expected Mine.op to be one of 'aggregate', .*, got 'conv'"),
        (adapter(node=Join), TypeError, "expected Mine.node to be a subclass of FusedNode, got <class"),
        (adapter(verify=None), TypeError, "expected Mine.verify to be a method, got None"),
        (adapter(child=""), TypeError, "expected Mine.child to be a name, or a tuple of two or three, got ''"),
        (adapter(child=("a", 1)), TypeError, "expected Mine.child to be a name"),
        (adapter(passes="join"), TypeError, "expected Mine.passes to be a tuple of names, got 'join'"),
        (type("Mine", (dla_fast.swap.ConcatAdapter,), {"child": "a"})(), TypeError, "Mine does not define resembles"),
    ],
)
def test_what_is_no_adapter_is_refused(given, error, match):
    with pytest.raises(error, match=match):
        dla_fast.register_adapter(given)


def test_one_child_neither_adds_nor_stops_before_its_activation():
    class Adds(JoinAdapter):
        def forward(self, module, merge, x):
            return merge([module.near(x), module.far(x)], residual=x)

    with dla_fast.register_adapter(Adds()):
        (entry,) = dla_fast.swap_(Join(), units="nodes").skipped
    assert "join is one child, which neither adds a residual nor leaves its activation out" in entry.reason
