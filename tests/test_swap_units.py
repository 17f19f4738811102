"""What swap_ takes a foreign module for, found by running it; and units that are modules of their own."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_swap_blocks import assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dla_fast
from dla_fast.bench import neck_units
from dla_fast.nn import stock
from dla_fast.swap import units


class Itself(nn.Module):
    def forward(self, x):
        return x


class Clamped(nn.Module):
    def forward(self, x):
        return x if x.abs().max() < 100 else x.clamp(-100, 100)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class ClampedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class EmptyConv(nn.Conv2d):
    def forward(self, x):
        return x.new_empty(0) if x.numel() == 0 else super().forward(x)


class EmptyTransposed(nn.ConvTranspose2d):
    def forward(self, x):
        return x.new_empty(0) if x.numel() == 0 else super().forward(x)


class HalvedTransposed(nn.ConvTranspose2d):
    def forward(self, x):
        return super().forward(x) / 2


class Frozen(nn.Module):
    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class NoMean(Frozen):
    def forward(self, x):
        return x * (self.weight * (self.running_var + self.eps).rsqrt())[:, None, None] + self.bias[:, None, None]


class Noisy(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + (0.1 if self.training else 0.0)


class Named(nn.Module):
    """Convolution, norm and activation under any names, in any order of registration."""

    def __init__(self, names=("conv", "bn", "relu"), norm=nn.BatchNorm2d, conv=nn.Conv2d, act=nn.ReLU):
        super().__init__()
        parts = {"head": conv(4, 6, 3, padding=1), "norm": norm(6), "act": act()}
        for name, part in reversed(list(zip(names, parts.values(), strict=True))):
            setattr(self, name, part)
        self.names = names

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class ByFunction(Named):
    """The activation is no child."""

    def __init__(self):
        super().__init__(act=nn.Identity)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Scaled(Named):
    def forward(self, x):
        return 2 * super().forward(x)


class Wide(Named):
    """As it is named, up to a size."""

    def forward(self, x):
        return super().forward(x if x.shape[-1] < 8 else x.flip(-1))


class Copying(nn.Module):
    def forward(self, x):
        return x.clone()


KINDS = {
    "identity that copies": (Copying, ""),
    "own identity": (Itself, "identity"),
    "identity that clamps": (Clamped, ""),
    "identity that counts": (Counting, ""),
    "convolution that treats empty inputs": (lambda: EmptyConv(4, 6, 3), "conv"),
    "convolution that clamps": (lambda: ClampedConv(4, 6, 3), ""),
    "transposed convolution that treats empty inputs": (lambda: EmptyTransposed(4, 4, 4, 2, 1, groups=4), "transposed"),
    "transposed convolution that halves": (lambda: HalvedTransposed(4, 4, 4, 2, 1, groups=4), ""),
    "frozen norm": (lambda: Frozen(4), "frozen"),
    "frozen norm without a mean": (lambda: NoMean(4), ""),
    "norm that adds in training": (lambda: Noisy(4), ""),
    "unit": (Named, "unit"),
    "unit, a function activates": (ByFunction, "unit_relu"),
    "unit that scales": (Scaled, ""),
    "unit that looks at the size": (Wide, ""),
    "pooling": (lambda: nn.MaxPool2d(1), ""),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_a_foreign_module_is(case):
    make, kind = KINDS[case]
    module = make()
    before, rng = dict(module.__dict__), torch.get_rng_state()
    assert stock.kind(module) == kind
    assert module.__dict__ == before
    assert torch.equal(torch.get_rng_state(), rng)


def test_options_of_an_instance_count():
    class Flagged(Itself):
        def __init__(self, off):
            super().__init__()
            self.off = off

        def forward(self, x):
            return x if self.off else x * 2

    assert [stock.kind(Flagged(off)) for off in (True, False, True)] == ["identity", "", "identity"]
    module = Flagged(True)
    module.off = False
    assert stock.kind(module) == ""


def test_another_forward_of_the_class_is_another_class():
    class Patched(Itself):
        pass

    module = Patched()
    assert stock.kind(module) == "identity"
    Patched.forward = lambda self, x: x * 2
    assert stock.kind(module) == ""


UNITS = {
    "{conv, bn, relu}": (Named, nn.Conv2d, "relu"),
    "{conv, norm, activate}": (lambda: Named(("conv", "norm", "activate"), act=nn.SiLU), nn.Conv2d, "silu"),
    "own convolution, frozen norm": (lambda: Named(norm=Frozen, conv=EmptyConv), EmptyConv, "relu"),
    "a function activates": (ByFunction, nn.Conv2d, "relu"),
    "{actf, conv}": (lambda: neck_units.PlainNode(4, 6), nn.Conv2d, "relu"),
}


@pytest.mark.parametrize("case", UNITS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_unit_by_itself(case, layout):
    make, conv, act = UNITS[case]
    module = make().double()
    found = units.unit_of(module)
    assert (type(found.conv), found.act, found.whole) == (conv, act, True)
    twin = copy.deepcopy(module)
    assert [(e.name, e.kind, e.reason) for e in dla_fast.swap_(twin).swapped] == [("", "conv", "")]
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64).to(memory_format=layout)
    assert_same(module, twin, x)
    assert not dla_fast.swap_(twin).swapped
    assert dla_fast.unswap_(twin) == 1
    assert type(twin) is type(module)


def test_only_the_tail_behind_a_convolution_of_ones_own():
    twin = Named(conv=ClampedConv).eval()
    report = dla_fast.swap_(twin)
    assert [(e.name, e.reason) for e in report.swapped] == [("", "the tail alone, behind ClampedConv")]
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Record(), torch.no_grad():
        twin(torch.randn(1, 4, 5, 5))
    assert "dla_fast_cpu::tail" in seen
    assert "aten::native_batch_norm" not in seen


def test_what_only_looks_like_a_unit_is_not_listed():
    report = dla_fast.swap_(nn.ModuleList([Scaled(), Wide()]))
    assert not report.swapped
    assert not report.skipped


def test_a_tail_in_a_sequential():
    module = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4)).double()
    twin = copy.deepcopy(module)
    assert [e.kind for e in dla_fast.swap_(twin).swapped] == ["conv"]
    assert_same(module, twin, torch.randn(2, 4, 8, 6, dtype=torch.float64))


def test_a_tail_without_any_tensor():
    module = nn.Sequential(nn.BatchNorm2d(4, affine=False, track_running_stats=False), nn.ReLU())
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin).swapped
    x = torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(twin(x), module(x))


CHANGES = {
    "hook on the convolution": lambda m: m.conv.register_forward_hook(lambda *a: a[2] * 2),
    "hook on the norm": lambda m: m.bn.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "another norm": lambda m: setattr(m, "bn", nn.InstanceNorm2d(6)),
    "another activation": lambda m: setattr(m, "relu", nn.GELU()),
    "another attribute": lambda m: setattr(m, "names", ("conv", "relu", "bn")),
    "a further child": lambda m: setattr(m, "drop", nn.Softplus()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_afterwards_runs_the_original_forward(change):
    module = Named().eval()
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin).swapped
    for m in (module, twin):
        CHANGES[change](m)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("case", ["{conv, bn, relu}", "own convolution, frozen norm"])
def test_compile_fullgraph(case):
    module = UNITS[case][0]().eval()
    twin = copy.deepcopy(module)
    dla_fast.swap_(twin)
    graphs = []

    def look(graph, inputs):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend=look)(x), module(x))
    assert "dla_fast_cpu" in graphs[0]


def test_found_again_where_a_pickle_is_opened(tmp_path):
    """Nothing of what was found travels."""
    module = nn.Sequential(Named(norm=Frozen, conv=EmptyConv)).eval()
    dla_fast.swap_(module)
    x = torch.randn(1, 4, 6, 6)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((module, x, module(x).detach())))
    script = (
        "import pickle, sys, torch, test_swap_units\n"
        "from dla_fast.nn import stock\n"
        "module, x, want = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(module(x), want)\n"
        "assert stock.kind(module[0]) == 'unit'\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pickle"], check=True, cwd=__file__.rpartition("/")[0]
    )  # noqa: S603


def test_frozen_for_inference_units_of_foreign_parts():
    module = Named(norm=Frozen, conv=EmptyConv).eval()
    twin = copy.deepcopy(module)
    dla_fast.swap_(twin)
    assert dla_fast.freeze_(twin).units == 1
    x = torch.randn(2, 4, 6, 6)
    for change in (lambda m: None, lambda m: m.bn.running_mean.add_(1), lambda m: m.bn.bias.mul_(0).add_(2)):
        with torch.inference_mode():
            for m in (module, twin):
                change(m)
            for _ in range(3):
                torch.testing.assert_close(twin(x), module(x))


@pytest.mark.parametrize(
    ("norm", "act", "reason"),
    [
        (lambda c: nn.GroupNorm(2, c), nn.ReLU, "Named is called as it is, no kernel knows GroupNorm"),
        (nn.BatchNorm2d, nn.GELU, "Named is called as it is, no kernel knows GELU"),
        (nn.BatchNorm2d, nn.ReLU, ""),
    ],
)
def test_a_ladder_says_why_a_unit_is_not_fused(norm, act, reason):
    class Ladder(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj_1, self.node_1 = Named(norm=norm, act=act), Named(norm=norm, act=act)
            self.node_1.conv = nn.Conv2d(6, 6, 3, padding=1)
            self.up_1 = nn.ConvTranspose2d(6, 6, 4, 2, 1, groups=6, bias=False)

        def forward(self, layers):
            layers[1] = self.node_1(layers[0] + self.up_1(self.proj_1(layers[1])))
            return layers

    (entry,) = dla_fast.swap_(Ladder(), units="ladders").swapped
    assert entry.reason == (f"0 of 2 units fused whole; proj_1, node_1: {reason}" if reason else "")


class Idle(nn.Module):
    """Does nothing, as long as it is told so."""

    def __init__(self):
        super().__init__()
        self.rate = 0.0

    def forward(self, x):
        return x * (1 - self.rate) if self.rate else x


class Dropping(Named):
    def __init__(self):
        super().__init__()
        self.drop = Idle()

    def forward(self, x):
        return self.drop(super().forward(x))


LATER = {
    "an idle child does something": lambda m: setattr(m.drop, "rate", 0.5),
    "an idle child is watched": lambda m: m.drop.register_forward_hook(lambda *a: a[2] * 2),
}


@pytest.mark.parametrize("change", LATER)
def test_an_idle_child_that_is_one_no_more(change):
    module = Dropping().eval()
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin).swapped
    for m in (module, twin):
        LATER[change](m)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(twin(x), module(x))


class Single(nn.BatchNorm2d):
    """Of a single image it takes the running statistics."""

    def forward(self, x):
        training, self.training = self.training, self.training and x.shape[0] > 1
        try:
            return super().forward(x)
        finally:
            self.training = training


class Wider(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.clamp(-1, 1) if x.shape[-1] > 32 else x)


class Precise(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.float() if torch.is_autocast_enabled("cpu") else x)


class Checked(nn.Conv2d):
    """Asks what kind of norm it holds, not other processes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        assert not isinstance(self.norm, nn.SyncBatchNorm)
        return self.norm(super().forward(x))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Single(4), ""),
        (lambda: Wider(4, 6, 3, padding=1), ""),
        (lambda: Precise(4), ""),
        (lambda: Checked(4, 6, 3, padding=1), "conv_norm"),
        (lambda: Named(conv=lambda *a, **k: nn.Conv2d(4, 6, 3, padding=1)), "unit"),
    ],
)
def test_what_is_tried_before_a_class_is_known(make, kind):
    assert stock.kind(make()) == kind


def test_a_large_head_is_not_run_at_length():
    """A backbone in front of a norm is no convolution, and too large to be proven one."""
    head = nn.Sequential(*(nn.Conv2d(256, 256, 3, padding=1) for _ in range(4)))
    module = Named(conv=lambda *a, **k: nn.Sequential(nn.Conv2d(4, 256, 1), head, nn.Conv2d(256, 6, 1)))
    assert stock.kind(module) == ""


@pytest.mark.parametrize("conv", [nn.Conv2d, EmptyConv])
def test_a_wide_unit_is_proven_narrow(conv):
    class Wide(Named):
        pass

    module = Wide(conv=lambda *a, **k: conv(8192, 6, 3, padding=1))
    assert stock.kind(module) == "unit"
    assert module.conv.in_channels == module.conv.weight.shape[1] == 8192
    assert units.unit_of(module).whole


def test_a_class_that_changes_with_every_call_is_not_run_in_each():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.runs = 0, []

        def forward(self, x):
            self.steps += 1
            return x

    module = Steps()
    del module.runs
    before = len(stock._known)
    for module.steps in range(200):
        assert stock.kind(module) == ""
    assert len(stock._known) - before <= stock._MOST_OF_A_CLASS


def test_what_an_exception_leaves():
    """An attribute that cannot be looked at, and buffers that are no vectors."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps = 1e-5
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.tensor(1.0))

        @property
        def in_channels(self):
            raise RuntimeError("not yet")

        def forward(self, x):
            return x * self.weight

    model = nn.Sequential(nn.Conv2d(3, 3, 1), Odd(), nn.ReLU())
    assert not dla_fast.swap_(model).swapped
