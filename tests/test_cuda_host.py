"""The CUDA kernels, run on the host thread by thread against the contract; see cuda_host/cuda_host.h.

Every kernel, its dtypes, both layouts, sizes that fit its vectors and sizes that do not. A race on shared memory, a
barrier that some threads miss, and shared memory that is read before it is written make a launch raise; under
AddressSanitizer (make asan) so does every access outside a tensor.
"""

from __future__ import annotations

import ctypes
import itertools

import cuda_host
import pytest
import torch
from not_finite import of_a_norm, of_upsampling
from torch.library import opcheck

from dla_fast import backend, functional, ops, reference, use_backend
from dla_fast.ops import cuda
from dla_fast.proof import parity, tf32
from dla_fast.proof.parity import Spec

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MATRIX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTS = ("relu", "identity", "silu", "leaky_relu", "hardswish")
OPS = ("batch_norm_act", "upsample", "upsample_add")


@pytest.fixture(scope="module")
def library():
    path = cuda_host.build()
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@pytest.fixture(autouse=True)
def _served(library, poisoned, monkeypatch):
    """Calls on CPU tensors go to the CUDA kernels."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    for op in ops.UNITS:
        monkeypatch.setitem(ops._missing, ("cuda", op), ops.find_missing("cuda", op, "CPU"))
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    with use_backend("cuda"):
        yield
    torch.backends.cudnn.conv.fp32_precision = before


def check(op: str, *specs: Spec) -> None:
    pool = parity.Pool()
    for spec in specs:
        pool.add(parity.PROBLEMS[op](spec))
    assert pool.cases
    assert not pool.failures(), "\n" + pool.failures()


@pytest.mark.parametrize(
    ("fault", "found", "total"),
    [
        (0, "", 2 * sum(range(64))),
        (1, "race: shared memory is read", None),
        (2, "race: two threads write", None),
        (3, "read that nobody wrote", None),
        (4, "reached at 64 of 64", None),
        (5, "not aligned", None),
        (6, "wait at different places", None),
        (7, "ended before a barrier", None),
        (8, "written that another thread read", None),
    ],
)
def test_faults_are_found(library, fault, found, total):
    library.cuda_host_fault.restype = ctypes.c_char_p
    result = ctypes.c_int()
    message = library.cuda_host_fault(fault, ctypes.byref(result)).decode()
    assert found in message
    assert bool(found) == bool(message)
    assert total in (None, result.value)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_batch_norm_act(dtype, layout, act):
    # Vectors of 2, 4 or 8 values fit the first two; of the others some channels or pixels are left over.
    sizes = ((24, 4, 6), (16, 8, 8), (5, 3, 7), (33, 1, 9))
    check(
        "batch_norm_act",
        *(
            Spec(
                dtype, layout, out_channels=c, height=h, width=w, act=act, residual=seed % 2 == 0, training=t, seed=seed
            )
            for seed, ((c, h, w), t) in enumerate(itertools.product(sizes, (True, False)))
        ),
    )


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("channels", [3, 520])
def test_batch_norm_act_in_many_blocks(layout, channels):
    check("batch_norm_act", Spec(layout=layout, out_channels=channels, height=9, width=52 if channels < 9 else 4))


@pytest.fixture
def many_processors(library):
    """A machine so large that partial results are more than the threads that add them up have at once."""
    library.cuda_host_processors(200)
    yield
    library.cuda_host_processors(2)


@pytest.mark.parametrize("size", [(7, 5, 3840), (31, 4, 4900)], ids=str)
@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
def test_batch_norm_act_in_more_groups_than_threads(many_processors, layout, size):
    channels, height, width = size
    check("batch_norm_act", Spec(layout=layout, out_channels=channels, batch=1, height=height, width=width))


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 9, 40, 60), (8, 7, 8, 41), (3, 5, 31, 31)], ids=str)
def test_batch_norm_act_of_long_runs(dtype, layout, size):
    # Threads that take many vectors, planes of fewer vectors than threads and of more, and residuals.
    c, n, h, w = size
    specs = (
        Spec(dtype, layout, out_channels=c, batch=n, height=h, width=w, residual=r, act=a)
        for r, a in ((True, "relu"), (False, "identity"), (True, "silu"))
    )
    check("batch_norm_act", *specs)


@pytest.mark.parametrize("options", [{"affine": False}, {"half_norm": True}], ids=str)
def test_norm_variants(options):
    check("batch_norm_act", Spec(torch.float16, out_channels=16, height=4, width=8, residual=True, **options))


def test_moments_far_from_zero():
    for layout in parity.LAYOUTS.values():
        z = (torch.randn(4, 16, 28, 28) + 1000.0).to(memory_format=layout)
        mean, var = torch.ops.dla_fast_cuda.moments(z, None, None, 0.1)
        exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
        assert ((var - exact_var).abs() / exact_var).max() < 1e-6
        assert ((mean - exact_mean).abs() / exact_mean).max() < 1e-7


def test_running_statistics_with_strides():
    mean, var = torch.zeros(12)[::2], torch.ones(12)[::2]
    expected = mean.clone(), var.clone()
    x = torch.randn(2, 6, 3, 5)
    functional.batch_norm_act(x, None, None, mean, var, training=True)
    reference.batch_norm_act(x, None, None, *expected, training=True)
    torch.testing.assert_close((mean, var), expected)


@pytest.mark.parametrize("op", ["upsample", "upsample_add"])
@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_upsample(op, dtype, layout, factor):
    # Whole vectors of channels and of rows, then neither; maps of one pixel and of one row.
    sizes = ((8, 2, 3, 4), (24, 1, 2, 8), (3, 2, 3, 5), (1, 1, 1, 1), (16, 1, 1, 9))
    check(
        op,
        *(
            Spec(
                dtype, layout, out_channels=c, batch=n if factor < 8 else 1, height=h, width=w, factor=factor, seed=seed
            )
            for seed, (c, n, h, w) in enumerate(sizes if op == "upsample" else sizes[::2])
        ),
    )


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("factor", [28, 60])
def test_upsample_by_more_than_shared_memory_holds(layout, factor):
    for channels in (1, 8):
        x = torch.randn(1, channels, 1, 2).to(memory_format=parity.LAYOUTS[layout])
        weight = torch.randn(channels, 1, 2 * factor, 2 * factor)
        torch.testing.assert_close(functional.upsample(x, weight, factor), reference.upsample(x, weight, factor))


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("factor", [2, 4])
def test_upsample_in_many_blocks(layout, factor):
    check("upsample", Spec(layout=layout, out_channels=72, height=9, width=32, factor=factor))


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
def test_upsample_in_more_blocks_than_threads_that_add_them(many_processors, layout):
    check("upsample", Spec(layout=layout, out_channels=8, batch=70, height=16, width=16, factor=2))


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_upsample_of_many_channels_and_odd_sizes(dtype, layout, factor):
    rows = 2 if factor < 8 else 1
    for channels, height, width in ((72, rows, 8), (24, rows, 11)):
        check(
            "upsample_add",
            Spec(dtype, layout, out_channels=channels, batch=1, height=height, width=width, factor=factor),
        )


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_either_gradient_of_upsample_alone(layout, factor):
    run, form = torch.ops.dla_fast_cuda.upsample_backward, parity.LAYOUTS[layout]
    x, weight = torch.randn(2, 16, 3, 8).to(memory_format=form), torch.randn(16, 1, 2 * factor, 2 * factor)
    dy = torch.randn_like(functional.upsample(x, weight, factor)).to(memory_format=form)
    dx, dw = run(dy, x, weight, factor, True, True)
    assert torch.equal(dx, run(dy, x, weight, factor, True, False)[0])
    assert torch.equal(dw, run(dy, x, weight, factor, False, True)[1])


def inference(xs, weight, norm, residual, act, conv_bias=None):
    with torch.no_grad():
        return functional.aggregate(xs, weight, *norm, training=False, residual=residual, act=act, conv_bias=conv_bias)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("dtype", MATRIX_DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_aggregate_inference(dtype, layout, act):
    # Depths beyond a round of the eight warps, outputs and pixels beyond a tile, and what fits no vector.
    nodes = (((24, 40), 24, (2, 6, 6)), ((64,) * 3, 40, (1, 7, 7)), ((5, 3), 5, (2, 3, 1)), ((600,), 33, (1, 4, 4)))
    mine, peer, largest = [], [], []
    for seed, (channels, out_channels, (n, h, w)) in enumerate(nodes):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            # What float16 holds TF32 holds too.
            return torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype)

        xs = [draw(n, c, h, w).to(memory_format=parity.LAYOUTS[layout]) for c in channels]
        weight = draw(out_channels, sum(channels), 1, 1) / sum(channels)
        weight = weight.bfloat16().to(dtype).to(memory_format=parity.LAYOUTS[layout])
        norm = [torch.rand(out_channels, generator=generator) + 0.5 for _ in range(4)]
        options = {"residual": out_channels == channels[0], "act": act}
        options["conv_bias"] = draw(out_channels) if seed % 2 else None
        y = inference(xs, weight, norm, **options)
        assert y.is_contiguous(memory_format=parity.LAYOUTS[layout])
        if options["conv_bias"] is not None:
            exact_bias = options["conv_bias"].double()
        doubles = [x.double() for x in xs], weight.double(), [v.double() for v in norm]
        exact = reference.aggregate(
            doubles[0], doubles[1], *doubles[2], training=False, residual=options["residual"], act=act,
            conv_bias=None if options["conv_bias"] is None else exact_bias,
        )  # fmt: skip
        eager = reference.aggregate(xs, weight, *norm, training=False, **options)
        mine.append((y - exact).abs().max().item())
        peer.append((eager - exact).abs().max().item())
        largest.append(exact.abs().max().item())
    assert max(mine) <= 2 * max(peer) + torch.finfo(dtype).eps / 2 * max(largest)


def test_tf32_rounds_the_operands():
    """The contract's bound under the switch: twice the error of PyTorch's ops with rounded operands."""
    mine, peer = [], []
    for _ in range(4):
        x, weight = torch.randn(1, 64, 4, 4), torch.randn(32, 64, 1, 1) / 8
        norm = [torch.ones(32), torch.zeros(32), torch.zeros(32), torch.ones(32)]
        exact = reference.aggregate([x.double()], weight.double(), *[v.double() for v in norm], training=False)
        with tf32.RoundedProducts():
            rounded = reference.aggregate([x], weight, *norm, training=False)
        mine.append(inference([x], weight, norm, False, "relu") - exact)
        peer.append(rounded - exact)
    for norm_of in (torch.Tensor.square, torch.Tensor.abs):
        error, bound = (max(norm_of(t).mean().item() for t in ts) for ts in (mine, peer))
        assert 0.9 * bound < error < 1.1 * bound
    assert 1e-5 < max(t.abs().max().item() for t in mine) < 2e-3


def aggregation(xs, weight, v, **changed):
    """Arguments of the inference operator for an aggregation node."""
    options = {"up_weights": [], "residual": None, "stride": 1, "dilation": 1, "groups": 1, "residual_input": -1}
    options |= {"factors": [1] * len(xs)} | changed
    node = (xs, options["up_weights"], weight, None, options["residual"], v, v, v, v, options["factors"])
    return (*node, *(options[name] for name in ("stride", "dilation", "groups", "residual_input")), 1e-5, "relu", 0.0)


def test_the_aggregation_kernel_refuses_other_nodes():
    xs, weight, v = [torch.randn(1, 4, 2, 2)] * 2, torch.randn(4, 8, 1, 1), torch.ones(4)
    run = torch.ops.dla_fast_cuda.conv_norm_act_inference
    assert run(*aggregation(xs, weight, v, residual_input=0)).shape == (1, 4, 2, 2)
    for name, value in (("stride", 2), ("dilation", 2), ("groups", 2), ("factors", [1, 2]), ("residual_input", 1)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            run(*aggregation(xs, weight, v, **{name: value}))
    with pytest.raises(ValueError, match="residual: expected none"):
        run(*aggregation(xs, weight, v, residual=xs[0]))
    with pytest.raises(ValueError, match="weight: expected a 1x1 kernel, got 3x3"):
        run(*aggregation(xs, torch.randn(4, 8, 3, 3), v))


def test_what_the_aggregation_kernel_leaves_to_others():
    x, weight = torch.randn(1, 8, 2, 2), torch.randn(4, 8, 1, 1)
    norm = [torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)]
    with pytest.raises(RuntimeError, match="cannot run aggregate"):
        functional.aggregate([x], weight, *norm, training=True)
    with pytest.raises(RuntimeError, match="cannot run aggregate"):
        inference([x.double()], weight.double(), [v.double() for v in norm], False, "relu")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with pytest.raises(RuntimeError, match="cannot run aggregate"):
        inference([x], weight, norm, False, "relu")
    assert "TF32" in str(cuda.refuses_aggregate(torch.float32))


def test_who_serves_inference_alone(monkeypatch):
    with use_backend("auto"):
        assert backend.serves_inference("aggregate", "cpu", torch.bfloat16) == "cuda"
        assert backend.serves_inference("merge", "cpu", torch.bfloat16) is None
        monkeypatch.setattr(backend, "can_run", lambda *args: None)
        assert backend.serves_inference("aggregate", "cpu", torch.bfloat16) is None
    with use_backend("cpu"):
        assert backend.serves_inference("aggregate", "cpu", torch.bfloat16) is None


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
@pytest.mark.parametrize("factor", [2, 3])
def test_gradcheck(op, layout, factor):
    spec = Spec(torch.float64, layout, out_channels=2, height=2, width=4, factor=factor, residual=True, act="silu")
    run, inputs = parity.gradient_function(parity.PROBLEMS[op](spec))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", list(parity.LAYOUTS))
def test_opcheck(layout):
    namespace = torch.ops.dla_fast_cuda
    x = torch.randn(2, 8, 3, 4).to(memory_format=parity.LAYOUTS[layout])
    v = torch.rand(8) + 0.5
    norm = (v, v, v, v, None, 1e-5, "relu", 0.0)
    opcheck(namespace.moments, (x, v.clone(), v.clone(), 0.1))
    opcheck(namespace.tail, (x, *norm))
    opcheck(namespace.tail_backward_reduce, (x, x, *norm))
    opcheck(namespace.tail_backward_apply, (x, x, v, v, v, v, x, v, v, 24, 1e-5, "relu", 0.0, True))
    weight = torch.randn(8, 1, 4, 4)
    y = namespace.upsample(x, weight, 2)
    opcheck(namespace.upsample_add, (x, y, weight, 2))
    opcheck(namespace.upsample_backward, (y, x, weight, 2, True, True))
    opcheck(namespace.upsample_backward, (y, x, weight, 2, False, True))
    opcheck(namespace.conv_norm_act_inference, aggregation([x, x], torch.randn(8, 16, 1, 1), v, residual_input=0))
    x.requires_grad_()
    opcheck(namespace.upsample, (x, weight.requires_grad_(), 2))


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_every_time(op):
    for layout in parity.LAYOUTS:
        problem = parity.PROBLEMS[op](Spec(layout=layout, out_channels=16, height=6, width=8, residual=True))
        dy = parity.safe_gradient(problem, torch.device("cpu"))
        first, again = (parity.execute(problem, functional, dy, None) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_empty_and_misaligned():
    v = torch.ones(3)
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x = torch.randn(shape)
        assert functional.batch_norm_act(x, v, v, v, v, training=False).shape == x.shape
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    weight = torch.randn(3, 1, 4, 4, requires_grad=True)
    functional.upsample(x, weight, 2).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 1, 4, 4))
    # Starts four bytes after a multiple of 16.
    x = torch.randn(1 + 2 * 8 * 4 * 4)[1:].view(2, 8, 4, 4)
    expected = reference.batch_norm_act(x, None, None, None, None, training=True)
    torch.testing.assert_close(functional.batch_norm_act(x, None, None, None, None, training=True), expected)
    torch.testing.assert_close(
        functional.upsample(x, weight.new_ones(8, 1, 4, 4), 2), reference.upsample(x, weight.new_ones(8, 1, 4, 4), 2)
    )


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("8.0", "9.0"), (8, 6), True),
        (("8.0", "9.0"), (9, 0), True),
        (("8.0", "9.0"), (7, 5), False),
        (("8.0", "9.0"), (10, 0), False),
        (("8.6",), (8, 0), False),
        (("8.0", "9.0+PTX"), (12, 0), True),
        (("9.0a",), (9, 0), True),
        (("9.0a",), (10, 0), False),
        (("10.0+PTX",), (9, 0), False),
        (("Hopper",), (9, 0), True),
    ],
)
def test_architectures(architectures, capability, runs):
    assert cuda.built_for(architectures, capability) is runs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stands_where_it_does_in_pytorch(dtype):
    of_a_norm("cuda", dtype, (2, 6, 8), 29)
    of_upsampling("cuda", dtype, 2, 11)
