"""IDA modules and dense-prediction networks: parity with networks written op by op, keys, bad input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import dense, merges
from dla_fast import models
from dla_fast.bench.plain import PlainDLAUp, PlainIDAUp, PlainSeg, transposed
from dla_fast.nn import BatchNormAct2d, DLAUp, FCNMerge, FPNMerge, IDAUp, UNetMerge, Upsample

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def randomise(module):
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        if "running_var" in name or name.endswith("1.weight"):
            nn.init.uniform_(t, 0.5, 1.5)
        elif t.is_floating_point():
            nn.init.normal_(t, 0, 1 if t.dim() < 2 else (t[0].numel() ** -0.5))


def outcome(module, layers):
    """Outputs, gradients of inputs and parameters, buffers."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in layers]
    y = module(leaves)
    outputs = [y] if isinstance(y, torch.Tensor) else [y[0], *y[1]]
    wanted = [*leaves, *module.parameters()]
    grads = torch.autograd.grad(sum(t.square().mean() for t in outputs), wanted)
    return [*outputs, *grads, *module.buffers()]


def assert_same(mine, plain, layers, tolerance):
    for a, b in zip(outcome(mine, layers), outcome(plain, layers), strict=True):
        scale = b.abs().max().clamp_min(1e-30) if b.is_floating_point() else 1
        assert ((a - b).abs().max() / scale).item() <= tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("merge", "kernel"), [("concat", 3), ("concat", 1), ("add", 3), ("add", 1)])
def test_idaup_is_the_ladder_op_by_op(layout, training, merge, kernel):
    channels, factors, sides = (6, 6, 4, 5), (1, 2, 4, 1), (12, 6, 3, 12)
    plain = PlainIDAUp(6, channels, factors, kernel, merge).double().train(training)
    randomise(plain)
    mine = IDAUp(6, channels, factors, node_kernel=kernel, merge=merge).double().train(training)
    mine.load_state_dict(plain.state_dict(), strict=True)
    assert list(mine.state_dict()) == list(plain.state_dict())
    layers = [torch.randn(2, c, s, s + 4 * s // 12, dtype=torch.float64) for c, s in zip(channels, sides, strict=True)]
    layers = [x.to(memory_format=LAYOUTS[layout]) for x in layers]
    kept = list(layers)
    assert_same(mine, plain, layers, 1e-10)
    assert all(a is b for a, b in zip(layers, kept, strict=True)), "the caller's list stays as it is"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_idaup_brings_every_level_up_by_any_factor(layout):
    """Odd factors, and a first level that is upsampled too."""
    factors, sides = (2, 3), (5, 3)
    plain = PlainIDAUp(4, (4, 7), factors).double()
    randomise(plain)
    mine = IDAUp(4, (4, 7), factors).double()
    mine.load_state_dict(plain.state_dict(), strict=True)
    layers = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in zip((4, 7), sides, strict=True)]
    assert mine.up_0.factor == 2
    assert mine.up_1.factor == 3
    assert layers[0].shape[2] * 2 == layers[1].shape[2] * 3 + 1
    assert_same(mine, plain, [x.to(memory_format=LAYOUTS[layout]) for x in layers], 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("merge", ["concat", "add"])
def test_dlaup_is_the_ladders_op_by_op(layout, training, merge):
    channels = (4, 6, 8, 5)
    plain = PlainDLAUp(channels, merge).double().train(training)
    randomise(plain)
    mine = DLAUp(channels, merge=merge).double().train(training)
    mine.load_state_dict(plain.state_dict(), strict=True)
    layers = [torch.randn(2, c, 16 >> i, 24 >> i, dtype=torch.float64) for i, c in enumerate(channels)]
    assert_same(mine, plain, [x.to(memory_format=LAYOUTS[layout]) for x in layers], 1e-10)


def test_dlaup_gives_every_scale():
    channels = (4, 6, 8)
    ladders = DLAUp(channels, scales=(4, 8, 16), all_scales=True).eval()
    layers = [torch.randn(1, c, 16 >> i, 16 >> i) for i, c in enumerate(channels)]
    maps = ladders(layers)
    assert [tuple(m.shape) for m in maps] == [(1, 4, 16, 16), (1, 6, 8, 8), (1, 8, 4, 4)]
    assert maps[-1] is layers[-1]
    finest = DLAUp(channels).eval()
    finest.load_state_dict(ladders.state_dict())
    assert torch.equal(finest(layers), maps[0])


def test_float32_stays_as_near_to_float64_as_eager():
    channels = (16, 24, 32)
    plain = PlainDLAUp(channels).eval()
    randomise(plain)
    mine = DLAUp(channels).eval()
    mine.load_state_dict(plain.state_dict())
    layers = [torch.randn(2, c, 32 >> i, 32 >> i) for i, c in enumerate(channels)]
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()([x.double() for x in layers])
        errors = [(m(layers).double() - exact).square().mean().sqrt().item() for m in (mine, plain)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_upsample_takes_the_place_of_a_transposed_convolution(factor):
    up, other = Upsample(3, factor), transposed(3, factor)
    up.load_state_dict(other.state_dict(), strict=True)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(up(x), other(x))
    skip = torch.randn_like(other(x))
    torch.testing.assert_close(up(x, skip), other(x) + skip)


def test_upsample_starts_as_bilinear_interpolation():
    for factor in (2, 4, 8):
        x = torch.randn(1, 2, 6, 6)
        y, expected = Upsample(2, factor)(x), F.interpolate(x, scale_factor=factor, mode="bilinear")
        inner = slice(factor, -factor)
        torch.testing.assert_close(y[..., inner, inner], expected[..., inner, inner])


def test_batch_norm_act_is_norm_residual_and_activation():
    norm, plain = BatchNormAct2d(4, act="silu"), nn.BatchNorm2d(4)
    randomise(plain)
    norm.load_state_dict(plain.state_dict(), strict=True)
    x, residual = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(norm(x, residual), F.silu(plain(x) + residual))
    assert all(torch.equal(a, b) or torch.allclose(a, b) for a, b in zip(norm.buffers(), plain.buffers(), strict=True))
    kept = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))
    assert kept[0] is norm, "a converted norm would have lost its activation"


@pytest.mark.parametrize("name", models.list_models(dense=True))
def test_networks_are_those_op_by_op(name):
    base = models.create_model(name.removesuffix("up"), features_only=True, device="meta")
    for ratio in (2, 4, 8, 16):
        mine = models.create_model(name, num_classes=19, down_ratio=ratio, device="meta")
        plain = PlainSeg(base, base.feature_info.channels(), 19, ratio)
        assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
        assert not mine.up.weight.requires_grad


def test_dla34up_follows_the_network_op_by_op_in_training(timm):
    mine = models.create_model("dla34up", num_classes=3, down_ratio=4).double()
    plain = PlainSeg(timm.create_model("dla34", num_classes=0), mine.base.feature_info.channels(), 3, 4).double()
    plain.load_state_dict(mine.state_dict(), strict=True)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 64, 64))
    losses = {"mine": [], "plain": []}
    for key, model in (("mine", mine), ("plain", plain)):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=2e-5)
        for _ in range(8):
            optimizer.zero_grad()
            y, scores = model(images)
            assert y.shape == (2, 3, 64, 64)
            assert scores.shape == (2, 3, 16, 16)
            loss = F.nll_loss(y, labels)
            loss.backward()
            optimizer.step()
            losses[key].append(loss.item())
    # Far more than the bound below, so that wrong gradients could not pass.
    assert losses["mine"][-1] < losses["mine"][0] * (1 - 1e-5)
    assert losses["mine"] == pytest.approx(losses["plain"], rel=1e-8)
    for (name, a), (_, b) in zip(mine.state_dict().items(), plain.state_dict().items(), strict=True):
        # A norm's vectors start at zero and one, so their scale is one.
        scale = b.double().abs().max().clamp_min(1.0 if b.dim() < 2 else 0.0)
        assert ((a - b).abs().max() / scale).item() <= 1e-8, name


def test_a_boundary_network_gives_two_classes_at_stride_2():
    model = models.create_model("dla34up", num_classes=2, down_ratio=2).eval()
    with torch.no_grad():
        y, scores = model(torch.randn(1, 3, 64, 32))
    assert y.shape == (1, 2, 64, 32)
    assert scores.shape == (1, 2, 32, 16)
    torch.testing.assert_close(y.exp().sum(1), torch.ones(1, 64, 32))


def test_the_number_of_classes_has_one_name_and_an_older_one():
    base = models.create_model("dla34", features_only=True, device="meta")
    for model in (
        models.create_model("dla34up", num_classes=7, device="meta"),
        models.create_model("dla34up", classes=7, device="meta"),
        models.DLASeg(base, 7, 4, device="meta"),
        models.DLASeg(base, classes=7, device="meta"),
    ):
        assert model.num_classes == model.classes == model.fc[0].out_channels == 7
    assert models.create_model("dla34up", device="meta").num_classes == 19


def test_a_network_pickled_under_the_older_name():
    model = models.DLASeg(models.create_model("dla46_c", features_only=True), 3)
    model.__dict__["classes"] = model.__dict__.pop("num_classes")
    old = pickle.loads(pickle.dumps(model))
    assert old.num_classes == old.classes == 3
    assert pickle.loads(pickle.dumps(old)).classes == 3


def test_checkpoints_of_the_original_code():
    mine = models.create_model("dla34up", num_classes=5, down_ratio=4)
    original = models.to_original(mine.state_dict(), "dla34up")
    extra = set(original) - set(mine.state_dict())
    assert extra
    assert all(key.startswith("base.level") and ".project." in key for key in extra)
    back = models.from_original(original, mine)
    assert list(back) == list(mine.state_dict())
    detector = {f"module.{k}": v for k, v in original.items()} | {"module.base.fc.weight": torch.randn(1000, 512, 1, 1)}
    other = models.create_model("dla34up", num_classes=5, down_ratio=4)
    models.load_state_dict(other, {"state_dict": detector})
    assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"fc\.0\.bias"):
        models.load_state_dict(other, {k: v for k, v in detector.items() if k != "module.fc.0.bias"})


@pytest.mark.parametrize("merge", [FCNMerge, FPNMerge, UNetMerge])
def test_shallow_merges_give_the_finest_size(merge):
    channels = (8, 12, 16)
    layers = [torch.randn(2, c, 16 >> i, 24 >> i, requires_grad=True) for i, c in enumerate(channels)]
    y = merge(channels, 5)(layers)
    assert y.shape == (2, 5, 16, 24)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.sum().square(), layers))
    with pytest.raises(ValueError, match="layers: expected 3 layers, got 2"):
        merge(channels, 5)(layers[:2])


def test_bad_input_names_the_layer():
    ladder = IDAUp(4, (4, 6), (1, 2))
    good = [torch.randn(1, 4, 8, 8), torch.randn(1, 6, 4, 4)]
    ladder(good)
    with pytest.raises(ValueError, match="layers: expected 2 layers, got 1"):
        ladder(good[:1])
    with pytest.raises(ValueError, match="layers: expected 2 layers, got one tensor"):
        ladder(torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"layers\[1\]: expected 6 channels, got shape \(1, 4, 8, 8\)"):
        ladder([good[0], good[0]])
    with pytest.raises(ValueError, match=r"layers\[1\]: expected \(N, H, W\) = \(1, 8, 8\) after upsampling by 2"):
        ladder([good[0], torch.randn(1, 6, 5, 4)])
    with pytest.raises(TypeError, match=r"layers\[1\]: expected a floating dtype"):
        ladder([good[0], good[1].long()])
    odd = IDAUp(4, (4, 6), (1, 3))
    with pytest.raises(ValueError, match=r"after upsampling by 3, as layers\[0\] has, got \(1, 10, 10\)"):
        odd([torch.randn(1, 4, 9, 9), torch.randn(1, 6, 3, 3)])
    odd([torch.randn(1, 4, 10, 10), torch.randn(1, 6, 3, 3)])
    ladders = DLAUp((4, 6, 8))
    with pytest.raises(ValueError, match=r"layers\[2\]: expected batch 1 and a size that upsampling by 2 brings to"):
        ladders([torch.randn(1, 4, 16, 16), torch.randn(1, 6, 8, 8), torch.randn(1, 8, 3, 4)])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Upsample(3, 1), ValueError, "factor: expected an integer >= 2, got 1"),
        (lambda: Upsample(3, 2.0), TypeError, "factor: expected an integer >= 2, got 2.0"),
        (lambda: IDAUp(4, (4, 4), (1, 1.5)), TypeError, r"up_factors\[1\]: expected an integer"),
        (lambda: IDAUp(4, (4,), (1,)), ValueError, "channels: expected two levels"),
        (lambda: IDAUp(4, (4, 4), (1, 2), node_kernel=5), ValueError, "node_kernel: expected 1 or 3, got 5"),
        (lambda: IDAUp(4, (4, 4), (1, 2), merge="mul"), ValueError, "merge: expected 'concat' or 'add'"),
        (lambda: DLAUp((4, 4), scales=(4, 6)), ValueError, r"scales\[1\]: expected a multiple of 4"),
        (
            lambda: models.create_model("dla34up", num_classes=2, down_ratio=3),
            ValueError,
            "down_ratio: expected 2, 4, 8",
        ),
        (lambda: models.create_model("dla34up", classes=True), ValueError, "num_classes: expected .* got True"),
        (lambda: models.create_model("dla34up", num_classes=2, classes=2), TypeError, "two names of one option, got 2"),
        (lambda: models.create_model("dla34up", num_classes=0), ValueError, "num_classes: expected an integer >= 1"),
    ],
)
def test_bad_options(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_size_the_network_cannot_take_names_the_nearest():
    model = models.create_model("dla34up", num_classes=2, down_ratio=4)
    with pytest.raises(ValueError, match=r"stride 32, got 100x64; the nearest valid size is 96x64"):
        model(torch.randn(1, 3, 100, 64))


def test_the_dense_benchmark_trains_and_compares(capsys):
    small = ["--size", "64", "--batch", "2", "--steps", "6", "--timed", "1", "--classes", "3"]
    assert dense.main(small) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("loss over 6 steps: ")
    saved = lines[2].split()
    assert saved[:3] == ["saved", "for", "backward"]
    assert float(saved[-1].rstrip("x")) < 1


def test_the_benchmark_of_merges_shows_them_side_by_side(capsys):
    assert merges.main(["--size", "64", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["IDA (DLAUp)", "U-Net", "FPN", "FCN"]
    assert all(line.endswith("1x64x16x16") for line in lines[2:])
    assert all(float(line.split()[-2]) > 0 for line in lines[2:])
