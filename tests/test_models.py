"""The ten networks against timm's: parameters, keys, outputs, gradients, options."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from model_helpers import NAMES, PARAMETERS, network, randomise, relative, tiny, twins
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dla_fast
from dla_fast.models import DLA, create_model, list_models, load_state_dict
from dla_fast.models.registry import _DENSE_OPTIONS, _OPTIONS
from dla_fast.nn import BasicBlock


class CountPools(TorchDispatchMode):
    """Counts the max-pools that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "max_pool2d" in func.name()
        return func(*args, **(kwargs or {}))


def test_names():
    assert list_models(dense=False) == NAMES
    assert dla_fast.models.create_model is create_model


@pytest.mark.parametrize("name", NAMES)
def test_equals_timm(timm, name):
    """Parameters and keys exactly; outputs and statistics to rounding, in evaluation and in training mode."""
    ours, theirs = twins(timm, name)
    count, _ = PARAMETERS[name]
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == count
    described = [[(k, v.shape, v.dtype) for k, v in m.state_dict().items()] for m in (ours, theirs)]
    assert described[0] == described[1]
    # An optimizer's state is matched to parameters by their order.
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in theirs.named_parameters()]
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        want = theirs.eval()(x)
        assert want.std() > 0
        assert relative(ours.eval()(x), want) <= 1e-5
        assert relative(ours.train()(x), theirs.train()(x)) <= 1e-3
    for (key, got), want in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if "running" in key:
            assert relative(got, want) <= 1e-3, key
        elif "tracked" in key:
            assert got == want == 1, key


@pytest.mark.parametrize("name", ["dla34", "dla46x_c", "dla102"])
def test_gradients_equal_timm(timm, name):
    ours, theirs = twins(timm, name, torch.float64)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for m in (ours, theirs):
        nn.functional.cross_entropy(m(x) / m(x).detach().std(), torch.tensor([1, 7])).backward()
    for (key, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert want.grad.abs().max() > 0, key
        assert relative(got.grad, want.grad) < 1e-7, key


@pytest.mark.parametrize("name, theirs", [("dla34", 6), ("dla169", 11)])
def test_each_level_pools_once(timm, name, theirs):
    x = torch.randn(1, 3, 32, 32)
    for model, count in ((network(name).eval(), 4), (timm.create_model(name).eval(), theirs)):
        with torch.no_grad(), CountPools() as pools:
            model(x)
        assert pools.count == count


@pytest.mark.parametrize("name", ["dla34", "dla60x_c"])
def test_features_only(timm, name):
    reference = randomise(timm.create_model(name)).eval()
    model = network(name, features_only=True)
    load_state_dict(model, reference.state_dict(), strict=False)
    assert not any(key.startswith("fc") for key in model.state_dict())
    assert model.num_classes == 0
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model.eval()(x)
        wanted = reference.forward_intermediates(x, intermediates_only=True)
    info = model.feature_info
    assert info.reduction() == [1, 2, 4, 8, 16, 32]
    assert info.module_name() == [f"level{i}" for i in range(6)]
    assert info.channels() == [f["num_chs"] for f in reference.feature_info]
    assert isinstance(features, list)
    assert len(features) == 6
    for got, want, feature in zip(features, wanted, info, strict=True):
        assert got.shape == (1, feature.num_chs, 64 // feature.reduction, 96 // feature.reduction)
        assert relative(got, want) <= 1e-5


def dilate(level: nn.Module, first: int, dilation: int) -> None:
    """Rewrite one of timm's levels from stride to dilation, convolution by convolution."""
    convs = [m for m in level.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    for i, conv in enumerate(convs):
        d = first if i == 0 else dilation
        conv.stride, conv.dilation, conv.padding = (1, 1), (d, d), (d, d)
    for m in level.modules():
        if isinstance(m, nn.MaxPool2d):
            m.kernel_size = m.stride = 1


@pytest.mark.parametrize("name", ["dla34", "dla60x_c"])
@pytest.mark.parametrize(
    "output_stride, rewritten", [(16, [("level5", 1, 2)]), (8, [("level4", 1, 2), ("level5", 2, 4)])]
)
def test_output_stride(timm, name, output_stride, rewritten):
    theirs = randomise(timm.create_model(name)).eval()
    ours = load_state_dict(network(name, output_stride=output_stride), theirs.state_dict()).eval()
    for level, first, dilation in rewritten:
        dilate(getattr(theirs, level), first, dilation)
    reduction = [min(s, output_stride) for s in (1, 2, 4, 8, 16, 32)]
    assert ours.feature_info.reduction() == reduction
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) <= 1e-5
        features = ours.forward_features(x)
        assert features.shape == (1, ours.num_features, 64 // output_stride, 80 // output_stride)
        levels = network(name, output_stride=output_stride, features_only=True).eval()(x)
    assert [f.shape[2] for f in levels] == [64 // r for r in reduction]


def test_channels_and_classes(timm):
    ours, theirs = twins(timm, "dla46_c", in_chans=5, num_classes=7)
    x = torch.randn(2, 5, 32, 32)
    assert ours.eval()(x).shape == (2, 7)
    assert relative(ours(x), theirs.eval()(x)) <= 1e-5
    ours, theirs = twins(timm, "dla46_c", num_classes=0)
    x = torch.randn(2, 3, 32, 64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.eval()(x).shape == (2, 256)
    assert relative(ours(x), theirs.eval()(x)) <= 1e-5
    assert torch.allclose(ours(x), ours.forward_features(x).mean((2, 3)), rtol=1e-5)


def test_drop_rate_acts_in_training_alone():
    plain, dropping = tiny(num_classes=0), tiny(num_classes=0, drop_rate=0.5)
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(8, 3, 32, 32)
    want, got = plain(x), dropping(x)
    kept = got != 0
    assert torch.allclose(got[kept], 2 * want[kept])
    assert 0.3 < kept.sum() / (want != 0).sum() < 0.7
    assert torch.equal(dropping.eval()(x), plain.eval()(x))


def test_initial_weights():
    model = create_model("dla34")
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 10000:
            want = math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels))
            assert m.weight.std().item() == pytest.approx(want, rel=0.05)
            assert abs(m.weight.mean().item()) < 0.05 * want
        elif isinstance(m, nn.BatchNorm2d):
            assert m.weight.eq(1).all()
            assert m.bias.eq(0).all()


def test_device_and_dtype():
    assert {t.device.type for t in create_model("dla169", device="meta").state_dict().values()} == {"meta"}
    model = tiny(dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_sizes_are_those_that_timm_takes(timm):
    theirs, ours = timm.create_model("dla46_c").eval(), network("dla46_c").eval()
    for size in (31, 32, 33, 48, 62, 63, 64, 65):
        x = torch.zeros(1, 3, size, 64)
        with torch.no_grad():
            if size in (31, 32, 63, 64):
                assert ours(x).shape == theirs(x).shape
                continue
            with pytest.raises(RuntimeError):
                theirs(x)
            near = {33: 32, 48: 64, 62: 64, 65: 64}[size]
            with pytest.raises(ValueError, match=f"stride 32, or one less, got {size}x64.*valid size is {near}x64"):
                ours(x)
    model = tiny(output_stride=8, features_only=True).eval()
    assert [f.shape[3] for f in model(torch.randn(1, 3, 40, 23))] == [23, 12, 6, 3, 3, 3]
    with pytest.raises(ValueError, match="stride 8.*got 41x24; the nearest valid size is 40x24"):
        model(torch.randn(1, 3, 41, 24))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_classes": -1}, "num_classes: expected an integer >= 0, got -1"),
        ({"in_chans": 0}, "in_chans: expected an integer >= 1, got 0"),
        ({"in_chans": 2.5}, "in_chans: expected an integer >= 1, got 2.5"),
        ({"output_stride": 4}, "output_stride: expected 8, 16 or 32, got 4"),
        ({"output_stride": 64}, "output_stride: expected 8, 16 or 32, got 64"),
        ({"drop_rate": 1.5}, r"drop_rate: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_options_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_model("dla34", **kwargs)


@pytest.mark.parametrize("dense", [False, True])
def test_an_option_that_does_not_exist_names_those_that_do(dense):
    name, known = (list_models(dense=True)[0], _DENSE_OPTIONS) if dense else ("dla34", _OPTIONS)
    values = {"device": "meta", "output_stride": 32, "down_ratio": 2, "drop_rate": 0.0, "dtype": torch.float32}
    for option in known:
        create_model(name, **{"device": "meta", option: values.get(option, 1)})
    with pytest.raises(TypeError, match=f"num_class: {name} has no such option; did you mean 'num_classes'"):
        create_model(name, num_class=3)
    with pytest.raises(TypeError, match=f"pretrained: {name} has no such option; expected one of {', '.join(known)}"):
        create_model(name, pretrained=True)


def test_other_bad_input():
    with pytest.raises(ValueError, match="unknown model 'DLA34'; did you mean 'dla34'"):
        create_model("DLA34")
    with pytest.raises(ValueError, match="unknown model 'dla_34'; did you mean 'dla34'"):
        create_model("dla_34")
    with pytest.raises(ValueError, match="unknown model 'resnet50'; expected one of dla34"):
        create_model("resnet50")
    with pytest.raises(ValueError, match="channels: expected one entry for each of the levels"):
        DLA((1, 1, 1, 1, 1, 1), (4, 4, 4), BasicBlock)
    model = tiny()
    with pytest.raises(ValueError, match="x: expected 4 dimensions"):
        model(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match=r"x: expected 3 channels \(in_chans\), got shape \(1, 4, 32, 32\)"):
        model(torch.randn(1, 4, 32, 32))
    with pytest.raises(TypeError, match="x: expected a floating dtype.*torch.uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_copies_compiles_and_writes_nothing_to_images():
    model = randomise(tiny()).eval()
    x = torch.randn(2, 3, 32, 32)
    kept, want = x.clone(), model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), want)
        assert twin.feature_info.channels() == model.feature_info.channels()
    torch._dynamo.reset()
    compiled = copy.deepcopy(model).train()
    y, z = model.train()(x), torch.compile(compiled, fullgraph=True, backend="eager")(x)
    assert relative(z, y) <= 1e-5
    for m, out in ((model, y), (compiled, z)):
        out.square().mean().backward()
        assert m.fc.weight.grad.abs().max() > 0
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        assert relative(b.grad, a.grad) <= 1e-3
    for a, b in zip(model.buffers(), compiled.buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(x, kept)
    assert x._version == 0
