"""The modules: the blocks, and Tree against timm's and against plain PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import assert_same_function, randomise, relative
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dla_fast.nn import AggregationNode, BasicBlock, Bottleneck, ConvLevel, Projection, SplitBottleneck, Tree


class CountPools(TorchDispatchMode):
    """Counts the max-pools that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "max_pool2d" in func.name() and "backward" not in func.name()
        return func(*args, **(kwargs or {}))


def pair_of_blocks(timm, kind, cin, cout, **kwargs):
    dla = timm.models.dla
    if kind == "basic":
        return BasicBlock(cin, cout, **kwargs), dla.DlaBasic(cin, cout, **kwargs)
    if kind == "bottleneck":
        return Bottleneck(cin, cout, **kwargs), dla.DlaBottleneck(cin, cout, **kwargs)
    ours = SplitBottleneck(cin, cout, cardinality=kind, **kwargs)
    return ours, dla.DlaBottleneck(cin, cout, cardinality=kind, base_width=4, **kwargs)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", 32, 64])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_block_equals_timm(timm, kind, stride, dilation):
    ours, theirs = pair_of_blocks(timm, kind, 24, 64, stride=stride, dilation=dilation)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours, theirs = ours.double(), theirs.double()
    x = torch.randn(2, 24, 6, 8, dtype=torch.float64)
    shortcut = torch.randn(2, 64, 6 // stride, 8 // stride, dtype=torch.float64)
    assert_same_function(ours, theirs, lambda m, x, s: m(x, s), lambda m, x, s: m(x, s), x, shortcut)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", 32])
def test_block_adds_its_input_without_shortcut(timm, kind):
    ours, theirs = (m.double() for m in pair_of_blocks(timm, kind, 32, 32))
    x = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    assert_same_function(ours, theirs, lambda m, x: m(x), lambda m, x: m(x), x)


def test_split_bottleneck_rejects():
    with pytest.raises(ValueError, match="out_channels: expected a positive multiple of 32, got 48"):
        SplitBottleneck(16, 48)
    with pytest.raises(ValueError, match="cardinality: expected an integer >= 1, got 0"):
        SplitBottleneck(16, 64, cardinality=0)


def test_conv_level_is_its_layers_in_a_row():
    level = ConvLevel(3, 5, 2, stride=2).double()
    plain = nn.Sequential(*copy.deepcopy(list(level)))
    assert list(level.state_dict()) == list(plain.state_dict())
    assert "4.running_var" in level.state_dict()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    assert_same_function(level, plain, lambda m, x: m(x), lambda m, x: m(x), x)


def test_hooks_and_replaced_norms_are_honoured():
    block, projection = BasicBlock(4, 4).eval(), Projection(4, 6).eval()
    x, seen = torch.randn(2, 4, 3, 3), []
    want, want_projected = block(x), projection(x)
    handles = [bn.register_forward_hook(lambda *_: seen.append(1)) for bn in (block.bn1, projection[1])]
    assert torch.allclose(block(x), want)
    assert torch.allclose(projection(x), want_projected)
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    block.bn2 = nn.Identity()
    y = block.conv2(F.relu(block.bn1(block.conv1(x))))
    assert torch.allclose(block(x), F.relu(y + x), atol=1e-6)


@pytest.mark.parametrize("norm", ["plain", "hooked"])
def test_autocast_takes_a_float32_shortcut(norm):
    block = BasicBlock(4, 4)
    if norm == "hooked":
        block.bn2.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(torch.randn(2, 4, 3, 3))
        assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert block.conv1.weight.grad.dtype == torch.float32


BLOCKS = {
    "basic": (BasicBlock, "DlaBasic", {}),
    "bottleneck": (Bottleneck, "DlaBottleneck", {}),
    "split": (SplitBottleneck, "DlaBottleneck", {"cardinality": 32, "base_width": 4}),
}


@pytest.mark.parametrize(
    "levels, block, cin, cout, stride, dilation, level_root, residual",
    [
        (1, "basic", 8, 12, 2, 1, False, False),
        (1, "bottleneck", 12, 12, 2, 1, True, True),
        (1, "basic", 12, 12, 1, 2, True, False),
        (2, "basic", 8, 12, 2, 1, True, False),
        (2, "bottleneck", 12, 12, 2, 2, True, True),
        (2, "split", 16, 32, 1, 1, False, False),
        (3, "basic", 8, 6, 2, 1, True, True),
        (4, "bottleneck", 6, 8, 2, 1, True, False),
    ],
)
def test_tree_equals_timm(timm, levels, block, cin, cout, stride, dilation, level_root, residual):
    ours_block, name, extra = BLOCKS[block]
    options = {"level_root": level_root, "dilation": dilation, "dtype": torch.float64}
    ours = Tree(levels, ours_block, cin, cout, stride, residual_root=residual, **options)
    their_block = getattr(timm.models.dla, name)
    theirs = timm.models.dla.DlaTree(levels, their_block, cin, cout, stride, root_shortcut=residual, **options, **extra)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, cin, 8, 12, dtype=torch.float64)
    assert_same_function(ours, theirs, lambda m, x: m(x), lambda m, x: m(x), x)


def test_tree_takes_children(timm):
    options = {"level_root": True, "dtype": torch.float64}
    ours = Tree(2, BasicBlock, 4, 6, 2, child_channels=(3, 5), **options)
    theirs = timm.models.dla.DlaTree(2, timm.models.dla.DlaBasic, 4, 6, 2, root_dim=2 * 6 + 3 + 5, **options)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    children = [torch.randn(2, c, 3, 3, dtype=torch.float64) for c in (3, 5)]
    run_ours, run_theirs = (lambda m, x, *c: m(x, c)), (lambda m, x, *c: m(x, None, list(c)))
    assert_same_function(ours, theirs, run_ours, run_theirs, x, *children)


@pytest.mark.parametrize("levels, theirs", [(1, 1), (2, 2), (4, 4)])
def test_a_tree_pools_once(timm, levels, theirs):
    tree = Tree(levels, BasicBlock, 4, 6, 2)
    with CountPools() as ours:
        tree(torch.randn(1, 4, 8, 8)).sum().backward()
    assert ours.count == 1
    with CountPools() as reference:
        timm.models.dla.DlaTree(levels, timm.models.dla.DlaBasic, 4, 6, 2)(torch.randn(1, 4, 8, 8))
    assert reference.count == theirs


def test_a_shared_bottom_is_used_as_it_is():
    tree = Tree(2, BasicBlock, 4, 6, 2).eval()
    x = torch.randn(1, 4, 8, 8)
    bottom = F.max_pool2d(x, 2)
    with CountPools() as pools:
        y = tree(x, bottom=bottom)
    assert pools.count == 0
    assert torch.equal(y, tree(x))
    assert not torch.allclose(y, tree(x, bottom=F.avg_pool2d(x, 2)))


@pytest.mark.parametrize("levels", [1, 2])
def test_dilation_equals_running_each_phase_alone(levels):
    """A dilated convolution is the plain one on each of the d * d interleaved grids."""
    options = {"residual_root": True, "dtype": torch.float64}
    dilated = randomise(Tree(levels, BasicBlock, 4, 6, dilation=2, **options)).eval()
    plain = Tree(levels, BasicBlock, 4, 6, **options).eval()
    plain.load_state_dict(dilated.state_dict())
    x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    y = dilated(x)
    assert relative(plain(x), y) > 0.1
    for i in range(2):
        for j in range(2):
            assert relative(plain(x[:, :, i::2, j::2]), y[:, :, i::2, j::2]) < 1e-12


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, SplitBottleneck])
def test_first_dilation_is_that_of_the_first_3x3_alone(block):
    tree = Tree(2, block, 32, 64, dilation=4, first_dilation=2)
    convs = [m for m in tree.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [m.dilation[0] for m in convs] == [2] + [4] * (len(convs) - 1)
    assert all(m.padding == m.dilation for m in convs)


def test_nothing_is_written_to_inputs():
    tree = Tree(2, BasicBlock, 4, 6, 2, level_root=True, child_channels=(3,))
    x, child = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 2, 2)
    kept, versions, children = (x.clone(), child.clone()), (x._version, child._version), [child]
    with torch.no_grad():
        tree(x, children)
        tree.eval()(x, children)
    assert torch.equal(x, kept[0])
    assert torch.equal(child, kept[1])
    assert (x._version, child._version) == versions
    assert len(children) == 1


def test_tree_rejects():
    tree = Tree(2, BasicBlock, 4, 6, 2, child_channels=(3,))
    with pytest.raises(ValueError, match="stride 2 divides, got 5x8; 4x8 would fit"):
        tree(torch.randn(1, 4, 5, 8), [torch.randn(1, 3, 2, 4)])
    with pytest.raises(ValueError, match=r"children: expected 1 tensors, as child_channels \[3\] has, got 0"):
        tree(torch.randn(1, 4, 4, 8))
    with pytest.raises(ValueError, match=r"children\[0\]: expected 3 channels \(child_channels\[0\]\), got shape"):
        tree(torch.randn(1, 4, 4, 8), [torch.randn(1, 4, 2, 4)])
    for name, args in (("levels", (0,)), ("stride", (1, 0)), ("dilation", (1, 1, 0))):
        levels, stride, dilation = (*args, 1, 1)[:3]
        with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1, got 0"):
            Tree(levels, BasicBlock, 4, 6, stride, dilation=dilation)


@pytest.mark.parametrize(
    "module, channels",
    [
        (AggregationNode([4], 6), 4),
        (SplitBottleneck(32, 32), 32),
        (Tree(2, BasicBlock, 4, 6, 2, level_root=True, residual_root=True), 4),
    ],
    ids=["node", "block", "tree"],
)
def test_copies_and_compiles(module, channels):
    module = randomise(copy.deepcopy(module)).eval()
    x = torch.randn(2, channels, 4, 4)
    want = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), want)
    torch._dynamo.reset()
    for training in (False, True):
        eager, compiled = copy.deepcopy(module).train(training), copy.deepcopy(module).train(training)
        graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        y, z = eager(x), graph(x)
        y.square().mean().backward()
        z.square().mean().backward()
        assert torch.allclose(y, z, atol=1e-5)
        for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-4)
        for a, b in zip(eager.buffers(), compiled.buffers(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
