"""Whole networks: that the implementations agree, and what each takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dla_fast import backend, models
from dla_fast.bench import exported, peers, timing
from dla_fast.bench.cases import Rates
from dla_fast.bench.networks import (
    Network,
    backend_for,
    implementation,
    initial_state,
    layout_of,
    make,
    ready,
    step,
    trained,
    work,
)
from dla_fast.bench.timing import Disagreement, Outcome, Settings, complete, one_line
from dla_fast.ops.precision import fp32_precision, tf32_products

# Gradients of a network in working precision: where a ReLU's input lies within rounding of zero, two right networks
# send them different ways, so they are compared as a whole, and once more in float64 on small images.
GRADIENT_TOLERANCE = 0.2
FLOAT64_TOLERANCE = 1e-6


def norm_difference(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The difference of two lists of tensors as one vector, over the second's norm."""
    a, b = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (mine, theirs))
    return ((a - b).norm() / b.norm()).item()


def compare_pass(
    label: str,
    impl: str,
    found: list[Tensor],
    expected: list[Tensor],
    outputs: int,
    bounds: tuple[float, float],
    beside: str = peers.FUSED,
) -> None:
    """What ``impl`` gives beside what another does: so many outputs each, then the gradients as one vector."""
    pair = f"{label}: {beside} and {impl} differ"
    for i in range(outputs):
        error = timing.difference(expected[i], found[i])
        if not error <= bounds[0]:
            raise Disagreement(impl, f"{pair} in output {i} by {error:.1e} of the largest")
    if len(found) > outputs:
        error = norm_difference(expected[outputs:], found[outputs:])
        if not error <= bounds[1]:
            raise Disagreement(impl, f"{pair} in the gradient by {error:.1e} of its norm")


def check_float64(
    name: str, mode: str, state: dict[str, Tensor], label: str, device: torch.device, variants: Sequence[str] = ()
) -> None:
    """Compare outputs, and in training gradients, with eager PyTorch in float64, on two small images.

    Args:
        name: the network's.
        mode: one of :data:`dla_fast.bench.cases.MODES`.
        state: its parameters and buffers.
        label: what is compared, for the message.
        device: where.
        variants: of :data:`dla_fast.bench.peers.VARIANTS`, to compare beside dla_fast.

    Raises:
        Disagreement: they differ by more than float64's rounding.
    """
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, device=device)
    bounds = (FLOAT64_TOLERANCE, FLOAT64_TOLERANCE)
    exact: list[Tensor] = []
    for impl in ("eager", peers.FUSED, *variants):
        model = make(name, impl, state)[0].to(device, torch.float64).train(mode != "inference")
        parameters = trained(model)
        found = step(ready(model, impl), images, mode, parameters, backend_for(impl))()
        count = len(found) - (len(parameters) if mode == "training" else 0)
        if impl == "eager":
            exact = found
        else:
            compare_pass(f"{label} in float64", impl, found, exact, count, bounds, "eager")


def bounds(
    settings: Settings, gradients: int, exact: Callable[[], list[Tensor]], eager: Callable[[], list[Tensor]]
) -> tuple[float, float]:
    """How far outputs, and the gradient as a whole, may lie apart.

    In half precision no fixed bound says anything: rounding grows through the layers, and kinks send gradients
    elsewhere. There an implementation may err against float32 twice as much as eager does, and so two of them may lie
    three times that error apart. TF32 is half precision too: its products round to as many bits as float16 has.

    Args:
        settings: where, and in which dtype.
        gradients: how many of the tensors of a pass are gradients, the last ones.
        exact: a pass of eager in float32, from values that the dtype has rounded; called where it is needed.
        eager: one in the dtype itself.
    """
    dtype = settings.torch_dtype
    in_tf32 = dtype == torch.float32 and settings.device.type == "cuda" and tf32_products()
    if dtype not in (torch.float16, torch.bfloat16) and not in_tf32:
        return 10 * timing.tolerance(dtype, settings.device), GRADIENT_TOLERANCE
    with fp32_precision("ieee"):
        wanted = exact()
    found = eager()
    count = len(wanted) - gradients
    outputs = max(timing.difference(a, b) for a, b in zip(found[:count], wanted[:count], strict=True))
    gradient = norm_difference(found[count:], wanted[count:]) if gradients else 0.0
    return 3 * outputs + timing.tolerance(dtype, settings.device) / 10, 3 * gradient


def agreeing(
    name: str,
    mode: str,
    label: str,
    wanted: Sequence[str],
    build: Callable[[str], tuple[Callable[[], Any], str]],
    gradients: int,
    apart: tuple[float, float],
    skipped: list[dict[str, str]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those of the implementations that can run, once they have been found to agree.

    Args:
        name: of the case.
        mode: one of :data:`dla_fast.bench.cases.MODES`.
        label: what is compared, for the message.
        wanted: the implementations.
        build: one pass of an implementation, and where its network comes from.
        gradients: how many of a pass's tensors are gradients, the last ones.
        apart: how far outputs, and the gradient, may lie apart (:func:`bounds`).
        skipped: takes the peers that cannot run, with the reason.

    Raises:
        Disagreement: a peer and dla_fast differ, or there is no peer to compare with.
    """
    runs: dict[str, Callable[[], Any]] = {}
    sources: dict[str, str] = {}
    mine: list[Tensor] = []
    agreed = 0
    # Eager is asked even where it is not timed: without a peer that agrees there is no figure.
    for impl in [*wanted, *({"eager"} - set(wanted))]:
        try:
            call, source = build(impl)
            tensors = [t.detach().clone() for t in call()]
        except Exception as error:
            if impl.startswith(peers.FUSED):
                raise Disagreement(impl, f"{label}: {impl} raised {one_line(error)}") from error
            reason = str(error) if isinstance(error, exported.Absent) else one_line(error)
            skipped.append({"case": name, "mode": mode, "impl": impl, "reason": reason})
            continue
        if impl == peers.FUSED:
            mine = tensors
        else:
            compare_pass(label, impl, tensors, mine, len(mine) - gradients, apart)
            agreed += not impl.startswith(peers.FUSED)
        if impl in wanted:
            runs[impl], sources[impl] = call, source
    if not agreed:
        raise Disagreement(peers.FUSED, f"{label}: no peer could run, so nothing proves dla_fast right")
    return runs, sources


def prove(
    network: Network,
    mode: str,
    settings: Settings,
    skipped: list[dict[str, str]],
    float64: bool = True,
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The implementations of a network, once they have been found to agree.

    Args:
        network: which, with its images.
        mode: one of :data:`dla_fast.bench.cases.MODES`.
        settings: where, and with whom.
        skipped: takes the peers that cannot run, with the reason.
        float64: also compare with eager in float64 (:func:`check_float64`).

    Returns:
        One pass by implementation, and where each network comes from.

    Raises:
        Disagreement: a peer and dla_fast differ, or there is no peer to compare with.
    """
    dtype, device = settings.torch_dtype, settings.device
    label = f"{network.name} ({mode}, batch {network.batch})"
    torch._dynamo.reset()
    state = initial_state(network.name, device.type != "meta")
    wanted = peers.network_implementations(device.type, dtype, settings.peers, mode, settings.variants)
    gradients = len(trained(models.create_model(network.name, device="meta"))) if mode == "training" else 0
    # The same values in float32: those that half precision has rounded already.
    rounded = {name: t.to(dtype).float() if t.is_floating_point() else t for name, t in state.items()}

    def build(impl: str) -> tuple[Callable[[], Any], str]:
        return implementation(network, mode, impl, state, settings)

    apart = bounds(
        settings,
        gradients,
        lambda: implementation(network, mode, "eager", rounded, replace(settings, dtype="float32"), dtype)[0](),
        lambda: build("eager")[0](),
    )
    if float64:
        variants = [impl for impl in wanted if impl in peers.VARIANTS]
        check_float64(network.name, mode, state, label, device, variants)
    return agreeing(network.name, mode, label, wanted, build, gradients, apart, skipped)


def time_network(
    network: Network,
    mode: str,
    settings: Settings,
    rates: Rates,
    float64: bool = True,
) -> Outcome:
    """Prove that the implementations of a network agree, then time them.

    On a GPU each is timed as a CUDA graph, which leaves the host's part out, and once more call by call
    (``plain_ms``); what cannot be captured, or makes graphs of its own, has its calls' time for both.

    Args:
        network: which, with its images.
        mode: one of :data:`dla_fast.bench.cases.MODES`.
        settings: how to time.
        rates: the machine's, for the floor.
        float64: see :func:`prove`.
    """
    dtype, device = settings.torch_dtype, settings.device
    values, flops = work(network, training=mode == "training")
    common: dict[str, Any] = {
        "suite": "models",
        "case": network.name,
        "op": "model",
        "mode": mode,
        "device": device.type,
        "dtype": settings.dtype,
        "layout": settings.layout,
        "batch": network.batch,
        "shape": f"3 @ {network.size}x{network.size}",
        "side": network.size,
        "threads": torch.get_num_threads(),
        "floor_ms": rates.floor_ms(values * dtype.itemsize, flops),
        "bytes": values * dtype.itemsize,
        "flops": flops,
    }
    skipped: list[dict[str, str]] = []
    try:
        served = backend.resolve("aggregate", device.type, dtype)
        runs, sources = prove(network, mode, settings, skipped, float64)
    except (Disagreement, RuntimeError) as error:
        if isinstance(error, Disagreement):
            failed = {"impl": error.impl, "error": str(error)}
        else:
            failed = {"impl": peers.FUSED, "error": f"{network.name} ({mode}): {one_line(error)}"}
        return Outcome([complete({**common, **failed})], skipped)
    return Outcome(timed(runs, sources, common, served, settings), skipped)


def timed(
    runs: dict[str, Callable[[], Any]],
    sources: dict[str, str],
    common: dict[str, Any],
    served: str,
    settings: Settings,
) -> list[dict[str, Any]]:
    """Time what :func:`agreeing` gives, in turn; a record each.

    Args:
        runs: one pass by implementation.
        sources: where each network comes from.
        common: what the records have in common.
        served: the backend that serves this package's, where none is forced.
        settings: how to time.
    """
    device = settings.device
    # Between runtimes whose threads are not the same.
    pause_s = exported.PAUSE_S if any(impl in exported.MODULES for impl in runs) else 0.0
    figures = timing.time_runners(runs, settings, graphs=False, pause_s=pause_s)
    graphed = _graphs(runs, device) if device.type == "cuda" else {}
    if graphed:
        # What has no graph takes part as it is, so that all are timed in turn.
        again = timing.time_runners({**runs, **graphed}, settings, graphs=True)
        for impl, figure in figures.items():
            figure |= {"plain_ms": figure["median_ms"]} | (again[impl] if impl in graphed else {})
    records = []
    for impl, figure in figures.items():
        record = {**common, "impl": impl, "network": sources[impl], **figure}
        record["layout"] = layout_of(impl, settings)
        if impl.startswith(peers.FUSED):
            record["backend"] = impl.partition(":")[2] or served
        if device.type == "cuda":
            record["host_ms"] = timing.host_ms(runs[impl], device, calls=5)
            record["peak_bytes"] = timing.peak(runs[impl], device)
        records.append(complete(record))
    return records


def _graphs(runs: dict[str, Callable[[], Any]], device: torch.device) -> dict[str, Callable[[], object]]:
    """The implementations as CUDA graphs, where they can be captured; one memory for all, since they take turns."""
    torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle()
    made = {i: timing.graph_of([call], device, pool) for i, call in runs.items() if i not in peers.SELF_GRAPHED}
    return {impl: graph for impl, graph in made.items() if graph is not None}
