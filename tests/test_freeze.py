"""freeze_ and unfreeze_: the unfrozen model's results, in every mode, and never those of what has changed since."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from model_helpers import randomise, relative, tiny
from swap_helpers import Pair, inputs
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import dla_fast
from dla_fast import backend, use_backend
from dla_fast.models import DLASeg
from dla_fast.nn import AggregationNode, BasicBlock, IDAUp
from dla_fast.nn import frozen as frozen_module
from dla_fast.nn.frozen import KEY
from dla_fast.ops import packed

needs_kernels = pytest.mark.skipif(
    backend.can_run("cpu", "conv_norm_act", "cpu", torch.float32) is not None, reason="the C++ extension is not built"
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Ladder(nn.Module):
    """A block and a ladder: a residual, a stride, one and two inputs, an input that is upsampled on the way."""

    def __init__(self):
        super().__init__()
        self.block = BasicBlock(8, 16, stride=2)
        self.project = nn.Conv2d(8, 16, 1, 2)
        self.ida = IDAUp(8, (8, 16), (1, 2))

    def forward(self, x):
        return self.ida([x, self.block(x, self.project(x))])[0]


LADDER_UNITS = 4


@pytest.fixture
def calls(monkeypatch):
    """How often a weight was packed, and a unit ran from what was kept."""
    counted = {"pack": 0, "run": 0}

    def counting(name, function):
        def call(*args):
            counted[name] += 1
            return function(*args)

        return call

    for name in counted:
        monkeypatch.setattr(packed, name, counting(name, getattr(packed, name)))
    with use_backend("cpu"):
        yield counted


def ladder(**kwargs):
    model = randomise(Ladder()).eval().to(**kwargs)
    return model, torch.randn(2, 8, 6, 4, **kwargs)


def unfrozen(model, *args):
    """What the model gives without what is kept of it."""
    kept = [(m.__dict__, m.__dict__.pop(KEY)) for m in model.modules() if KEY in m.__dict__]
    with torch.no_grad():
        y = model(*args)
    for where, state in kept:
        where[KEY] = state
    return y


def infer(model, *args):
    with torch.inference_mode():
        return model(*args).clone()


def assert_same(got, want):
    got, want = (list(y) if isinstance(y, (tuple, list)) else [y] for y in (got, want))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert relative(a.double(), b.double()) < TOLERANCE[a.dtype]


def states(model):
    return [m.__dict__[KEY] for m in model.modules() if KEY in m.__dict__]


def swapped_timm(timm):
    model = timm.create_model("dla34", num_classes=5)
    dla_fast.swap_(model, verify=False)
    return model


NETWORKS = {
    "own": lambda timm: tiny(),
    "dense": lambda timm: DLASeg(tiny(features_only=True), num_classes=3),
    "timm": swapped_timm,
}
CASES = [(name, dtype) for name in ("own", "dense") for dtype in TOLERANCE] + [("timm", torch.float32)]


@needs_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name, dtype", CASES)
def test_networks(timm, calls, name, dtype, layout, mode):
    model = randomise(NETWORKS[name](timm)).eval().to(dtype)
    x = torch.randn(2, 3, 32, 64, dtype=dtype).to(memory_format=layout)
    with torch.no_grad():
        want = model(x)
    report = dla_fast.freeze_(model)
    assert report.bytes == 0
    with mode():
        for _ in range(2):
            assert_same(model(x), want)
    assert calls == {"pack": report.units, "run": 2 * report.units}
    assert report.bytes > 0
    assert f"{report.units} units" in str(report)


def test_nothing_else_changes():
    model, x = ladder()
    before = {name: (t, t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        want = model(x)
    assert dla_fast.freeze_(model).units == LADDER_UNITS
    infer(model, x)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, values, version) in before.items():
        assert after[name] is tensor
        assert tensor._version == version
        assert torch.equal(tensor, values)
    assert dla_fast.unfreeze_(model) == LADDER_UNITS
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    with torch.no_grad():
        assert torch.equal(model(x), want)
    assert dla_fast.unfreeze_(model) == 0


# What may happen to a frozen model between two calls; each changes its results.


def load_state_dict(model):
    model.load_state_dict({k: v * 0.7 for k, v in model.state_dict().items()})


def assign_state_dict(model):
    model.load_state_dict({k: v * 0.7 for k, v in model.state_dict().items()}, assign=True)


def optimizer_step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1).step()


def moving_average(model):
    for p in model.parameters():
        p.data.mul_(0.9).add_(torch.ones_like(p), alpha=0.1)


def write_of_one_weight(model):
    with torch.no_grad():
        model.block.conv1.weight[5, 3, 1, 1] += 1


def write_of_one_filter_past_torch(model):
    model.block.conv2.weight.data[9] = 0


def write_of_one_norm_value_past_torch(model):
    model.block.bn1.bias.detach().numpy()[3] += 1


def data_exchanged(model):
    model.block.conv1.weight.data = model.block.conv1.weight.data * 2


def data_transposed(model):
    model.block.conv2.weight.data = model.block.conv2.weight.data.transpose(0, 1)


def parameter_exchanged(model):
    conv = model.block.conv2
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def conv_bias(model):
    model.ida.node_1[0].bias = nn.Parameter(torch.linspace(-1, 1, 8))


def running_mean(model):
    model.block.bn2.running_mean.add_(1)


def running_var(model):
    model.ida.proj_1[1].running_var.mul_(2)


def epsilon(model):
    model.block.bn1.eps = 0.5


def norm_without_affine(model):
    model.block.bn1 = nn.BatchNorm2d(16, affine=False).eval()


def norm_exchanged(model):
    model.block.bn1 = randomise(nn.BatchNorm2d(16)).eval()


def norm_synchronised(model):
    model.block = nn.SyncBatchNorm.convert_sync_batchnorm(model.block)
    optimizer_step(model)


def norm_of_batches(model):
    bn = model.block.bn1
    bn.running_mean = bn.running_var = None


def hook(model):
    model.block.conv1.register_forward_hook(lambda module, args, y: y * 2)


def pruned(model):
    prune.l1_unstructured(model.block.conv1, "weight", 0.5)


def pruned_for_good(model):
    pruned(model)
    prune.remove(model.block.conv1, "weight")


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(model):
    parametrize.register_parametrization(model.block.conv2, "weight", Double())


def stride(model):
    model.block.conv1.stride = model.project.stride = (1, 1)
    model.ida.up_factors, model.ida.up_1 = (1, 1), nn.Identity()


def up_weight(model):
    with torch.no_grad():
        model.ida.up_1.weight.mul_(2)


def training_step(model):
    model.train()
    model(torch.randn(2, 8, 6, 4)).sum().backward()
    model.eval()
    optimizer_step(model)


def written_in_inference_mode(model):
    with torch.inference_mode():
        model.block.conv1.weight.mul_(2)


SERVED = [
    load_state_dict, assign_state_dict, optimizer_step, moving_average, write_of_one_weight,
    write_of_one_filter_past_torch, write_of_one_norm_value_past_torch, data_exchanged, data_transposed,
    parameter_exchanged, conv_bias, running_mean, running_var, epsilon, norm_exchanged, norm_without_affine,
    pruned_for_good, stride, up_weight, training_step, written_in_inference_mode,
]  # fmt: skip
# A call in which a unit is one no longer, or cannot be kept.
PARTLY = [norm_synchronised, norm_of_batches, hook, pruned, parametrized]


@needs_kernels
@pytest.mark.parametrize("change", [*SERVED, *PARTLY], ids=lambda change: change.__name__)
def test_what_changes_is_never_stale(calls, change):
    model, x = ladder()
    report = dla_fast.freeze_(model)
    before = infer(model, x)
    change(model)
    calls["run"] = 0
    want = unfrozen(model, x)
    for _ in range(2):
        assert_same(infer(model, x), want)
    assert want.shape != before.shape or relative(before, want) > 1e-3
    lost = 0 if change in SERVED else 2 if change is norm_synchronised else 1
    assert calls["run"] == 2 * (report.units - lost)


def double(model):
    return model.double()


def half_and_back(model):
    return model.to(torch.bfloat16).float()


def new_layout(model):
    return model.to(memory_format=torch.channels_last)


def shared_memory(model):
    return model.share_memory()


@needs_kernels
@pytest.mark.parametrize("swapping", [False, True])
@pytest.mark.parametrize("move", [double, half_and_back, new_layout, shared_memory], ids=lambda f: f.__name__)
def test_moves(calls, move, swapping):
    """Conversions write new memory into parameters, or exchange what parameters are."""
    model, x = ladder()
    report = dla_fast.freeze_(model)
    infer(model, x)
    torch.__future__.set_swap_module_params_on_conversion(swapping)
    try:
        move(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = x.to(model.project.weight.dtype)
    want = unfrozen(model, x)
    calls["run"] = 0
    assert_same(infer(model, x), want)
    assert calls["run"] == report.units


def test_devices():
    model, x = ladder()
    report = dla_fast.freeze_(model)
    infer(model, x)
    model.to("meta")
    assert infer(model, x.to("meta")).shape == (2, 8, 6, 4)
    assert report.bytes == 0 or not backend.can_run("cpu", "conv_norm_act", "cpu", torch.float32)


def test_training_frees_what_is_kept():
    model, x = ladder()
    report = dla_fast.freeze_(model)
    infer(model, x)
    other = copy.deepcopy(model)
    dla_fast.unfreeze_(other)
    for m in (model, other):
        m.train()
        m(x).square().mean().backward()
    assert report.bytes == 0
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


@needs_kernels
def test_gradients_in_evaluation(calls):
    model, x = ladder()
    dla_fast.freeze_(model)
    infer(model, x)
    calls["run"] = 0
    other = copy.deepcopy(model)
    dla_fast.unfreeze_(other)
    with pytest.warns(UserWarning, match="gradients enabled") as said:
        grads = [torch.autograd.grad(model(x).sum(), list(model.parameters())) for _ in range(2)][1]
    assert len(said) == 1
    want = torch.autograd.grad(other(x).sum(), list(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
    assert calls["run"] == 0
    # An input alone may need a gradient; where nothing does, there is nothing to say.
    model.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0
    assert calls["run"] == 0
    dla_fast.unfreeze_(model)
    dla_fast.freeze_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    assert calls["run"] == LADDER_UNITS


@needs_kernels
def test_autocast(calls):
    model, x = ladder()
    dla_fast.freeze_(model)
    infer(model, x)
    calls["run"] = 0
    with torch.autocast("cpu", torch.bfloat16):
        y = infer(model, x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, unfrozen(model, x))
    assert calls["run"] == 0
    model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(infer(model, x.bfloat16()), unfrozen(model, x.bfloat16()))
    assert calls["run"] == LADDER_UNITS


@needs_kernels
def test_calls_that_are_taken_apart(calls):
    model, x = ladder()
    dla_fast.freeze_(model)
    want = infer(model, x)
    calls["run"] = 0
    others = {
        "compile": lambda: torch.compile(model, backend="eager", fullgraph=True)(x),
        "export": lambda: torch.export.export(model, (x,)).module()(x),
        "trace": lambda: torch.jit.trace(model, (x,), check_trace=False)(x),
        "vmap": lambda: torch.func.vmap(model)(torch.stack([x, x]))[1],
        "jvp": lambda: torch.func.jvp(model, (x,), (x,))[0],
    }
    with torch.no_grad():
        for name, call in others.items():
            assert relative(call(), want) < 1e-5, name
            assert calls["run"] == 0, name
        with FlopCounterMode(display=False) as counted:
            model(x)
        assert counted.get_total_flops() > 0
    with use_backend("reference"):
        assert relative(infer(model, x), want) < 1e-5
    # A view of what is negated once it is read.
    negated = torch.complex(x, -x).conj().imag
    assert relative(infer(model, negated), want) < 1e-5
    assert negated.is_neg()
    assert calls["run"] == LADDER_UNITS - 2


@needs_kernels
def test_threads(calls):
    """The first calls at once, each with values of its own, and calls while weights move in between."""
    model, _ = ladder()
    dla_fast.freeze_(model)
    images = [torch.randn(2, 8, 6, 4) for _ in range(4)]
    together = Barrier(4)

    def often(i):
        found = []
        for _ in range(3):
            together.wait()
            found.append([infer(model, images[i]) for _ in range(4)])
            if together.wait() == 0:
                optimizer_step(model)
            together.wait()
        return found

    replayed = copy.deepcopy(model)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(often, range(4)))
    for turn in range(3):
        for i, x in enumerate(images):
            want = infer(replayed, x)
            assert all(torch.equal(y, want) for y in results[i][turn])
        optimizer_step(replayed)
    assert calls["run"] == (4 * 3 * 4 + 3 * 4) * LADDER_UNITS


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@needs_kernels
@pytest.mark.parametrize("again", [copied, pickled, saved], ids=lambda f: f.__name__)
def test_copies(calls, again):
    model, x = ladder()
    dla_fast.freeze_(model)
    want = infer(model, x)
    other = again(model)
    assert len(states(other)) == LADDER_UNITS
    assert not {id(s) for s in states(other)} & {id(s) for s in states(model)}
    assert all(s.nbytes == 0 for s in states(other))
    assert len({id(s.model) for s in states(other)}) == 1
    calls["run"] = 0
    assert torch.equal(infer(other, x), want)
    assert calls["run"] == LADDER_UNITS
    optimizer_step(other)
    assert relative(infer(other, x), want) > 1e-3
    dla_fast.unfreeze_(other)
    assert torch.equal(infer(model, x), want)


@needs_kernels
def test_replicas(calls):
    """DataParallel's copies have the state of the original, and plain attributes for parameters."""
    model = randomise(nn.Sequential(AggregationNode(8, 8))).eval()
    x = torch.randn(2, 8, 5, 3)
    dla_fast.freeze_(model)
    want = infer(model, x)
    replica = model[0]._replicate_for_data_parallel()
    for name, child in model[0].named_children():
        part = child._replicate_for_data_parallel()
        for key, p in child._parameters.items():
            if p is None:
                part._parameters[key] = None
            else:
                setattr(part, key, p.detach() * 2)
        replica._modules[name] = part
    model[0].conv.weight.data.mul_(2)
    for p in model[0].bn.parameters():
        p.data.mul_(2)
    calls["run"] = 0
    got = infer(replica, x)
    assert calls["run"] == 0
    assert_same(got, unfrozen(model, x))
    assert relative(got, want) > 1e-3


@needs_kernels
def test_one_convolution_behind_two_norms(calls):
    first = randomise(AggregationNode(8, 8)).eval()
    second = randomise(AggregationNode(8, 8)).eval()
    second.conv = first.conv
    model, x = nn.Sequential(first, second), torch.randn(2, 8, 5, 3)
    assert dla_fast.freeze_(model).units == 1
    for _ in range(3):
        assert_same(infer(model, x), unfrozen(model, x))
    assert calls == {"pack": 2, "run": 6}


@needs_kernels
def test_many_sizes(calls, monkeypatch):
    """What is remembered of calls has a bound, and a weight is packed once for all of them."""
    monkeypatch.setattr(frozen_module, "CALLS", 2)
    model = randomise(AggregationNode([8, 16], 8, residual=True, act=("leaky_relu", 0.2))).eval()
    dla_fast.freeze_(model)
    for side in (3, 5, 7, 9, 3):
        xs = [torch.randn(1, c, side, 4) for c in (8, 16)]
        assert_same(infer(model, xs), unfrozen(model, xs))
        model.act = "silu" if model.act == "relu" else "relu"
        assert_same(infer(model, xs), unfrozen(model, xs))
    assert calls == {"pack": 1, "run": 10}
    (state,) = states(model)
    assert len(next(iter(state._folded.values())).calls) <= 2


@needs_kernels
def test_wrong_inputs_are_told_as_before(calls):
    model = AggregationNode(16, 8).eval()
    wrong = [torch.randn(2, 8, 5, 3), torch.randn(2, 8, 5, 4)]
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            infer(model, wrong)
        errors.append(str(error.value))
        dla_fast.freeze_(model)
    assert errors[0] == errors[1]
    assert calls["run"] == 0


@needs_kernels
def test_inference_tensors(calls):
    with torch.inference_mode():
        model = randomise(Ladder()).eval()
        x = torch.randn(2, 8, 6, 4)
    dla_fast.freeze_(model)
    assert_same(infer(model, x), unfrozen(model, x))
    with torch.inference_mode():
        model.load_state_dict({k: v * 0.7 for k, v in model.state_dict().items()})
    assert_same(infer(model, x), unfrozen(model, x))
    assert calls == {"pack": 2 * LADDER_UNITS, "run": 2 * LADDER_UNITS}


def test_errors():
    for function in (dla_fast.freeze_, dla_fast.unfreeze_):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
            function("model")
    with pytest.raises(ValueError, match=r"call dla_fast.swap_\(model\) before"):
        dla_fast.freeze_(Pair().eval())
    model, _ = ladder()
    model.block.bn2.train()
    with pytest.raises(ValueError, match=r"block.bn2 is in training mode; call model.eval\(\)"):
        dla_fast.freeze_(model)
    assert not states(model)
    # The mode of a norm that no unit has is none of its business.
    other = nn.Sequential(nn.BatchNorm2d(8), AggregationNode(8, 8).eval())
    assert dla_fast.freeze_(other).units == 1


def test_freezing_again():
    model, x = ladder()
    dla_fast.freeze_(model)
    want = infer(model, x)
    before = states(model)
    report = dla_fast.freeze_(model)
    assert report.units == LADDER_UNITS
    assert all(a is b for a, b in zip(states(model), before, strict=True))
    assert torch.equal(infer(model, x), want)
    assert dla_fast.unfreeze_(model) == LADDER_UNITS
    assert not states(model)


@needs_kernels
def test_swapping_before_and_after(calls):
    model, xs = randomise(Pair()).eval(), inputs()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    dla_fast.swap_(model, filter_fn=lambda name, module: name == "first")
    assert dla_fast.freeze_(model).units == 1
    infer(model, *xs)
    dla_fast.swap_(model)
    assert_same(infer(model, *xs), unfrozen(model, *xs))
    assert calls["run"] == 2
    assert dla_fast.freeze_(model).units == 2
    assert_same(infer(model, *xs), unfrozen(model, *xs))
    assert calls["run"] == 4
    dla_fast.unswap_(model)
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert dla_fast.unfreeze_(model) == 0


@needs_kernels
class TestFingerprint:
    def tensors(self):
        return [torch.randn(16, 8, 3, 3), None, *torch.randn(4, 16).unbind()]

    def test_is_the_same_for_the_same(self):
        tensors = self.tensors()
        assert packed.fingerprint(tensors) == packed.fingerprint(tensors) != 0

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("shape", [(5, 3, 1, 1), (16, 8, 3, 3), (100, 64, 3, 3), (300, 7, 1, 1)])
    def test_sees_every_filter_and_every_value_of_a_vector(self, shape, layout, dtype):
        weight = torch.randn(shape, dtype=dtype).to(memory_format=layout)
        vector = torch.randn(shape[0], dtype=dtype)
        seen = {packed.fingerprint([weight, vector])}
        for i in range(shape[0]):
            weight.data[i] += 1
            seen.add(packed.fingerprint([weight, vector]))
            vector.data[i] += 1
            seen.add(packed.fingerprint([weight, vector]))
        assert len(seen) == 2 * shape[0] + 1

    def test_sees_what_a_tensor_is(self):
        values = torch.ones(4, 4, 1, 1)
        views = [values, values.view(2, 8, 1, 1), values.transpose(0, 1), values.view(torch.int32), values[:2]]
        assert len({packed.fingerprint([v]) for v in (*views, None, values.clone())}) == len(views) + 2

    def test_sees_a_write_that_torch_counts(self):
        tensors = self.tensors()
        before = packed.fingerprint(tensors)
        tensors[0][3, 3, 1, 1] = tensors[0][3, 3, 1, 1].item()
        assert packed.fingerprint(tensors) != before

    def test_vectors_with_a_stride(self):
        weight, vector = torch.randn(4, 4, 1, 1), torch.randn(4, 2)
        before = packed.fingerprint([weight, vector[:, 0]])
        vector.data[:, 1] = 0
        assert packed.fingerprint([weight, vector[:, 0]]) == before
        vector.data[3, 0] = 0
        assert packed.fingerprint([weight, vector[:, 0]]) != before

    def test_there_is_none_of_what_cannot_be_read(self):
        for other in (torch.empty(4, device="meta"), torch.eye(4).to_sparse(), torch.randn(4, 9)[:, :4]):
            assert packed.fingerprint([torch.randn(3), other]) == 0
