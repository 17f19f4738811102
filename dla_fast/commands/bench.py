"""``python -m dla_fast bench``: aggregation nodes alone, interleaved with their peers, beside the floor.

The cases are the aggregation nodes (roots) of real networks, with the shapes they have inside them. Every case first
proves that the peers agree; then all of them are timed in turn within one run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast import backend, models
from dla_fast._version import __version__
from dla_fast.commands import measure
from dla_fast.nn import AggregationNode

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MODES = ("inference", "training")
PEERS = ("eager", "compile")


@dataclass(frozen=True)
class Case:
    """One node: where it stands, and its shapes at batch 1."""

    name: str
    in_channels: tuple[int, ...]
    out_channels: int
    height: int
    width: int
    residual: bool

    def floor_ms(self, mode: str, batch: int, itemsize: int, rates: Rates) -> float:
        """The least time the machine could take: max of traffic over copy bandwidth and flops over matmul rate.

        Values moved per pixel, with K input and N output channels: inference K + N; training K + N, 2N for the
        tail, 2N + 2N + 2K backward; a residual is read once more in the tail and costs 2N in the backward.
        """
        k, n = sum(self.in_channels), self.out_channels
        pixels = batch * self.height * self.width
        if mode == "inference":
            values, flops = k + n + (n if self.residual else 0), 2 * k * n
        else:
            values, flops = 3 * k + 7 * n + (3 * n if self.residual else 0), 6 * k * n
        return 1e3 * max(pixels * values * itemsize / rates.bytes_per_s, pixels * flops / rates.flops_per_s)


@dataclass(frozen=True)
class Rates:
    """What the machine does at best, measured in the same run."""

    bytes_per_s: float
    flops_per_s: float

    def describe(self) -> str:
        """The rates in words."""
        gigabytes, gigaflops = self.bytes_per_s / 1e9, self.flops_per_s / 1e9
        return f"floor from {gigabytes:.1f} GB/s copied and {gigaflops:.0f} GFLOP/s of the library's best product"


class EagerNode(nn.Module):
    """The node op by op, as networks write it: concat, convolution, norm, in-place residual and activation."""

    def __init__(self, node: AggregationNode) -> None:
        super().__init__()
        self.conv, self.bn, self.residual = node.conv, node.bn, node.residual
        self.relu = nn.ReLU(inplace=True)

    def forward(self, *xs: Tensor) -> Tensor:
        x = self.bn(self.conv(torch.cat(xs, 1)))
        if self.residual:
            x += xs[0]
        return self.relu(x)


def network_cases(name: str, size: int) -> list[Case]:
    """The aggregation nodes of a network at an input size, in the order they run, alike ones once."""
    model = models.create_model(name, device="meta").eval()
    found: dict[tuple[Any, ...], Case] = {}

    def record(label: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, AggregationNode)
            xs = args if isinstance(args[0], Tensor) else args[0]
            channels = tuple(x.shape[1] for x in xs)
            height, width = xs[0].shape[2:]
            case = Case(f"{name}.{label}", channels, module.conv.out_channels, height, width, module.residual)
            found.setdefault((channels, height, width, module.residual), case)

        return hook

    for label, module in model.named_modules():
        if isinstance(module, AggregationNode):
            module.register_forward_pre_hook(record(label))
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return list(found.values())


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Copy bandwidth over tensors past the cache, and the rate of the library's best product: matmul or convolution."""
    source = torch.zeros(64 * 2**20 if device.type == "cpu" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, 1024, 1024, device=device).to(dtype)
    x = torch.randn(8, 512, 14, 14, device=device).to(dtype=dtype, memory_format=torch.channels_last)
    w = torch.randn(512, 512, 1, 1, device=device).to(dtype=dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        timings = measure.interleave(
            {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b, "convolution": lambda: F.conv2d(x, w)},
            rounds=25,
            device=device,
        )
    # The floor is a bound, so it takes the machine's good moments.
    matmul = 2 * 1024**3 / timings["matmul"].p20_ms
    convolution = 2 * (x.numel() // 512) * 512**2 / timings["convolution"].p20_ms
    return Rates(2e3 * source.numel() / timings["copy"].p20_ms, 1e3 * max(matmul, convolution))


def _check_agreement(case: Case, mode: str, runs: dict[str, Callable[[], Any]], dtype: torch.dtype) -> None:
    """Raise when a peer and dla_fast differ by more than rounding: such a case must not give a figure."""
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 5e-2)
    results = {name: _tensors(run()) for name, run in runs.items()}
    expected = results.pop("dla_fast")
    for name, tensors in results.items():
        for mine, theirs in zip(expected, tensors, strict=True):
            scale = theirs.abs().max().item() or 1.0
            # Elements at the kink of the activation may fall on either side, so the mean decides.
            error = (mine - theirs).abs().double().mean().item() / scale
            if not error <= tolerance:
                raise RuntimeError(
                    f"{case.name} ({mode}): dla_fast and {name} differ by {error:.2e} of the largest value"
                )


def _tensors(result: Any) -> list[Tensor]:
    return [result.detach().clone()] if isinstance(result, Tensor) else [t.detach().clone() for t in result]


def time_case(
    case: Case, mode: str, args: argparse.Namespace, rates: Rates, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Records of one case: dla_fast and its peers, timed in turn."""
    dtype, layout = DTYPES[args.dtype], LAYOUTS[args.layout]
    torch.manual_seed(0)
    node = AggregationNode(case.in_channels, case.out_channels, case.residual)
    nn.init.uniform_(node.bn.weight, 0.5, 1.5)
    node = node.to(device, dtype).train(mode == "training")
    node.conv.weight.data = node.conv.weight.data.contiguous(memory_format=layout)
    modules: dict[str, Callable[..., Any]] = {"dla_fast": node, "eager": EagerNode(node).train(mode == "training")}
    if "compile" in args.peers:
        torch._dynamo.reset()
        modules["compile"] = torch.compile(EagerNode(node).train(mode == "training"))
    shape = (case.height, case.width)
    xs = [
        torch.randn(args.batch, c, *shape, device=device).to(dtype=dtype, memory_format=layout)
        for c in case.in_channels
    ]
    if mode == "inference":

        def runner(module: Callable[..., Any]) -> Callable[[], Any]:
            @torch.no_grad()
            def run() -> Any:
                return module(*xs)

            return run
    else:
        wanted = [x.requires_grad_() for x in xs] + list(node.parameters())
        dy = torch.randn(args.batch, case.out_channels, *shape, device=device).to(dtype=dtype, memory_format=layout)

        def runner(module: Callable[..., Any]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(module(*xs), wanted, dy)

    runs = {name: runner(module) for name, module in modules.items()}
    _check_agreement(case, mode, runs, dtype)
    timings = measure.interleave(runs, rounds=args.rounds, min_sample_ms=5.0, device=device)
    floor = case.floor_ms(mode, args.batch, dtype.itemsize, rates)
    for name, timing in timings.items():
        yield {
            "case": case.name,
            "op": "aggregate",
            "mode": mode,
            "impl": name,
            "backend": backend.resolve("aggregate", device.type, dtype) if name == "dla_fast" else None,
            "device": device.type,
            "dtype": args.dtype,
            "layout": args.layout,
            "batch": args.batch,
            "shape": [list(case.in_channels), case.out_channels, case.height, case.width],
            "median_ms": timing.median_ms,
            "p20_ms": timing.p20_ms,
            "p80_ms": timing.p80_ms,
            "floor_ms": floor,
        }


def _speedups(records: list[dict[str, Any]], mode: str) -> list[tuple[float, dict[str, dict[str, Any]]]]:
    """Per case of a mode, the ratio of the best peer to dla_fast, worst first."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for r in records:
        if r["mode"] == mode:
            cases.setdefault(r["case"], {})[r["impl"]] = r
    rows = [
        (min(r["median_ms"] for name, r in by.items() if name != "dla_fast") / by["dla_fast"]["median_ms"], by)
        for by in cases.values()
    ]
    return sorted(rows, key=lambda row: row[0])


def geometric_mean(values: list[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def render(records: list[dict[str, Any]], rates: Rates) -> str:
    """The result as a table per mode, worst cases first, each with its geometric means."""
    lines = [rates.describe()]
    for mode in MODES:
        rows = _speedups(records, mode)
        if not rows:
            continue
        lines.append("")
        peers = [name for name in rows[0][1] if name != "dla_fast"]
        table = [[mode, "inputs -> out @ size", "dla_fast", *peers, "floor", "of floor", "speedup"]]
        for ratio, by in rows:
            mine = by["dla_fast"]
            channels, out, height, width = mine["shape"]
            shape = f"{'+'.join(map(str, channels))} -> {out} @ {height}x{width}"
            times = [f"{by[name]['median_ms']:.3f}" for name in ["dla_fast", *peers]]
            share = f"{mine['floor_ms'] / mine['median_ms']:.0%}"
            table.append([mine["case"], shape, *times, f"{mine['floor_ms']:.3f}", share, f"{ratio:.2f}x"])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right))
        lines.insert(len(lines) - len(rows), "-" * len(lines[-1]))
        large = [ratio for ratio, by in rows if by["dla_fast"]["shape"][2] >= 28]
        lines.append(
            f"{mode}: geometric mean {geometric_mean([r for r, _ in rows]):.2f}x over {len(rows)} nodes"
            + (f", {geometric_mean(large):.2f}x at 28x28 and above" if large else "")
            + f", worst {rows[0][0]:.2f}x; ms, against the best peer"
        )
    return "\n".join(lines)


def write_json(path: Path, records: list[dict[str, Any]], rates: Rates, device: torch.device) -> None:
    """The run as one JSON object: machine, versions, records."""
    machine = {
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "bytes_per_s": rates.bytes_per_s,
        "flops_per_s": rates.flops_per_s,
    }
    versions = {"dla_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "versions": versions, "records": records}, indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``bench``."""
    parser.add_argument("device", nargs="?", default="cpu", choices=["cpu", "cuda"], help="default: %(default)s")
    parser.add_argument(
        "--models",
        nargs="+",
        default=["dla34", "dla60", "dla102"],
        choices=models.list_models(dense=False),
        metavar="NAME",
    )
    parser.add_argument("--size", type=int, default=224, help="input side in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--layout", default="channels_last", choices=list(LAYOUTS))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--peers", nargs="+", default=["eager"], choices=PEERS, help="beside eager: compile")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each peer (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")


def run(args: argparse.Namespace) -> int:
    """Time the nodes; what is done is reported even when interrupted."""
    from tqdm import tqdm

    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: no CUDA device was found", file=sys.stderr)
        return 2
    cases = {case.name: case for name in args.models for case in network_cases(name, args.size)}
    work = [(case, mode) for mode in args.modes for case in cases.values()]
    records: list[dict[str, Any]] = []
    rates = measure_rates(DTYPES[args.dtype], device)
    interrupted = False
    try:
        for case, mode in tqdm(work, unit="case", disable=not sys.stderr.isatty()):
            records.extend(time_case(case, mode, args, rates, device))
    except KeyboardInterrupt:
        interrupted = True
    if records:
        print(render(records, rates))
        if args.json is not None:
            write_json(args.json, records, rates, device)
            print(f"records: {args.json}")
    if interrupted:
        print("bench: interrupted; the cases above are complete", file=sys.stderr)
        return 130
    return 0
