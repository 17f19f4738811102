"""Checkpoints into swapped models: the same state, outputs and errors as in stock ones, however they come there."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from nn_helpers import randomise
from pairs import LAYOUTS, assert_alike, image, see

import dla_fast


def network(timm):
    """timm's classes in a small size: stock code with a DLA's keys."""
    torch.manual_seed(0)
    dla = timm.models.dla
    return randomise(dla.DLA((1, 1, 1, 2, 2, 1), (4, 6, 8, 8, 12, 16), block=dla.DlaBasic, num_classes=5)).double()


@pytest.fixture(scope="module")
def checkpoints(timm, tmp_path_factory):
    """The same weights in every layout, as files."""
    folder, state = tmp_path_factory.mktemp("checkpoints"), network(timm).state_dict()
    state = {key: value.float() * 0.9 if value.is_floating_point() else value + 3 for key, value in state.items()}
    for layout in ("timm", "original", "detector"):
        torch.save(dla_fast.convert_state_dict(state, to=layout), folder / f"{layout}.pth")
    return folder


def scenario(model, x, path, head):
    """Run, load, run in evaluation, train a step."""
    with torch.no_grad():
        before = model(x)
        report = dla_fast.load_pretrained(model, path, head=head)
        y = model.eval()(x)
    model.train()(x).square().sum().backward()
    return before, y, report.loaded, report.kept, report.dropped, report.renamed


@pytest.mark.parametrize("around", ["", "frozen", "replicated"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading(timm, checkpoints, layout, around):
    source = {"nchw": "original", "channels_last": "detector"}[layout] if around != "frozen" else "timm"
    stock = network(timm).to(memory_format=LAYOUTS[layout])
    swapped = copy.deepcopy(stock)
    assert dla_fast.swap_(swapped).swapped
    models = [stock, swapped]
    if around == "frozen":
        dla_fast.freeze_(swapped.eval())
        stock.eval()
    if around == "replicated":
        models = [torch.nn.DataParallel(model) for model in models]
    x = image((2, 64, 64), layout)
    head = "error"
    if around == "replicated":
        head = "drop"
        for model in models:
            model.module.reset_classifier(3)
            torch.nn.init.ones_(model.module.double().fc.weight)
            torch.nn.init.zeros_(model.module.fc.bias)
    run = functools.partial(scenario, path=checkpoints / f"{source}.pth", head=head)
    assert_alike([see(model, run, x) for model in models])


def test_what_does_not_fit(timm, checkpoints):
    stock = network(timm)
    stock.reset_classifier(7)
    stock.double()
    swapped = copy.deepcopy(stock)
    dla_fast.swap_(swapped)
    run = functools.partial(scenario, path=checkpoints / "timm.pth", head="error")
    seen = [see(model, run, image((2, 32, 32))) for model in (stock, swapped)]
    assert isinstance(seen[0].raised, ValueError)
    assert_alike(seen, same_text=True)


def test_a_swapped_models_state_converts_as_a_stock_ones(timm):
    stock = network(timm)
    swapped = copy.deepcopy(stock)
    dla_fast.swap_(swapped)
    for layout in ("timm", "original", "detector"):
        want, got = (dla_fast.convert_state_dict(model.state_dict(), to=layout) for model in (stock, swapped))
        assert list(got) == list(want)
        assert got._metadata == want._metadata
        assert str(got.report) == str(want.report)
        assert all(torch.equal(got[key], want[key]) for key in want)
