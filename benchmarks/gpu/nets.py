"""How fast are whole networks? As one CUDA graph and call by call, with the memory of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.case import Case, Found, Setting
from benchmarks.gpu.checks import name_of
from benchmarks.gpu.nodes import MODES, kernels_of, rates
from dla_fast.bench import network_timing, networks, peers, timing
from dla_fast.bench.networks import Network


def _settings(setting: Setting, dtype: torch.dtype, layout: str, against: tuple[str, ...]) -> timing.Settings:
    rounds, seconds = (3, 0.1) if setting.small else (12, 1.2)
    return timing.Settings(
        setting.device, dtype=name_of(dtype), layout=layout, rounds=rounds, peers=against, seconds=seconds
    )


def _ours(network: Network, mode: str, settings: timing.Settings) -> list[str]:
    """dla_fast, and its backends one by one, as they are timed."""
    names = peers.implementations("aggregate", settings.device.type, settings.torch_dtype, (), mode)
    return [impl for impl in names if impl.startswith(peers.FUSED)]


def _timed(network: Network, mode: str, settings: timing.Settings, setting: Setting) -> Found:
    if setting.is_drawn:
        # Peers launch nothing of ours, and take most of the time.
        state = networks.initial_state(network.name, statistics=False)
        for impl in _ours(network, mode, settings):
            networks.implementation(network, mode, impl, state, settings)[0]()
        return []
    outcome = network_timing.time_network(network, mode, settings, rates(settings.torch_dtype, setting), float64=False)
    return [*outcome.records, *({"skipped": s["impl"], **s} for s in outcome.skipped)]


def _step_table(network: Network, impl: str, label: str, setting: Setting) -> Found:
    """The longest kernels of one training step."""
    if setting.is_drawn and not impl.startswith(peers.FUSED):
        return []
    settings = _settings(setting, setting.dtype, "channels_last", ())
    state = networks.initial_state(network.name, not setting.is_drawn)
    call, _ = networks.implementation(network, "training", impl, state, settings)
    rows = kernels_of(call, setting, repeats=2)
    total = sum(row["us"] for row in rows)
    return [{"table": label, "rows": rows[:60], "us": total}]


def _work(setting: Setting) -> Iterator[tuple[Network, str, torch.dtype, str, tuple[str, ...], float]]:
    """Network, mode, dtype, layout, peers and the seconds that it takes."""
    if setting.small:
        for mode in MODES:
            yield Network("dla46_c", 64, 2), mode, setting.dtype, "channels_last", ("eager",), 5.0
        return
    both = ("eager", "compile")
    for mode in MODES:
        yield Network("dla34", 224, 256), mode, torch.bfloat16, "channels_last", both, 11.0
        yield Network("dla34up", 512, 16), mode, torch.bfloat16, "channels_last", both, 13.0
    one = (*both, "compile_reduce_overhead")
    yield Network("dla34", 224, 1), "inference", torch.bfloat16, "channels_last", one, 11.0
    for mode in MODES:
        yield Network("dla34", 224, 32), mode, torch.float32, "contiguous", both, 10.0


def nets(setting: Setting) -> Iterator[Case]:
    """Block "networks"."""
    for network, mode, dtype, layout, against, seconds in _work(setting):
        label = f"{network.name} {mode} batch {network.batch} {network.size}x{network.size} {name_of(dtype)} {layout}"
        settings = _settings(setting, dtype, layout, against)

        def run(a: Any = (network, mode, settings, setting)) -> Found:
            return _timed(*a)

        def prepare(a: Any = (network, mode, settings)) -> None:
            network, mode, settings = a
            state = networks.initial_state(network.name)
            for impl in settings.peers:
                if impl.startswith("compile"):
                    networks.implementation(network, mode, impl, state, settings)[0]()

        compiled = any(impl.startswith("compile") for impl in against)
        yield Case(label, run, seconds, prepare if compiled else None)
    network = Network("dla46_c", 64, 2) if setting.small else Network("dla34", 224, 256)
    for impl in (peers.FUSED, "eager"):
        label = f"kernels of a training step: {impl}, {network.name}, batch {network.batch}"
        yield Case(label, lambda a=(network, impl, label, setting): _step_table(*a), 4.0)
