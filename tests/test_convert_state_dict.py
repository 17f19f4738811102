"""Checkpoints from one layout into another: every direction, what is told of it, and what is refused."""

from __future__ import annotations

import io
from collections import OrderedDict

import pytest
import torch
from checkpoint_helpers import KINDS, Detector, drawn, segmenter, with_projects
from model_helpers import tiny

import dla_fast
from dla_fast.models import ConvertedStateDict
from dla_fast.models.layouts import LAYOUTS

# The layout of each kind of network, and what it is in each layout: a network that takes the keys with strict=True.
FITS = {
    ("classification", "timm"): tiny,
    ("classification", "original"): lambda: with_projects(tiny()),
    ("segmentation", "timm"): lambda: tiny(num_classes=0),
    ("segmentation", "original"): lambda: with_projects(segmenter()),
    ("detection", "timm"): lambda: tiny(num_classes=0),
    ("detection", "original"): lambda: with_projects(tiny(num_classes=0)),
    ("detection", "detector"): lambda: with_projects(Detector()),
}


def kept(state, converted):
    """Which key of ``state`` each tensor of ``converted`` is, by identity."""
    by_id = {id(value): key for key, value in state.items()}
    return {key: by_id[id(value)] for key, value in converted.items() if id(value) in by_id}


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_direction(kind, to):
    model = drawn(kind)
    state = model.state_dict()
    before = OrderedDict(state)
    converted = dla_fast.convert_state_dict(state, to=to)
    report = converted.report
    assert list(state.items()) == list(before.items()), "the input was changed"
    # Every key is accounted for, and every tensor is the one that was there.
    moved = kept(state, converted)
    assert {key: report.renamed.get(old, old) for key, old in moved.items()} == {key: key for key in moved}
    assert set(moved) | set(report.added) == set(converted)
    assert set(moved.values()) | set(report.dropped) == set(state)
    assert not set(moved.values()) & set(report.dropped)
    assert all(torch.equal(converted[key], converted[source]) for key, source in report.added.items())
    assert all(f"dropped {key}: " in str(report) for key in report.dropped)
    fits = FITS.get((kind.partition(",")[0], to))
    if fits is not None:
        fits().load_state_dict(converted, strict=True)
    # The versions of the modules go along: without them an old norm would get a counter.
    assert converted._metadata[next(k for k in converted if k.endswith("base_layer.1.bias"))[:-5]] == {"version": 2}
    # Again changes nothing.
    again = dla_fast.convert_state_dict(converted, to=to)
    assert list(again.items()) == list(converted.items())
    assert str(again.report) == "0 renamed, 0 added, 0 dropped"


@pytest.mark.parametrize("through", LAYOUTS)
@pytest.mark.parametrize("layout", ["timm", "original", "detector"])
def test_there_and_back(layout, through):
    state = dla_fast.convert_state_dict(drawn("classification").state_dict(), to=layout)
    back = dla_fast.convert_state_dict(dla_fast.convert_state_dict(state, to=through), to=layout)
    assert list(back) == list(state)
    assert list(back._metadata.items()) == list(state._metadata.items())
    unused = {key for key in back if back[key] is not state[key]}
    assert unused == (set(state.report.added) if through == "timm" else set())
    assert all(torch.equal(back[key], state[key]) for key in unused)


def test_what_is_around_a_checkpoint_is_told():
    state = drawn("classification").state_dict()
    state["fc.weight"] = state["fc.weight"].flatten(1)
    around = {"epoch": 3, "state_dict": {"model": {f"module.{k}": v for k, v in state.items()}}}
    converted = dla_fast.convert_state_dict(around, to="detector")
    report = converted.report
    assert report.within == "state_dict.model"
    assert report.renamed["module.level2.root.conv.weight"] == "base.level2.root.conv.weight"
    assert report.reshaped == {"base.fc.weight": (5, 16)}
    text = str(report)
    assert text.startswith(
        f"{len(state)} renamed, {len(report.added)} added, 0 dropped\nfound under state_dict.model\n"
    )
    assert f"renamed module.* -> base.*: {len(state)} keys\n" in text
    assert "\nadded base.level4.project.0.weight: a copy of base.level4.tree1.project.0.weight\n" in text
    assert converted["base.fc.weight"].data_ptr() == state["fc.weight"].data_ptr()
    counted = dla_fast.convert_state_dict({"n_averaged": torch.tensor(3), **state}, to="timm")
    assert list(counted.report.dropped) == ["n_averaged"]


def test_unknown_keys():
    state = {f"module.{key}": value for key, value in Detector().state_dict().items()}
    strange = {
        f"module.{key}": torch.ones(1) for key in ("base.level2.tree3.conv1.weight", "base.a.weight", "b.c.weight")
    }
    with pytest.raises(
        ValueError, match=r"3 keys are in no layout that is known \(module\.b.* and .*unknown='keep'|3 keys"
    ):
        dla_fast.convert_state_dict({**state, **strange}, to="timm")
    dropped = dla_fast.convert_state_dict({**state, **strange}, to="detector", unknown="drop")
    assert set(dropped.report.dropped) == set(strange)
    taken = dla_fast.convert_state_dict({**state, **strange}, to="timm", unknown="keep")
    assert {key for key in ("level2.tree3.conv1.weight", "a.weight", "b.c.weight") if key in taken} == {
        "level2.tree3.conv1.weight",
        "a.weight",
        "b.c.weight",
    }
    for layout, unknown, message in (("ours", "error", "to: expected one of 'timm'"), ("timm", "skip", "unknown: exp")):
        with pytest.raises(ValueError, match=message):
            dla_fast.convert_state_dict(state, layout, unknown=unknown)


def test_a_layer_to_copy_that_is_there_in_part():
    state = {k: v for k, v in tiny().state_dict().items() if k != "level4.tree1.project.1.weight"}
    with pytest.raises(ValueError, match=r"missing level4\.tree1\.project\.1\.weight"):
        dla_fast.convert_state_dict(state, "detector")


def test_a_file_of_it_is_read_anywhere():
    converted = dla_fast.convert_state_dict(tiny().state_dict(), to="original")
    assert isinstance(converted, ConvertedStateDict)
    assert str(converted.copy().report) == str(converted.report)
    file = io.BytesIO()
    torch.save({"state_dict": converted}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)["state_dict"]
    assert type(found) is OrderedDict
    assert list(found) == list(converted)
    assert found._metadata == converted._metadata
