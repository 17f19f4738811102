"""Kernels beside the library, where either can serve: what ``dla_fast.kernels.library`` chooses by is measured here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Found, Setting, measured, passed
from benchmarks.gpu.checks import name_of, served
from benchmarks.gpu.nodes import rates
from dla_fast import ops
from dla_fast.bench import timing
from dla_fast.proof import measure

WAYS = ("kernels", "library")
# Channels of the inputs, of the output, side, batches: roots of dla34, and 3 x 3 nodes of its ladder at 512 x 512.
ROOTS = (((64, 64), 64, 56), ((128, 128), 128, 28), ((128, 128, 64, 128), 128, 28), ((512, 512, 256), 512, 7))
LADDER = ((64, 128), (128, 64), (256, 32))


@contextlib.contextmanager
def _by(way: str, setting: Setting) -> Iterator[None]:
    from dla_fast.kernels import config, library

    before = library.ARCHITECTURES, library.WIDE, library.CONVOLVED
    arch = config.arch_of(setting.device)
    library.ARCHITECTURES = (arch,) if way == "library" else ()
    library.WIDE, library.CONVOLVED = 0, range(0)
    # Plans were made with the other choice.
    config.install({})
    try:
        yield
    finally:
        library.ARCHITECTURES, library.WIDE, library.CONVOLVED = before
        config.install({})


def _compared(call: Callable[[], list[Tensor]], label: str, moved: int, setting: Setting) -> Found:
    """Both ways in turn, each as a share of what a copy of the values that have to be moved would take."""
    if "triton" not in served("conv_norm_act", setting, setting.dtype):
        return passed(label, True, f"not run: Triton does not serve {setting.device.type}")
    speed = rates(setting.dtype, setting).bytes_per_s
    calls, results = {}, {}
    for way in WAYS:
        with _by(way, setting):
            results[way] = [t.double() for t in call()]
            graph = timing.graph_of([call], setting.device) if setting.on_gpu else None
        calls[way] = graph or call
    if setting.is_drawn:
        return []
    pairs = zip(*results.values(), strict=True)
    error = max(timing.difference(a, b) for a, b in pairs)
    found = passed(
        f"{label}: both ways agree", error <= timing.tolerance(setting.dtype, setting.device), f"{error:.1e}"
    )
    timings = measure.interleave(calls, rounds=3 if setting.small else 15, device=setting.device)
    floor = moved * setting.dtype.itemsize / speed
    for way in WAYS:
        seconds = timings[way].median_ms / 1e3
        found += measured(f"{label}: {way}", floor / seconds, "of the floor", op="way", way=way, us=1e6 * seconds)
    return found


def _map(channels: int, side: int, batch: int, setting: Setting) -> Tensor:
    t = torch.randn(batch, channels, side, side, device=setting.device, dtype=setting.dtype)
    return t.to(memory_format=torch.channels_last)


def _backward(channels: tuple[int, ...], outputs: int, side: int, batch: int, label: str, setting: Setting) -> Found:
    torch.manual_seed(0)
    xs, (z, dy) = [_map(c, side, batch, setting) for c in channels], (_map(outputs, side, batch, setting),) * 2
    weight = torch.randn(outputs, sum(channels), 1, 1, device=setting.device, dtype=setting.dtype)
    v, pixels = torch.rand(outputs, device=setting.device) + 0.5, batch * side * side
    node = (dy, xs, [], weight, None, z, v, v, v, v, v, v, [1] * len(xs), 1, 1, 1, -1, pixels, 1e-5, "relu", 0.0)

    def call() -> list[Tensor]:
        dxs, _, dw, *_ = ops.namespace("triton").conv_norm_act_backward(*node, [True] * len(xs), [], True, False)
        return [*dxs, dw]

    return _compared(call, label, pixels * 2 * (outputs + sum(channels)), setting)


def _inference(channels: int, side: int, batch: int, label: str, setting: Setting) -> Found:
    torch.manual_seed(0)
    xs = [_map(channels, side, batch, setting), _map(channels, side // 2, batch, setting)]
    up = torch.randn(channels, 1, 4, 4, device=setting.device, dtype=setting.dtype)
    weight = _map(2 * channels, 3, channels, setting)
    v = torch.rand(channels, device=setting.device) + 0.5
    node = (xs, [up], weight, None, None, v, v, v, v, [1, 2], 1, 1, 1, -1, 1e-5, "relu", 0.0)
    moved = sum(x.numel() for x in xs) + xs[0].numel()
    return _compared(lambda: [ops.namespace("triton").conv_norm_act_inference(*node)], label, moved, setting)


def ways(setting: Setting) -> Iterator[Case]:
    """Block "ways"."""
    dtype = name_of(setting.dtype)
    for channels, outputs, full in ROOTS[: 1 if setting.small else None]:
        side = 8 if setting.small else full
        for batch in (2,) if setting.small else (256, 32, 4, 1):
            label = f"backward {'+'.join(map(str, channels))}->{outputs} {side}x{side} batch {batch} {dtype}"
            yield Case(label, lambda a=(channels, outputs, side, batch, label, setting): _backward(*a))
    for channels, full in LADDER[: 1 if setting.small else None]:
        side = 8 if setting.small else full
        for batch in (1,) if setting.small else (16, 1):
            label = f"inference 3x3 {channels}+{channels}->{channels} {side}x{side} batch {batch} {dtype}"
            yield Case(label, lambda a=(channels, side, batch, label, setting): _inference(*a))
