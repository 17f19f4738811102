"""Weights that others make of a model's: moving averages, averages over the last epochs, checkpoints both ways."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from pairs import assert_alike, compare, freeze, image, pair, see, step
from torch import nn
from torch.optim import swa_utils

import dla_fast


def trained(model, x, averaged, update, steps=3):
    """Training steps with an average that is updated after each, and what the average answers then."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        step(model, x)
        optimizer.step()
        update()
        with torch.no_grad():
            found.append(averaged.eval()(x))
    return found, dict(averaged.state_dict())


EMA = {
    "multi, buffers": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7), "use_buffers": True},
    "multi": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7), "use_buffers": False},
    "single": {"avg_fn": swa_utils.get_ema_avg_fn(0.7), "use_buffers": True},
    "mean": {},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("kind", EMA)
@pytest.mark.parametrize("name", ["concatenating", "node"])
def test_moving_average(name, kind, frozen):
    def scenario(model, x):
        averaged = swa_utils.AveragedModel(model, **EMA[kind]).eval()
        if frozen:
            # Updated in place, from one answer to the next.
            freeze(averaged)
        return trained(model, x, averaged, lambda: averaged.update_parameters(model))

    compare(scenario, name, verify=False)


def test_average_that_is_swapped_by_itself():
    """Of a stock model in training the average alone runs fused, and the other way round."""

    def scenario(which):
        def run(model, x):
            model = copy.deepcopy(model)
            averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.7))
            if which is not None:
                dla_fast.swap_(averaged.module if which == "average" else model, verify=False)
            return trained(model, x, averaged, lambda: averaged.update_parameters(model))

        return run

    stock = pair("adding", verify=False)[0]
    assert_alike([see(stock, scenario(None), image()), see(stock, scenario("average"), image())])
    assert_alike([see(stock, scenario(None), image()), see(stock, scenario("model"), image())])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", ["adding", "blocks"])
def test_statistics_measured_anew(name):
    """update_bn: all running statistics as plain means over a few batches, in training mode and without momentum."""

    def scenario(model, x):
        averaged = swa_utils.AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scheduler = swa_utils.SWALR(optimizer, swa_lr=5e-4, anneal_epochs=2)
        found = [trained(model, x, averaged, lambda: (averaged.update_parameters(model), scheduler.step()), 2)]
        swa_utils.update_bn([(image(seed=i), i) for i in range(3)], averaged)
        momenta = [m.momentum for m in averaged.modules() if isinstance(m, nn.BatchNorm2d)]
        with torch.no_grad():
            found.append(averaged.eval()(x))
        return found, momenta, list(averaged.buffers())

    compare(scenario, name, verify=False)


@pytest.mark.parametrize("foreach", [False, True])
def test_timms_average(timm, foreach):
    from timm.utils import ModelEmaV3

    def scenario(model, x):
        averaged = ModelEmaV3(model, decay=0.7, foreach=foreach)
        return trained(model, x, averaged, lambda: averaged.update(model))

    compare(scenario, "concatenating", verify=False)


def halved(model):
    return {k: v * 0.5 if v.is_floating_point() else v + 3 for k, v in model.state_dict().items()}


def load_all(model):
    return model.load_state_dict(halved(model))


def load_assigned(model):
    return model.load_state_dict(halved(model), assign=True)


def load_some(model):
    state = {k: v for i, (k, v) in enumerate(halved(model).items()) if i % 3}
    return model.load_state_dict({**state, "more": torch.ones(1)}, strict=False)


def load_too_few(model):
    state = halved(model)
    state.popitem()
    return model.load_state_dict(state)


def load_other_shapes(model):
    return model.load_state_dict({k: v[..., None] for k, v in halved(model).items()})


def load_other_dtype(model):
    return model.load_state_dict({k: v.float() for k, v in halved(model).items()})


def load_other_dtype_assigned(model):
    model.load_state_dict({k: v.float() for k, v in halved(model).items()}, assign=True)
    model.double()


def load_from_file(model):
    file = io.BytesIO()
    torch.save(halved(model), file)
    file.seek(0)
    return model.load_state_dict(torch.load(file, weights_only=True, mmap=False), assign=True)


def load_from_meta(model):
    """What is loaded lazily: nothing has values before they are assigned."""
    state = halved(model)
    model.to("meta")
    return model.load_state_dict(state, assign=True)


def emptied(model):
    state = halved(model)
    # Gradients would be emptied too.
    model.zero_grad()
    model.to("meta").to_empty(device="cpu")
    return model.load_state_dict(state)


LOADS = [
    load_all, load_assigned, load_some, load_too_few, load_other_shapes, load_other_dtype, load_other_dtype_assigned,
    load_from_file, load_from_meta, emptied,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:a model that dla_fast.freeze_ has frozen is called with gradients")
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__)
def test_loading_after_the_swap(load, frozen):
    """In training and in evaluation; never an answer from what was kept of the values before."""

    def scenario(model, x):
        found = []
        if frozen:
            freeze(model.eval())
        else:
            found.append(step(model, x))
        with torch.no_grad():
            found.append(model.eval()(x))
        try:
            found.append(str(load(model)))
        except RuntimeError as error:
            # It begins with the name of the class.
            found.append(str(error).partition(":")[2])
        with torch.no_grad():
            found.append(model.eval()(x))
        return [*found, step(model.train(), x), model.eval()(x)]

    for name in ("adding", "node"):
        compare(scenario, name, verify=False)


@pytest.mark.parametrize("name", ["nodes", "concatenating", "adding"])
def test_checkpoints_both_ways(name):
    """One's file in the other, and an optimizer's with it."""
    stock, swapped = pair(name, verify=False)
    assert list(stock.state_dict()) == list(swapped.state_dict())
    assert stock.state_dict()._metadata == swapped.state_dict()._metadata
    for source, target in ((stock, swapped), (swapped, stock)):
        optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (source, target)]
        step(source, image())
        optimizers[0].step()
        file = io.BytesIO()
        torch.save({"model": source.state_dict(), "optimizer": optimizers[0].state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        target.load_state_dict(loaded["model"])
        optimizers[1].load_state_dict(loaded["optimizer"])
        found = []
        for model, optimizer in zip((source, target), optimizers, strict=True):

            def scenario(model, x, optimizer=optimizer):
                optimizer.zero_grad()
                y = step(model, x)
                optimizer.step()
                return y, model.eval()(x)

            found.append(see(model.train(), scenario, image()))
        assert_alike(found)
