"""Kernels alone, backend beside backend: bandwidth, latency, what a call costs the host, the sanitizer's runs."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Found, Setting, measured, passed
from benchmarks.gpu.checks import name_of, served
from benchmarks.gpu.nodes import rates
from dla_fast import backend, functional, nn, ops, reference
from dla_fast.bench import timing
from dla_fast.proof import measure, parity
from dla_fast.proof.parity import Spec

# What memory-bound kernels are measured on: far past any cache.
WORKING_SET = 256 * 2**20
TOOLS = ("memcheck", "racecheck", "initcheck")


def _calls(
    operators: Any, dtype: torch.dtype, layout: str, device: torch.device, values: int
) -> dict[str, tuple[Callable[[], object], int]]:
    """Every memory-bound operator of a namespace and the bytes it has to move; maps of about ``values`` values."""
    channels, side, factor = 64, 32, 2
    batch = max(1, values // (channels * side * side))
    form = parity.LAYOUTS[layout]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).to(memory_format=form)

    z, dy = draw(batch, channels, side, side), draw(batch, channels, side, side)
    v = torch.rand(channels, device=device) + 0.5
    norm = (v, v, v, v, None, 1e-5, "relu", 0.0)
    small = draw(batch, channels, side // factor, side // factor)
    weight = torch.randn(channels, 1, 2 * factor, 2 * factor, device=device, dtype=dtype)
    one, quarter = z.numel() * z.itemsize, small.numel() * z.itemsize
    return {
        "moments": (lambda: operators.moments(z, None, None, 0.1), one),
        "tail": (lambda: operators.tail(z, *norm), 2 * one),
        "tail_backward_reduce": (lambda: operators.tail_backward_reduce(dy, z, *norm), 2 * one),
        "tail_backward_apply": (
            lambda: operators.tail_backward_apply(dy, z, v, v, v, v, None, v, v, 1_000_000, 1e-5, "relu", 0.0, False),
            3 * one,
        ),
        "upsample": (lambda: operators.upsample(small, weight, factor), quarter + one),
        "upsample_add": (lambda: operators.upsample_add(small, z, weight, factor), quarter + 2 * one),
        "upsample_backward": (
            lambda: operators.upsample_backward(dy, small, weight, factor, True, True),
            2 * quarter + one,
        ),
    }


def _compared(dtype: torch.dtype, layout: str, setting: Setting) -> Found:
    """Bytes per second of every memory-bound kernel, as a share of a copy's."""
    values = (2**20 if setting.small else WORKING_SET) // dtype.itemsize
    backends = served("upsample", setting, torch.float32)
    calls = {b: _calls(ops.namespace(b), dtype, layout, setting.device, values) for b in backends}
    found: Found = []
    for op in calls[backends[0]] if backends else ():
        alike = {b: calls[b][op][0] for b in backends}
        timings = measure.interleave(alike, rounds=3 if setting.small else 9, device=setting.device)
        for name in backends:
            seconds = timings[name].median_ms / 1e3
            share = calls[name][op][1] / (rates(dtype, setting).bytes_per_s * seconds)
            label = f"{op} {name} {name_of(dtype)} {layout}"
            found += measured(label, share, "of copy", op=op, backend=name, us=1e6 * seconds)
    return found


def bandwidth(setting: Setting) -> Iterator[Case]:
    """Block "bandwidth"."""
    dtypes = (torch.float32,) if setting.device.type == "cpu" else (torch.bfloat16, torch.float32)
    for dtype, layout in itertools.product(dtypes, parity.LAYOUTS):
        yield Case(f"bandwidth {name_of(dtype)} {layout}", lambda a=(dtype, layout, setting): _compared(*a), 3.0)


def _latency(channels: int, outputs: int, side: int, label: str, setting: Setting) -> Found:
    """An inference node of one image as a graph replays it, beside an almost empty kernel."""
    device, dtype = setting.device, setting.dtype
    torch.manual_seed(0)
    xs = [
        torch.randn(1, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        for _ in range(2)
    ]
    weight = torch.randn(outputs, 2 * channels, 1, 1, device=device, dtype=dtype)
    v = torch.rand(outputs, device=device) + 0.5
    empty = torch.zeros(1, device=device)
    names = served("aggregate_inference", setting, dtype)

    def replayed(call: Callable[[], object]) -> Callable[[], object]:
        return (timing.graph_of([call] * 20, device) if setting.on_gpu else None) or call

    def infer(name: str) -> Tensor:
        node = (xs, [], weight, None, None, v, v, v, v)
        y: Tensor = ops.namespace(name).conv_norm_act_inference(*node, [1, 1], 1, 1, 1, -1, 1e-5, "relu", 0.0)
        return y

    runners = {"empty": replayed(lambda: empty.add_(1))}
    runners |= {name: replayed(lambda name=name: infer(name)) for name in names}
    timings = measure.interleave(runners, rounds=3 if setting.small else 15, device=device)
    node = (weight, v, v, v, v)
    exact = reference.aggregate([x.double() for x in xs], *[t.double() for t in node], training=False)
    found: Found = []
    for name in names:
        error, bound = timing.difference(infer(name).double(), exact), timing.tolerance(dtype, device)
        found += passed(f"{label} {name}", error <= bound, f"error {error:.1e}, {bound:.0e} is allowed")
        ratio = timings[name].median_ms / timings["empty"].median_ms
        found += measured(f"{label} {name}", ratio, "x an empty kernel", op="latency", backend=name)
    return found


def latency(setting: Setting) -> Iterator[Case]:
    """Nodes of one image."""
    for channels, outputs, side in ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)):
        label = f"latency {channels}+{channels}->{outputs} {side}x{side}"
        yield Case(label, lambda a=(channels, outputs, side, label, setting): _latency(*a))


def _host_cost(training: bool, label: str, setting: Setting) -> Found:
    torch.manual_seed(0)
    node = nn.AggregationNode([64, 64], 64, residual=True).to(device=setting.device, dtype=setting.dtype)
    node = node.to(memory_format=torch.channels_last).train(training)  # type: ignore[call-overload]
    xs = [torch.randn(2, 64, 28, 28, device=setting.device, dtype=setting.dtype) for _ in range(2)]
    xs = [x.to(memory_format=torch.channels_last).requires_grad_(training) for x in xs]
    grad, parameters = torch.ones_like(node(*xs)), [*xs, *node.parameters()]

    def call() -> object:
        if training:
            return torch.autograd.grad(node(*xs), parameters, grad)
        with torch.no_grad():
            return node(*xs)

    repeats = 1 if setting.is_drawn else 20 if setting.small else 200
    for _ in range(min(repeats, 5)):
        call()
    return measured(label, 1e3 * timing.host_ms(call, setting.device, repeats), "us", op="host")


def host_cost(setting: Setting) -> Iterator[Case]:
    """What a call costs the host."""
    for training in (False, True):
        label = f"host cost of a {'training' if training else 'inference'} node"
        yield Case(label, lambda a=(training, label, setting): _host_cost(*a))


def exercise(device: torch.device | str) -> None:
    """Every kernel of every backend once, on sizes that fit its vectors and on sizes that do not: for the sanitizer."""
    setting = Setting(torch.device(device), small=True)
    half = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    for op in backend.OPS:
        for name, layout in itertools.product(served(op, setting, half), parity.LAYOUTS):
            for channels, factor in ((24, 2), (5, 3)) if op in ("aggregate", "merge") else ((24, 2), (24, 8), (5, 3)):
                for dtype in dict.fromkeys((torch.float32, half)):
                    spec = Spec(
                        dtype, layout, (channels, channels), channels, 2, 4, 8, residual=op != "merge", factor=factor
                    )
                    problem = parity.PROBLEMS[op](spec, setting.device)
                    with backend.use_backend(name):
                        parity.execute(problem, functional, parity.safe_gradient(problem, setting.device), None)
                        parity.infer(problem, functional, None, setting.device)
    measure.synchronize(setting.device)


def _sanitized(tool: str, label: str, seconds: float, setting: Setting) -> Found:
    program = shutil.which("compute-sanitizer")
    if not setting.on_gpu:
        exercise(setting.device)
        return passed(label, True, f"run without the sanitizer: the device is {setting.device.type}")
    if program is None:
        return passed(label, True, "not run: compute-sanitizer was not found")
    # Memory from the caching allocator would hide where a tensor ends.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = "from benchmarks.gpu.kernels import exercise; exercise('cuda')"
    done = subprocess.run(
        [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, check=False, timeout=seconds,
    )  # fmt: skip
    return passed(label, done.returncode == 0, " ".join((done.stdout + done.stderr).split())[-300:])


def sanitizer(setting: Setting) -> Iterator[Case]:
    """compute-sanitizer's tools over all kernels; the case's own limit ends one that takes too long."""
    for tool in TOOLS[: 1 if setting.small or setting.is_drawn else None]:
        label = f"compute-sanitizer {tool}"
        yield Case(label, lambda a=(tool, label, 90.0, setting): _sanitized(*a), 30.0)
