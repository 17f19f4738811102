"""Which forwards swap_ takes at their word after a short run."""

from __future__ import annotations

import block_helpers
import pytest
import torch
import torch.nn.functional as F
from swap_helpers import ListRoot, Root
from torch import nn
from torch.nn.functional import relu as activated

import dla_fast
from dla_fast.swap import known, verify


class Written(Root):
    def forward(self, *children):
        """With a docstring

        of several lines.
        """
        x = torch.cat(children, 1)
        y = self.bn(self.conv(x))
        if not self.residual:
            return self.relu(y)
        y += children[0]
        return self.relu(y)


class Listed(Root):
    def forward(self, x_children, unused=None):
        x = self.bn(self.conv(torch.cat([*x_children], dim=1)))
        x = x + x_children[0] if self.residual else x
        return activated(x)


KNOWN = {
    "root": Root,
    "written otherwise": Written,
    "a list": Listed,
    "block": block_helpers.BasicBlock,
    "split block": block_helpers.BottleneckX,
    "functional block": block_helpers.Required,
}


@pytest.mark.parametrize("kind", KNOWN)
def test_known(kind):
    module = KNOWN[kind]()
    assert known.is_known(module)
    assert dla_fast.swap_(module, units=("nodes", "blocks")).swapped


@pytest.mark.parametrize("name", ["dla34", "dla46_c", "resnet50", "torchvision resnet50"])
def test_those_of_the_networks_that_most_people_have_are_known(timm, name):
    if name.startswith("torchvision "):
        import torchvision

        model = torchvision.models.resnet50()
    else:
        model = timm.create_model(name)
    parts = [m for m in model.modules() if type(m).__name__.endswith(("Root", "Basic", "Bottleneck", "BasicBlock"))]
    assert parts
    assert all(known.is_known(m) for m in parts)


def _end(self, *x):
    return self.relu(self.bn(self.conv(torch.cat(x, 1))))


def _root(forward, **attributes):
    return type("OtherRoot", (Root,), {"forward": forward, **attributes})


def _asks_for_the_number(self, *x):
    y = self.bn(self.conv(torch.cat(x, 1)))
    if len(x) > 3:
        y = y + x[0]
    return self.relu(y)


def _asks_for_the_truth(self, *x):
    y = self.bn(self.conv(torch.cat(x, 1)))
    if x[3:]:
        y = y + x[0]
    return self.relu(y)


def _asks_a_local(self, *x):
    y = self.bn(self.conv(torch.cat(x, 1)))
    if y:
        y = y + x[0]
    return self.relu(y)


def _asks_for_the_mode(self, *x):
    y = self.bn(self.conv(torch.cat(x, 1)))
    if self.training and self.residual:
        y = y + x[0]
    return self.relu(y)


def _multiplies(self, *x):
    return self.relu(self.bn(self.conv(torch.cat(x, 1))) * 1)


def _keeps(self, *x):
    self.last = x
    return self.relu(self.bn(self.conv(torch.cat(x, 1))))


def _calls_a_method(self, *x):
    return self.relu(self.bn(self.conv(torch.cat(x, 1)))).clamp(max=6)


def _calls_a_function(self, *x):
    return torch.clamp(self.relu(self.bn(self.conv(torch.cat(x, 1)))), 0, 6)


def _calls_through_a_child(self, *x):
    return self.relu.forward(self.bn(self.conv(torch.cat(x, 1))))


def _repeats(self, *x):
    for _ in (1, 2):
        y = self.relu(self.bn(self.conv(torch.cat(x, 1))))
    return y


def _slices(self, *x):
    return self.relu(self.bn(self.conv(torch.cat(x[:8], 1))))


def _under_no_grad(self, *x):
    with torch.no_grad():
        return self.relu(self.bn(self.conv(torch.cat(x, 1))))


def _tries(self, *x):
    try:
        return self.relu(self.bn(self.conv(torch.cat(x, 1))))
    except ValueError:
        return x[0]


def _default(self, *x, most=6.0):
    return self.relu(self.bn(self.conv(torch.cat(x, 1))))


UNKNOWN = [
    _asks_for_the_number, _asks_for_the_truth, _asks_a_local, _asks_for_the_mode, _multiplies, _keeps, _calls_a_method,
    _calls_a_function, _calls_through_a_child, _repeats, _slices, _under_no_grad, _tries, _default,
]  # fmt: skip


@pytest.mark.parametrize("forward", UNKNOWN, ids=lambda forward: forward.__name__)
def test_unknown(forward):
    assert not known.is_known(_root(forward)())


def test_the_one_that_they_differ_from_is_known():
    assert known.is_known(_root(_end)())


def test_a_forward_whose_source_is_not_what_runs():
    cls = type("Own", (Root,), {})

    def forward(self, *x):
        return self.relu(self.bn(self.conv(torch.cat(x, 1))))

    cls.forward = forward
    assert known.is_known(cls())
    forward.__code__ = _asks_for_the_number.__code__
    assert not known.is_known(cls())
    forward.__code__ = _end.__code__.replace(co_consts=(None, 0))
    assert not known.is_known(cls())


def test_without_a_source():
    scope = {"torch": torch}
    exec("def forward(self, *x):\n    return self.relu(self.bn(self.conv(torch.cat(x, 1))))", scope)
    module = _root(scope["forward"])()
    assert not known.is_known(module)
    assert dla_fast.swap_(module).swapped


def test_names_that_mean_something_else(monkeypatch):
    assert known.is_known(Root())
    monkeypatch.setitem(Root.forward.__globals__, "torch", F)
    assert not known.is_known(Root())


@pytest.mark.parametrize(
    "attributes",
    [
        {"bn": property(lambda self: nn.Identity())},
        {"relu": staticmethod(F.relu)},
        {"__getattr__": lambda self, name: nn.Module.__getattr__(self, name)},
        {"__getattribute__": lambda self, name: object.__getattribute__(self, name)},
        {"__call__": lambda self, *x: 2 * nn.Module.__call__(self, *x)},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_classes_that_change_what_a_forward_means(attributes):
    module = Root()
    module.__class__ = type("Changed", (Root,), attributes)
    assert not known.is_known(module)


def test_children_count():
    class Odd(nn.Module):
        def forward(self, x):
            return x if x.shape[-1] % 2 else x + 1

    block = block_helpers.Projected()
    assert not known.is_known(block), "it calls its base's"
    block = block_helpers.BasicBlock()
    block.bn1 = Odd()
    assert not known.is_known(block)
    for change in (lambda m: setattr(m.relu, "forward", abs), lambda m: setattr(m, "drop", nn.Dropout(0.0))):
        node = Root()
        change(node)
        assert not known.is_known(node)


def test_a_flag_of_a_property_is_not_asked():
    """What is looked up runs nothing of the module's."""
    module = Root()
    del module.residual
    module.__class__ = type("Asks", (Root,), {"residual": property(lambda self: pytest.fail("was asked"))})
    assert not known.is_known(module)


def test_a_known_one_is_compared_once_in_all_widths(monkeypatch):
    seen = []
    exact = verify._Comparison.exact
    monkeypatch.setattr(
        verify._Comparison, "exact", lambda self, *args: seen.append(len(args[1])) or exact(self, *args)
    )
    dla_fast.swap_(nn.ModuleList([Root(24, 8), Root(30, 10), Root(24, 8)]))
    assert seen == [0]
    seen.clear()
    dla_fast.swap_(nn.ModuleList([ListRoot(24, 8), ListRoot(30, 10), ListRoot(24, 8)]))
    assert len(seen) == 3, "at length, and once in each width"
    assert seen[0] > seen[1] > 0
    assert seen[1] == seen[2]
