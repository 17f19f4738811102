"""The bfloat16 products of the CPU: shapes around their blocks of 16 and 32, and what lies next to a tensor."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dla_fast import _extension, functional, use_backend
from dla_fast.proof import parity
from dla_fast.proof.parity import Spec

pytestmark = pytest.mark.skipif(not _extension.STATUS.loaded, reason="no C++ extension")

LAYOUTS = ("channels_last", "contiguous")
PRODUCTS = ("avx512_bf16", "amx", "amx_emulated")


@pytest.fixture(autouse=True)
def _on_cpu():
    with use_backend("cpu"):
        yield


def isa() -> str:
    from dla_fast import _C

    return _C.cpu_isa()


def node(
    channels: tuple[int, ...],
    out_channels: int,
    size: tuple[int, int, int],
    layout: str,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[list[Tensor], list[Tensor]]:
    n, h, w = size
    xs = [torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=parity.LAYOUTS[layout]) for c in channels]
    weight = torch.randn(out_channels, sum(channels), 1, 1) * sum(channels) ** -0.5
    norm = [torch.randn(out_channels), torch.randn(out_channels)]
    return xs, [weight.to(dtype), torch.ones(out_channels), *norm, torch.rand(out_channels) + 0.5]


def amid_nan(t: Tensor) -> Tensor:
    """The same inside memory full of NaN, which a product with a zero would carry on."""
    memory = torch.full((t.numel() + 4096,), float("nan"), dtype=t.dtype)
    inside = memory[2048 : 2048 + t.numel()].as_strided(t.shape, t.stride(), memory.storage_offset() + 2048)
    return inside.copy_(t)


def isa_with(name: str) -> str:
    """What a process uses that asks for an instruction set."""
    code = "from dla_fast import _C; print(_C.cpu_isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DLA_FAST_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def passes_with(name: str, file: str, every: int = 1) -> None:
    """The tests of a file with this instruction set, or every so many of their combinations."""
    if isa_with(name) != name:
        pytest.skip(f"no {name} here")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", "not other_products"],
        env={"DLA_FAST_TEST_EVERY": str(every), **os.environ, "DLA_FAST_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{name}\n{done.stdout[-3000:]}"
    assert " passed" in done.stdout


def exact(xs: list[Tensor], weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    z = F.conv2d(torch.cat([x.double() for x in xs], 1), weight.double())
    return F.batch_norm(z, mean.double(), var.double(), gamma.double(), beta.double(), False, 0.0, 1e-5)


# Pixels and channels around every boundary: a block (16), a step or panel (32), a part (64) and what it takes along,
# a piece (128), tiles of several parts. Maps of few pixels make tiles of contiguous tensors span images.
SIZES = (
    (1, 1, 1),
    (1, 3, 5),
    (1, 4, 4),
    (1, 1, 17),
    (3, 7, 7),
    (2, 8, 8),
    (1, 1, 79),
    (1, 10, 8),
    (5, 1, 3),
    (2, 23, 29),
)
CHANNELS = ((32,), (1,), (31, 33), (64, 32, 96), (16, 2, 40, 128), (5, 1, 24, 64, 24, 5, 1, 64))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_every_boundary(channels, size, layout):
    for out_channels in (1, 15, 16, 17, 32, 33, 72, 128, 150):
        xs, params = node(channels, out_channels, size, layout)
        z = exact(xs, *params)
        with torch.no_grad():
            y = functional.aggregate(xs, *params, training=False, act="identity", eps=1e-5)
        # Products are exact in float32, so that little but the last rounding is left.
        torch.testing.assert_close(y.double(), z, rtol=2**-8, atol=1e-4, msg=lambda m, n=out_channels: f"to {n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 7, 7), (4, 7, 7), (2, 14, 14), (3, 1, 1), (2, 30, 40)], ids=str)
def test_parity_of_nodes(poisoned, layout, size):
    batch, height, width = size
    pool = parity.Pool()
    if batch * height * width > 9:
        for channels, residual, training in itertools.product(
            ((96, 96, 32, 96), (96, 17)), (False, True), (False, True)
        ):
            spec = Spec(
                dtype=torch.bfloat16,
                layout=layout,
                channels=channels,
                out_channels=96,
                batch=batch,
                height=height,
                width=width,
                residual=residual,
                training=training,
            )
            pool.add(parity.aggregate(spec))
        assert not pool.failures(), "\n" + pool.failures()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 7, 7), (8, 7, 7), (3, 4, 4), (7, 1, 3), (1, 16, 16), (2, 50, 41)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_moments_are_those_of_the_stored_map(poisoned, layout, size, threads):
    xs, (weight, *_) = node((48, 64), 80, size, layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        z, mean, var = torch.ops.dla_fast_cpu.conv_norm_act_stage(
            xs, [], weight, None, None, None, [1, 1], 1, 1, 1, 0.1, True
        )
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(mean, z.float().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, z.double().var((0, 2, 3), unbiased=False).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(z.double(), F.conv2d(torch.cat(xs, 1).double(), weight.double()), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [(32, 64), (31, 5), (32, 7)], ids=str)
def test_neighbours_do_not_leak(layout, channels):
    xs, params = node(channels, 24, (1, 5, 5), layout)

    with torch.no_grad():
        expected = functional.aggregate(xs, *params, training=False)
        y = functional.aggregate([amid_nan(x) for x in xs], *[amid_nan(p) for p in params], training=False)
    assert torch.equal(y, expected)
    assert not y.isnan().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_in_its_pixel(layout, value):
    xs, params = node((33, 64), 40, (3, 5, 7), layout)
    with torch.no_grad():
        expected = functional.aggregate(xs, *params, training=False, act="identity")
        xs[0][1, 32, 4, 6] = value
        y = functional.aggregate(xs, *params, training=False, act="identity")
    assert not y[1, :, 4, 6].isfinite().any()
    y[1, :, 4, 6] = expected[1, :, 4, 6]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_change_nothing(layout):
    """A value is summed in one order, wherever tiles begin."""
    xs, params = node((64, 96, 40), 200, (4, 14, 14), layout)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append(functional.aggregate(xs, *params, training=False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_other_libraries_keep_their_tiles():
    """oneDNN configures the same tiles in the same threads."""
    xs, params = node((64, 32), 64, (2, 14, 14), "channels_last")
    a, b = torch.randn(100, 70).bfloat16(), torch.randn(70, 90).bfloat16()
    product = a @ b
    conv = F.conv2d(xs[0], params[0][:, :64])
    with torch.no_grad():
        expected = functional.aggregate(xs, *params, training=False)
        for _ in range(5):
            assert torch.equal(functional.aggregate(xs, *params, training=False), expected)
            assert torch.equal(a @ b, product)
            assert torch.equal(F.conv2d(xs[0], params[0][:, :64]), conv)


def test_a_thread_that_did_not_ask_may_multiply():
    """Linux grants tiles to a process, and to threads that were there before as well."""
    xs, params = node((64, 32), 64, (2, 14, 14), "channels_last")
    with torch.no_grad():
        expected = functional.aggregate(xs, *params, training=False)
    found: list[Tensor] = []

    def multiply() -> None:
        with torch.no_grad(), use_backend("cpu"):
            found.append(functional.aggregate(xs, *params, training=False))

    threads = [threading.Thread(target=multiply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_types_go_the_way_of_avx512(dtype):
    """Bit for bit: the instruction sets past avx512 add products of bfloat16, and amx those of float."""
    if isa() not in PRODUCTS:
        pytest.skip("no products of bfloat16 here")
    code = (
        "import sys, torch; from dla_fast import functional; torch.manual_seed(0); torch.set_num_threads(1)\n"
        f"xs = [torch.randn(2, c, 9, 9, dtype={dtype}) for c in (33, 64)]\n"
        f"w = torch.randn(40, 97, 1, 1, dtype={dtype}); one = torch.ones(40, dtype={dtype})\n"
        "y = functional.aggregate(xs, w, one, one, one, one, training=False)\n"
        "print(y.double().flatten().tolist())"
    )

    def run(name: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "DLA_FAST_CPU_ISA": name},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert run(isa()) == run("avx512")


@pytest.mark.parametrize("name", ["avx512_bf16", "avx512"])
def test_other_products_hold_too(name):
    """Where tiles serve, the vectors of other processors are held to the same tests, and the product without either."""
    if isa() != "amx":
        pytest.skip("nothing lesser here than what the other tests have run")
    passes_with(name, __file__)


def test_other_products_with_tiles_hold_too():
    """The source of the products with AMX, over emulated tiles."""
    passes_with("amx_emulated", __file__, every=7)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("training", [False, True])
def test_an_input_of_no_channels_gives_the_norms_shift(kernel, training):
    x, weight = torch.randn(2, 0, 9, 9).bfloat16(), torch.randn(8, 0, kernel, kernel).bfloat16()
    shift = torch.randn(8)
    with use_backend("cpu"):
        y = functional.conv_norm_act(
            [x], weight, torch.ones(8), shift, torch.zeros(8), torch.ones(8), training=training, act="identity"
        )
    torch.testing.assert_close(y, shift.bfloat16().view(1, 8, 1, 1).expand(2, 8, 9, 9))
