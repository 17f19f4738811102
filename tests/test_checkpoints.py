"""Checkpoints: both layouts, what training scripts put around them, and what does not fit."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from model_helpers import NAMES, PARAMETERS, network, randomise, relative, tiny
from torch import nn

from dla_fast.models import create_model, from_original, load_state_dict, to_original


def graft_projects(trees: nn.Module, tree_class: type) -> None:
    """Give timm's deeper trees the unused projects of the original code."""
    for tree in [m for m in trees.modules() if isinstance(m, tree_class) and m.levels > 1]:
        first = tree
        while isinstance(first, tree_class):
            first = first.tree1
        leaf = [m for m in tree.modules() if getattr(m, "root", None) is not None][-1]
        cin, cout = first.conv1.in_channels, leaf.root.conv.out_channels
        if cin != cout:
            tree.project = nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))


@pytest.mark.parametrize("name", NAMES)
def test_layouts_convert_both_ways(name):
    model = create_model(name, device="meta").to_empty(device="cpu")
    state = model.state_dict()
    original = to_original(state, name)
    added = [k for k in original if k not in state]
    parameters = [k for k in added if "running" not in k and "tracked" not in k]
    assert sum(original[k].numel() for k in parameters) == PARAMETERS[name][1]
    # Per unused project: a convolution, a norm's weight and bias, and its three buffers.
    assert len(parameters) == 3 * len(added) // 6
    back = from_original(original, model)
    assert list(back) == list(state)
    assert all(back[k] is v for k, v in state.items())
    assert list(to_original(original)) == list(original) == list(to_original(back))
    assert list(from_original(state)) == list(state)


@pytest.mark.parametrize("name", ["dla34", "dla46x_c", "dla102", "dla169"])
def test_original_layout_is_that_of_trees_with_projects(timm, name):
    original = timm.create_model(name)
    graft_projects(original, timm.models.dla.DlaTree)
    ours = create_model(name, dtype=torch.float32)
    converted = to_original(ours.state_dict())
    original.load_state_dict(converted, strict=True)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert relative(original.eval()(x), ours.eval()(x)) <= 1e-5
        fresh = load_state_dict(network(name), original.state_dict())
        assert torch.equal(fresh.eval()(x), ours(x))


def test_synthesised_projects_keep_dtype_and_repeat():
    state = tiny(dtype=torch.float64).state_dict()
    first, second = to_original(state), to_original(state)
    added = [k for k in first if k not in state]
    assert added
    assert all(torch.equal(first[k], second[k]) for k in added)
    assert {first[k].dtype for k in added} == {torch.float64, torch.int64}
    assert all(first[k].data_ptr() not in {v.data_ptr() for v in state.values()} for k in added)
    # The original registers a tree's project last.
    level4 = [k for k in first if k.startswith("level4.")]
    assert level4[-6:] == [k for k in added if k.startswith("level4.project.")]
    leaf = [k for k in level4 if k.startswith("level4.tree1.")]
    assert leaf[-6:] == [k for k in state if k.startswith("level4.tree1.project.")]


def test_load_reads_wrapped_prefixed_and_old_checkpoints():
    source, x = randomise(tiny()).eval(), torch.randn(1, 3, 32, 32)
    state = to_original(source.state_dict())
    state["fc.weight"] = state["fc.weight"].flatten(1)
    state = {f"module.{k}": v for k, v in state.items() if "num_batches_tracked" not in k}
    model = tiny().eval()
    assert load_state_dict(model, {"epoch": 3, "state_dict": state}) is model
    assert torch.equal(model(x), source(x))


def test_load_rejects_and_writes_nothing():
    model = tiny()
    good, before = tiny().state_dict(), copy.deepcopy(model.state_dict())

    def rejects(state, message, error=ValueError):
        with pytest.raises(error, match=message):
            load_state_dict(model, state)

    rejects({k: v for k, v in good.items() if k != "level2.root.bn.bias"}, r"1 missing \(level2\.root\.bn\.bias\)")
    rejects({**good, "head.weight": torch.ones(1)}, r"1 unexpected \(head\.weight\)")
    rejects({**good, "fc.bias": torch.ones(7)}, r"fc\.bias: expected \(5,\), got \(7,\)")
    rejects({**good, "module.fc.bias": torch.ones(5)}, "'fc.bias' is there twice")
    rejects({"conv1.weight": torch.ones(1)}, "missing base_layer.0.weight.*conv1.weight")
    rejects({}, "none at all")
    rejects([1], "expected a mapping", TypeError)
    rejects({**good, "fc.bias": 3}, "expected a Tensor, got int", TypeError)
    with pytest.raises(ValueError, match="2 missing"):
        from_original({k: v for k, v in good.items() if "fc" not in k}, model)
    with pytest.raises(ValueError, match=r"missing level4\.tree1\.project\.1\.weight"):
        to_original({k: v for k, v in good.items() if k != "level4.tree1.project.1.weight"})
    with pytest.raises(ValueError, match="unexpected"):
        to_original({**good, "x": torch.ones(1)}, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    load_state_dict(model, {k: v for k, v in good.items() if "fc" not in k}, strict=False)
    assert torch.equal(model.level2.root.conv.weight, good["level2.root.conv.weight"])
    assert torch.equal(model.fc.weight, before["fc.weight"])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {0: {}}, "param_groups": []}, "scheduler": None},
        lambda state: {"model_state_dict": state, "loss": 0.5},
        lambda state: {"model_state": state, "cfg": "dla34"},
        lambda state: {"net": state, "acc": 95.1},
        lambda state: {"network": state},
        lambda state: {"module": state, "global_steps": 3},
        lambda state: {"model_ema": {"n_averaged": torch.tensor(7), **state}},
        lambda state: {"state_dict": {"model": OrderedDict(state)}},
        # Options under one name, the network under another.
        lambda state: {"model": {"name": "dla34", "num_classes": 5}, "state_dict": state},
        lambda state: {"ema": {k: torch.zeros_like(v) for k, v in state.items()}, "model": state},
    ],
)
def test_load_reads_what_training_scripts_save(wrap, prefix):
    source = randomise(tiny())
    want = source.state_dict()
    found = wrap({prefix + key: value for key, value in want.items()})
    model = load_state_dict(tiny(), found)
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    assert list(from_original(found)) == list(want)
    assert set(to_original(found)) == set(to_original(want))


def test_a_part_that_was_compiled_alone():
    model = tiny()
    want = model.state_dict()
    model.level3 = torch.compile(model.level3, backend="eager")
    assert "level3._orig_mod.tree1.root.conv.weight" in model.state_dict()
    assert list(from_original(model.state_dict())) == list(want)


def test_what_is_no_checkpoint_is_listed():
    weights = {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}
    found = {"epoch": 3, "weights": weights, "optimizer": {"state": {}}}
    message = r"found epoch \(int\), weights \(dict of conv1.weight, fc.bias\), optimizer \(dict of state\)$"
    for read in (from_original, to_original, lambda state: load_state_dict(tiny(), state)):
        with pytest.raises(ValueError, match=message):
            read(found)
    with pytest.raises(ValueError, match=r"under state_dict, .*; found model \(dict of conv1.weight, fc.bias\)$"):
        from_original({"model": weights})
    with pytest.raises(ValueError, match=r"found model \(DLA\)$"):
        from_original({"model": tiny()})
    with pytest.raises(ValueError, match="'base_layer.0.weight' is there twice"):
        from_original({f"{p}{k}": v for k, v in tiny().state_dict().items() for p in ("", "_orig_mod.")})
    with pytest.raises(TypeError, match="expected names of parameters, got 3"):
        from_original({**tiny().state_dict(), 3: torch.ones(1)})
