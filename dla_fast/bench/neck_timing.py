"""Necks of others before and after swap_: that both compute the same, and what each takes.

The suite "necks": eager is the neck as it is, ``dla_fast`` the same after ``swap_``, ``dla_fast+frozen`` after
``freeze_`` too, ``dla_fast+low`` after ``swap_(memory="low")``; a training step has the gradients of the levels too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import dla_fast
from dla_fast import backend
from dla_fast.bench import exported, necks, networks, peers
from dla_fast.bench.cases import LAYOUTS, Rates
from dla_fast.bench.network_timing import FLOAT64_TOLERANCE, agreeing, bounds, compare_pass, timed
from dla_fast.bench.timing import Disagreement, Outcome, Settings, complete, one_line

STRIDE = 4  # of the highest level against the image
SIZE = 512


@dataclass(frozen=True)
class Neck:
    """A neck of :data:`dla_fast.bench.necks.NECKS`, rows of its highest level, how many images, and its levels."""

    name: str
    side: int
    batch: int
    channels: tuple[int, ...] = necks.CHANNELS

    @staticmethod
    def of(name: str, size: int | None, batch: int | None) -> Neck:
        """For images of a size, in whole pixels of the coarsest level; of 512, and one of them."""
        coarsest = STRIDE * 2 ** (len(necks.CHANNELS) - 1)
        return Neck(name, max(1, (size or SIZE) // coarsest) * coarsest // STRIDE, batch or 1)

    @property
    def case(self) -> str:
        """The name of its records."""
        return f"neck.{self.name}"

    def levels(self, **kwargs: Any) -> list[Tensor]:
        """Random maps, highest resolution first."""
        sides = [self.side >> i for i in range(len(self.channels))]
        return [torch.randn(self.batch, c, s, s, **kwargs) for c, s in zip(self.channels, sides, strict=True)]


@functools.lru_cache(maxsize=4)
def initial_state(name: str, channels: tuple[int, ...], statistics: bool = True) -> dict[str, Tensor]:
    """Parameters, and statistics with which values stay of ordinary size; the same in every call."""
    torch.manual_seed(0)
    model = necks.make(name, channels)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.momentum = 1.0
    if statistics:
        with torch.no_grad():
            model.train()(Neck(name, 16, 2, channels).levels())
    return model.state_dict()


def implementation(
    neck: Neck, mode: str, impl: str, settings: Settings, rounded: torch.dtype | None = None
) -> tuple[Callable[[], list[Tensor]], str]:
    """One pass of a neck as an implementation runs it, and how much of it is fused.

    Args:
        neck: which, with its levels.
        mode: one of :data:`dla_fast.bench.cases.MODES`.
        impl: ``dla_fast``, ``dla_fast:<backend>``, a variant but swapped, or a peer.
        settings: where, and how.
        rounded: a dtype that has rounded levels, parameters and buffers before.
    """
    device, dtype = settings.device, settings.torch_dtype
    layout = LAYOUTS[networks.layout_of(impl, settings)]
    model, source = necks.make(neck.name, neck.channels), "as it is"
    if impl.startswith(peers.FUSED) or impl == "reference":
        made, count = _swapped(neck.name, neck.channels, "low" if impl == peers.LOW else "default")
        model, source = copy.deepcopy(made), f"{count} units swapped"
    model.load_state_dict(initial_state(neck.name, neck.channels, device.type != "meta"))
    model = model.to(rounded or dtype)
    # The overloads of Module.to leave out a call with all three.
    model = model.to(device=device, dtype=dtype).to(memory_format=layout)  # type: ignore[call-overload]
    networks.ready(model.train(mode != "inference"), impl)
    torch.manual_seed(1)
    levels = [
        x.to(rounded or dtype).to(device=device, dtype=dtype, memory_format=layout).requires_grad_(mode == "training")
        for x in neck.levels()
    ]
    leaves = [*levels, *networks.trained(model)]
    forced = networks.backend_for(impl)
    if not impl.startswith("compile") or device.type == "meta":
        return networks.step(model, levels, mode, leaves, forced), source
    with peers.compiling(impl) as options:
        call = networks.step(torch.compile(model, dynamic=False, **options), levels, mode, leaves, forced)
        call()
    return call, source


@functools.lru_cache(maxsize=2)
def _swapped(name: str, channels: tuple[int, ...], memory: str) -> tuple[nn.Module, int]:
    """A neck after ``swap_``, and how many modules that were; made once, since it proves itself by running.

    Raises:
        RuntimeError: none was.
    """
    model = necks.make(name, channels)
    count = len(dla_fast.swap_(model, memory=memory).swapped)
    if not count:
        raise RuntimeError("swap_ took nothing of it")
    return model, count


def _freezable(neck: Neck) -> str | None:
    """Why there is nothing to freeze in a swapped neck, None where there is."""
    try:
        dla_fast.freeze_(copy.deepcopy(_swapped(neck.name, neck.channels, "default")[0]).eval())
    except ValueError as error:
        return one_line(error)
    return None


def check_float64(neck: Neck, mode: str, impls: list[str], device: torch.device) -> None:
    """Compare what is swapped with the neck as it is in float64, on small levels.

    Raises:
        Disagreement: they differ by more than float64's rounding.
    """
    small = replace(neck, side=16, batch=1)
    settings = Settings(device, dtype="float64")
    exact = implementation(small, mode, "eager", settings)[0]()
    for impl in impls:
        found = implementation(small, mode, impl, settings)[0]()
        apart = (FLOAT64_TOLERANCE, FLOAT64_TOLERANCE)
        compare_pass(f"{neck.case} ({mode}) in float64", impl, found, exact, 1, apart, "eager")


def time_neck(neck: Neck, mode: str, settings: Settings, rates: Rates) -> Outcome:
    """Prove that a neck gives the same before and after ``swap_``, then time it as it is, compiled, and swapped.

    Args:
        neck: which, with its levels.
        mode: one of :data:`dla_fast.bench.cases.MODES`.
        settings: how to time.
        rates: the machine's, for the floor.
    """
    dtype, device = settings.torch_dtype, settings.device
    levels = neck.levels(device="meta")
    values, flops = networks.work_of(necks.make(neck.name, neck.channels).to("meta").eval(), levels, mode == "training")
    common: dict[str, Any] = {
        "suite": "necks",
        "case": neck.case,
        "op": "neck",
        "mode": mode,
        "device": device.type,
        "dtype": settings.dtype,
        "layout": settings.layout,
        "batch": neck.batch,
        "shape": f"{'+'.join(map(str, neck.channels))} @ {neck.side}x{neck.side}",
        "side": neck.side,
        "threads": torch.get_num_threads(),
        "floor_ms": rates.floor_ms(values * dtype.itemsize, flops),
        "bytes": values * dtype.itemsize,
        "flops": flops,
    }
    skipped: list[dict[str, str]] = []
    label = f"{neck.case} ({mode}, batch {neck.batch})"
    torch._dynamo.reset()

    def build(impl: str, **changes: Any) -> tuple[Callable[[], list[Tensor]], str]:
        return implementation(neck, mode, impl, replace(settings, **changes), dtype if changes else None)

    try:
        served = backend.resolve("merge", device.type, dtype)
        wanted = peers.network_implementations(device.type, dtype, settings.peers, mode, settings.variants)
        # swapped is what dla_fast is here; the runtimes outside PyTorch take images.
        wanted = [impl for impl in wanted if impl != peers.SWAPPED and impl not in exported.MODULES]
        reason = _freezable(neck) if peers.FROZEN in wanted else None
        if reason is not None:
            # Of a convolution that no kernel knows nothing is folded.
            wanted.remove(peers.FROZEN)
            skipped.append({"case": neck.case, "mode": mode, "impl": peers.FROZEN, "reason": reason})
        gradients = len(levels) + len(list(necks.make(neck.name, neck.channels).parameters()))
        gradients = gradients if mode == "training" else 0
        apart = bounds(settings, gradients, lambda: build("eager", dtype="float32")[0](), lambda: build("eager")[0]())
        check_float64(neck, mode, [i for i in wanted if i.startswith(peers.FUSED)], device)
        runs, sources = agreeing(neck.case, mode, label, wanted, build, gradients, apart, skipped)
    except (Disagreement, RuntimeError, ValueError) as error:
        impl = error.impl if isinstance(error, Disagreement) else peers.FUSED
        text = str(error) if isinstance(error, Disagreement) else f"{label}: {one_line(error)}"
        return Outcome([complete({**common, "impl": impl, "error": text})], skipped)
    return Outcome(timed(runs, sources, common, served, settings), skipped)
