"""AggregationNode: its function, the inputs that it takes, and what it runs when its children are others."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from nn_helpers import assert_same_function, randomise
from torch import nn

from dla_fast.nn import AggregationNode


class PlainNode(nn.Module):
    """An aggregation node op by op."""

    def __init__(self, in_channels: int, out_channels: int, residual: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.residual = residual

    def forward(self, *xs):
        y = self.bn(self.conv(torch.cat(xs, 1)))
        return F.relu(y + xs[0] if self.residual else y)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [(6,), (6, 3), (6, 6, 5, 1)])
def test_aggregation_node(channels, residual):
    node, plain = AggregationNode(channels, 6, residual).double(), PlainNode(sum(channels), 6, residual).double()
    xs = [torch.randn(2, c, 5, 3, dtype=torch.float64) for c in channels]
    assert_same_function(node, plain, lambda m, *xs: m(list(xs)), lambda m, *xs: m(*xs), *xs)
    assert torch.equal(node.eval()(*xs), node([*xs]))


def test_aggregation_node_counts_batches_and_follows_its_norm():
    node, plain = AggregationNode(4, 3), PlainNode(4, 3, False)
    node.load_state_dict(plain.state_dict())
    node.bn.momentum = plain.bn.momentum = None
    for _ in range(3):
        x = torch.randn(2, 4, 3, 3)
        node(x), plain(x)
    assert node.bn.num_batches_tracked == 3
    assert torch.allclose(node.bn.running_mean, plain.bn.running_mean)
    assert torch.allclose(node.bn.running_var, plain.bn.running_var)
    before = copy.deepcopy(node.bn.state_dict())
    node.bn.eval()
    node(torch.randn(2, 4, 3, 3))
    assert node.training
    assert all(torch.equal(v, before[k]) for k, v in node.bn.state_dict().items())


def test_aggregation_node_rejects():
    node = AggregationNode([4, 2], 3)
    before = copy.deepcopy(node.state_dict())
    with pytest.raises(ValueError, match="at least one input"):
        AggregationNode(6, 3)()
    with pytest.raises(ValueError, match="expected 4 \\+ 3 = 7 input channels, got 6"):
        AggregationNode(6, 3)(torch.randn(1, 4, 2, 2), torch.randn(1, 3, 2, 2))
    for xs in ([], [torch.randn(1, 6, 2, 2)], [torch.randn(1, 2, 2, 2)] * 3):
        with pytest.raises(ValueError, match=rf"xs: expected 2 tensors, as in_channels \[4, 2\] has, got {len(xs)}"):
            node(*xs)
    with pytest.raises(
        ValueError, match=r"xs\[0\]: expected 4 channels \(in_channels\[0\]\), got shape \(1, 2, 2, 2\)"
    ):
        node(torch.randn(1, 2, 2, 2), torch.randn(1, 4, 2, 2))
    with pytest.raises(TypeError, match=r"xs\[1\]: expected a Tensor, got int"):
        node(torch.randn(1, 4, 2, 2), 2)
    with pytest.raises(ValueError, match="in_channels: expected an integer, or .* got none"):
        AggregationNode([], 3)
    with pytest.raises(ValueError, match=r"in_channels: expected channels >= 1 of each input, got \[64, -1\]"):
        AggregationNode([64, -1], 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        node(torch.randn(1, 4, 1, 1), torch.randn(1, 2, 1, 1))
    with pytest.raises(ValueError, match="act: unknown activation 'gelu'"):
        AggregationNode(4, 3, act="gelu")
    # nn.BatchNorm2d counts the batch that it then refuses.
    before["bn.num_batches_tracked"] += 1
    assert all(torch.equal(v, before[k]) for k, v in node.state_dict().items())


def test_aggregation_node_of_a_total_takes_any_split():
    node = AggregationNode(6, 3).eval()
    for channels in ((4, 2), (2, 4), (6,), (1, 2, 3)):
        node([torch.randn(1, c, 2, 2) for c in channels])
    assert repr(AggregationNode((4, 2), 3)).startswith("AggregationNode(\n  in_channels=[4, 2], residual=False, act=")
    assert "in_channels=6," in repr(node)


def test_aggregation_node_holds_inputs_to_its_channels_wherever_it_goes():
    node = randomise(AggregationNode([4, 2], 3)).eval()
    xs = torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3)
    want = node(*xs)
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert torch.equal(twin(*xs), want)
        with pytest.raises(ValueError, match="in_channels"):
            twin(*reversed(xs))
    # As those that were pickled before it kept its channels.
    del node.__dict__["in_channels"]
    old = pickle.loads(pickle.dumps(node))
    assert torch.equal(old(*xs), want)
    assert old(*reversed(xs)).shape == want.shape
    assert "in_channels" not in old.extra_repr()


def test_aggregation_node_with_channels_compiles_and_exports():
    node = randomise(AggregationNode([4, 2], 3)).eval()
    xs = torch.randn(2, 4, 3, 3), torch.randn(2, 2, 3, 3)
    torch._dynamo.reset()
    with torch.no_grad():
        want = node(*xs)
        compiled = torch.compile(node, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*xs), want)
        batch = torch.export.Dim("batch")
        shapes = {"xs": tuple({0: batch} for _ in xs)}
        exported = torch.export.export(node, xs, dynamic_shapes=shapes).module()
        torch.testing.assert_close(exported(*xs), want)
        assert exported(torch.randn(5, 4, 3, 3), torch.randn(5, 2, 3, 3)).shape == (5, 3, 3, 3)


@pytest.mark.parametrize("change", ["hook on the convolution", "hook on the norm", "folded norm", "converted norm"])
def test_aggregation_node_runs_what_its_children_have_become(change):
    node = AggregationNode([4, 3], 4, residual=True).eval()
    torch.nn.init.normal_(node.bn.weight)
    xs = [torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5)]
    expected = node(*xs)
    called = []
    if change == "hook on the convolution":
        node.conv.register_forward_hook(lambda *_: called.append(1))
    elif change == "hook on the norm":
        node.bn.register_forward_pre_hook(lambda *_: called.append(1))
    elif change == "folded norm":
        node.conv = torch.nn.utils.fusion.fuse_conv_bn_eval(node.conv, node.bn)
        node.bn = torch.nn.Identity()
    else:
        node = torch.nn.SyncBatchNorm.convert_sync_batchnorm(node)
        node.bn.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(node(*xs), expected)
    assert called or change == "folded norm"
