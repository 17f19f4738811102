"""Sections of benchmarks.gpu for kernels alone, backend beside backend: bandwidth, latency, the sanitizer's runs."""

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

from dla_fast import backend, ops, reference
from dla_fast.commands import measure, parity
from dla_fast.commands.bench import cases, timing

Run = Callable[[], list[dict[str, Any]]]
# What memory-bound kernels are measured on: far past any cache.
WORKING_SET = 256 * 2**20
TOOLS = ("memcheck", "racecheck", "initcheck")
_LAYOUTS = tuple(parity.LAYOUTS)


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
            lambda: operators.tail_backward_apply(dy, z, v, v, v, v, None, v, v, 1e6, 1e-5, "relu", 0.0, False),
            3 * one,
        ),
        "upsample": (lambda: operators.upsample(small, weight, factor), quarter + one),
        "upsample_add": (lambda: operators.upsample_add(small, z, weight, factor), quarter + 2 * one),
        "upsample_backward": (
            lambda: operators.upsample_backward(dy, small, weight, factor, True, True),
            2 * quarter + one,
        ),
    }


def bandwidth(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    """Bytes per second of every memory-bound kernel, against those of a copy."""
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float32)
    served = [b for b in ops.NAMESPACES if backend.can_run(b, "upsample", device.type, torch.float32) is None]

    def compare(dtype: torch.dtype, layout: str) -> list[dict[str, Any]]:
        rates = cases.measure_rates(dtype, device)
        values = (2**20 if small else WORKING_SET) // dtype.itemsize
        found = []
        calls = {b: _calls(ops.namespace(b), dtype, layout, device, values) for b in served}
        for op in calls[served[0]] if served else ():
            alike = {b: calls[b][op][0] for b in served}
            timings = measure.interleave(alike, rounds=3 if small else 15, device=device)
            for name in served:
                share = calls[name][op][1] / (rates.bytes_per_s * timings[name].median_ms / 1e3)
                label = f"{op} {name} {str(dtype).removeprefix('torch.')} {layout}"
                # The goal is the CUDA kernels'; a CPU's caches and threads make other figures.
                ok = device.type == "cpu" or name != "cuda" or share >= 0.85
                found.append({"check": label, "ok": ok, "detail": f"{share:.0%} of copy", "of_copy": share})
        return found

    for dtype, layout in itertools.product(dtypes, _LAYOUTS):
        label = f"bandwidth {str(dtype).removeprefix('torch.')} {layout}"
        yield label, lambda a=(dtype, layout): compare(*a)


def latency(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    """Time of an inference node of one image as a graph replays it, against that of an almost empty kernel."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    names = [b for b in ops.NAMESPACES if backend.can_run(b, "aggregate_inference", device.type, dtype) is None]

    def replayed(call: Callable[[], object]) -> Callable[[], object]:
        calls = [call] * (20 if device.type == "cuda" else 1)
        return (timing.graph_of(calls, device) if device.type == "cuda" else None) or call

    def compare(channels: int, outputs: int, side: int, label: str) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        xs = [
            torch.randn(1, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            for _ in range(2)
        ]
        weight = torch.randn(outputs, 2 * channels, 1, 1, device=device, dtype=dtype)
        v = torch.rand(outputs, device=device) + 0.5
        empty = torch.zeros(1, device=device)
        runners: dict[str, Callable[[], object]] = {"empty": replayed(lambda: empty.add_(1))}
        for name in names:
            operators = ops.namespace(name)
            runners[name] = replayed(
                lambda o=operators: o.aggregate_inference(xs, weight, None, v, v, v, v, 1e-5, False, "relu", 0.0)
            )
        timings = measure.interleave(runners, rounds=3 if small else 25, device=device)
        node = (weight, v, v, v, v)
        exact = reference.aggregate([x.double() for x in xs], *[t.double() for t in node], training=False)
        found = []
        for name in names:
            ratio = timings[name].median_ms / timings["empty"].median_ms
            y = ops.namespace(name).aggregate_inference(xs, weight, None, *node[1:], 1e-5, False, "relu", 0.0)
            error, bound = timing.difference(y.double(), exact), timing.tolerance(dtype, device)
            ok = (device.type == "cpu" or name != "cuda" or ratio <= 1.3) and error <= bound
            detail = f"{ratio:.2f}x an empty kernel, 1.3x is the goal; error {error:.1e}, {bound:.0e} is allowed"
            found.append({"check": f"{label} {name}", "ok": ok, "detail": detail, "over_empty": ratio})
        return found

    for channels, outputs, side in ((64, 64, 56), (128, 128, 28), (256, 256, 14), (512, 512, 7)):
        label = f"latency {channels}+{channels}->{outputs} {side}x{side}"
        yield label, lambda a=(channels, outputs, side, label): compare(*a)


# What runs under the sanitizer: each CUDA kernel once, on sizes that fit its vectors and on sizes that do not.
SANITIZED = """
import torch
from dla_fast import functional, use_backend
from dla_fast.commands import parity
from dla_fast.commands.parity import Spec
device = torch.device("cuda")
norms = [torch.rand(24, device=device) + 0.5 for _ in range(4)]
with use_backend("cuda"):
    for op in ("batch_norm_act", "upsample", "upsample_add"):
        for layout in parity.LAYOUTS:
            for channels, factor in ((24, 2), (24, 4), (24, 8), (5, 2), (5, 3)):
                for dtype in (torch.float32, torch.bfloat16):
                    spec = Spec(dtype, layout, out_channels=channels, height=4, width=8, factor=factor, residual=True)
                    problem = parity.PROBLEMS[op](spec)
                    parity.execute(problem, functional, parity.safe_gradient(problem, device), None)
    with torch.no_grad():
        for layout in parity.LAYOUTS.values():
            for channels in (24, 5):
                xs = [torch.randn(1, channels, 6, 6, device=device).bfloat16().to(memory_format=layout)] * 2
                weight = torch.randn(24, 2 * channels, 1, 1, device=device).bfloat16()
                functional.aggregate(xs, weight, *norms, training=False)
torch.cuda.synchronize()
"""


def sanitizer(device: torch.device, small: bool) -> Iterator[tuple[str, Run]]:
    """compute-sanitizer's tools over the CUDA kernels."""

    def run(tool: str) -> list[dict[str, Any]]:
        label = f"compute-sanitizer {tool}"
        reason = backend.can_run("cuda", "upsample", device.type, torch.float32)
        program = shutil.which("compute-sanitizer")
        if reason is not None or program is None:
            return [{"check": label, "ok": True, "detail": f"not run: {reason or 'compute-sanitizer was not found'}"}]
        # Memory from the caching allocator would hide where a tensor ends.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [program, "--tool", tool, "--error-exitcode", "9"]
        done = subprocess.run(
            [*command, sys.executable, "-c", SANITIZED], env=environment, capture_output=True, text=True, check=False
        )
        tail = " ".join((done.stdout + done.stderr).split())[-200:]
        return [{"check": label, "ok": done.returncode == 0, "detail": tail}]

    for tool in TOOLS:
        yield f"compute-sanitizer {tool}", lambda tool=tool: run(tool)
