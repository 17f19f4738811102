"""``python -m benchmarks.swapped``: what swap_ gives to whole networks that people have.

timm's DLA-34, and the detector and segmenter of examples/, each as it is, under ``torch.compile``, swapped, and swapped
under ``torch.compile``; inference and a training step (loss and optimizer included), in turn. Nothing is timed before
outputs, losses and gradients have been found to agree. The memory of a training step is measured in processes of their
own. The JSON file is that of ``python -m dla_fast bench``: suites "swapped" and "memory".
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dla_fast
from benchmarks.swapped import picture
from benchmarks.swapped.models import MODELS, Model, batch_of, build, inference, training_step
from dla_fast.bench import network_timing, networks, peers, records, table, timing
from dla_fast.bench.cases import LAYOUTS
from dla_fast.bench.timing import Disagreement, Settings, complete, one_line
from dla_fast.proof import measure
from dla_fast.proof.measure import NO_FRAGMENTATION

COMPILED = "+compile"
# Not the name of a backend ("dla_fast:cpu"): this package's all the same, and so no peer of itself.
IMPLS = ("eager", "compile", peers.FUSED, peers.FUSED + COMPILED)
MODES = ("inference", "training")


def compare(label: str, impl: str, got: list[Tensor], eager: list[Tensor], bounds: tuple[float, float]) -> None:
    """Outputs (or the loss) each, then what is left, the gradients, as one vector.

    Args:
        label: what is compared, for the message.
        impl: whose tensors ``got`` are.
        got: outputs, or the loss and the gradients.
        eager: the same from the network as it is.
        bounds: for each output, and for the gradient as a whole; relative.

    Raises:
        Disagreement: they differ by more.
    """
    outputs = len(got) if "inference" in label else 1
    errors = [timing.difference(a, b) for a, b in zip(got[:outputs], eager[:outputs], strict=True)]
    if not max(errors) <= bounds[0]:
        raise Disagreement(impl, f"{label}: {impl} and eager differ by {max(errors):.1e} of the largest value")
    if outputs < len(got):
        error = network_timing.norm_difference(got[outputs:], eager[outputs:])
        if not error <= bounds[1]:
            raise Disagreement(impl, f"{label}: {impl} and eager differ in the gradient by {error:.1e} of its norm")


def check_float64(name: str, before: nn.Module, after: nn.Module, layout: str, side: int = 64) -> None:
    """Compare loss and gradients of a training step in float64, on two small images.

    Raises:
        Disagreement: they differ by more than float64's rounding.
    """
    images, loss = batch_of(name, 2, side, layout)
    results = []
    for model in (before, after):
        model = copy.deepcopy(model).double().train()
        # The detector's targets stay float32, in both alike.
        value = loss(model(images.double()))
        results.append([value.detach(), *torch.autograd.grad(value, networks.trained(model))])
    bounds = (network_timing.FLOAT64_TOLERANCE, network_timing.FLOAT64_TOLERANCE)
    compare(f"{name} (training) in float64", peers.FUSED, results[1], results[0], bounds)


def prove(
    model: Model, mode: str, batch: int, pair: dict[bool, nn.Module], args: argparse.Namespace
) -> tuple[dict[str, Callable[[], Any]], list[dict[str, str]]]:
    """One pass by implementation, once all have been found to agree with eager; and those that cannot run.

    Args:
        model: which network.
        mode: one of :data:`MODES`.
        batch: images.
        pair: the network as it is (False), and swapped (True); neither is changed.
        args: the command line.

    Raises:
        Disagreement: one differs from eager, or the swapped network cannot run.
    """
    images, loss = batch_of(model.name, batch, args.size or model.size, args.layout)
    calls: dict[str, Callable[[], Any]] = {}
    skipped: list[dict[str, str]] = []
    want: list[Tensor] = []
    bound = 10 * timing.TOLERANCES[torch.float32]
    torch._dynamo.reset()
    for impl in args.impls:
        network = copy.deepcopy(pair[impl.startswith(peers.FUSED)]).train(mode == "training")
        parameters = networks.trained(network)
        run: Callable[..., Any] = network
        try:
            if impl.endswith("compile"):
                run = torch.compile(network, dynamic=False)
            if mode == "inference":
                calls[impl] = inference(run, images)
                got = [t.clone() for t in calls[impl]()]
            else:
                calls[impl] = training_step(run, parameters, images, loss)
                value = calls[impl]()
                got = [value, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters)]
        except Exception as error:  # what a compiler raises is no failure of the rest
            if not impl.endswith("compile"):
                raise Disagreement(impl, f"{model.name} ({mode}): {impl} raised {one_line(error)}") from error
            calls.pop(impl, None)
            skipped.append({"case": model.name, "mode": mode, "impl": impl, "reason": one_line(error)})
            continue
        if impl == "eager":
            want = got
            continue
        compare(f"{model.name} ({mode})", impl, got, want, (bound, network_timing.GRADIENT_TOLERANCE))
    return calls, skipped


def common(model: Model, mode: str, batch: int, args: argparse.Namespace) -> records.Record:
    """What all records of a case have."""
    size = args.size or model.size
    return {
        "case": model.name,
        "op": "model",
        "mode": mode,
        "device": "cpu",
        "dtype": "float32",
        "layout": args.layout,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "shape": f"3 @ {size}x{size}",
        "side": size,
    }


def time_case(
    model: Model, mode: str, batch: int, pair: dict[bool, nn.Module], swap: dict[str, Any], args: argparse.Namespace
) -> timing.Outcome:
    """Prove, then time in turn."""
    fixed = {"suite": "swapped", **common(model, mode, batch, args)}
    try:
        calls, skipped = prove(model, mode, batch, pair, args)
    except Disagreement as error:
        return timing.Outcome([complete({**fixed, "impl": error.impl, "error": str(error)})], [])
    settings = Settings(torch.device("cpu"), layout=args.layout, rounds=args.rounds, seconds=args.seconds)
    figures = timing.time_runners(calls, settings)
    found = [complete({**fixed, "impl": impl, **figure}) for impl, figure in figures.items()]
    for record in found:
        record |= swap if record["impl"].startswith(peers.FUSED) else {}
    return timing.Outcome(found, skipped)


def measured(impl: str, args: argparse.Namespace) -> dict[str, int]:
    """Bytes that a training step saves for its backward, and that it adds at most, in this process."""
    torch.set_num_threads(args.threads)
    (name,), (batch,) = args.models, args.batch
    network = build(name).to(memory_format=LAYOUTS[args.layout]).train()
    if impl == peers.FUSED:
        dla_fast.swap_(network, verify=False)  # it has been, where the time was measured
    images, loss = batch_of(name, batch, args.size or MODELS[name].size, args.layout)
    known = [*network.parameters(), *network.buffers(), images]
    saved = measure.saved_bytes(lambda: networks.tensors_of(network(images)), exclude=known)
    step = training_step(network, networks.trained(network), images, loss)
    gc.collect()
    measure.reset_peak_rss()
    before = measure.current_rss()
    for _ in range(2):
        step()
    return {"saved_bytes": saved, "peak_bytes": measure.peak_rss() - before}


def memory_case(model: Model, batch: int, args: argparse.Namespace) -> timing.Outcome:
    """Memory of a training step, swapped and not."""
    line = ["--models", model.name, "--batch", str(batch), "--layout", args.layout]
    line += ["--threads", str(torch.get_num_threads()), *(["--size", str(args.size)] if args.size else [])]
    found, skipped = [], []
    for impl in ("eager", peers.FUSED):
        try:
            figures = measure.in_fresh_process("benchmarks.swapped", [*line, "--measure", impl], env=NO_FRAGMENTATION)
        except (RuntimeError, OSError) as error:
            skipped.append({"case": model.name, "mode": "memory", "impl": impl, "reason": one_line(error)})
            continue
        fixed = common(model, "training", batch, args)
        found.append(complete({"suite": "memory", **fixed, "impl": impl, **figures}))
    return timing.Outcome(found, skipped)


def run_all(run: records.Run, args: argparse.Namespace) -> None:
    """Measure everything that was asked for, into ``run``."""
    from tqdm import tqdm

    work = [(MODELS[name], mode, b) for name in args.models for mode in args.modes for b in
            MODELS[name].batches(mode, args.batch)]  # fmt: skip
    steps = len(work) + (0 if args.no_memory else sum(mode == "training" for _, mode, _ in work))
    with tqdm(total=steps, unit="case", disable=None) as bar:

        def case(label: str, outcome: Callable[[], timing.Outcome]) -> None:
            bar.set_description(label)
            found = outcome()
            run.add(found.records, found.skipped)
            bar.update()

        for name in args.models:
            bar.set_description(f"{name}, swapping")
            before = build(name).to(memory_format=LAYOUTS[args.layout])
            after = copy.deepcopy(before)
            start = time.perf_counter()
            report = dla_fast.swap_(after)
            swap = {"units": len(report.swapped), "swap_s": time.perf_counter() - start}
            try:
                check_float64(name, before, after, args.layout)
            except Disagreement as error:
                fixed = {"suite": "swapped", **common(MODELS[name], "training", 2, args)}
                run.add([complete({**fixed, "impl": error.impl, "error": str(error)})])
                continue
            pair = {False: before, True: after}
            for model, mode, batch in work:
                if model.name != name:
                    continue
                label = f"{name}, {mode}, batch {batch}"
                case(label, partial(time_case, model, mode, batch, pair, swap, args))
                if mode == "training" and not args.no_memory:
                    case(f"{label}, memory", partial(memory_case, model, batch, args))
    run.complete = True
    run.save()


def render(run: dict[str, Any]) -> str:
    """A run as text: times and ratios, memory, what could not run and what disagreed."""
    rows = [["model", "mode", "batch", *IMPLS, "eager/swapped", "compile/swapped", "compile/both"]]
    for case in picture.cases(run["records"]):
        ms = {impl: record["median_ms"] for impl, record in case.items()}
        mine = case.get(peers.FUSED, next(iter(case.values())))

        def ratio(a: str, b: str, ms: dict[str, float] = ms) -> str:
            return f"{ms[a] / ms[b]:.2f}x" if a in ms and b in ms else "-"

        rows.append(
            [
                f"{mine['case']} {mine['side']}x{mine['side']}",
                mine["mode"],
                str(mine["batch"]),
                *(table.milliseconds(ms.get(impl)) for impl in IMPLS),
                ratio("eager", peers.FUSED),
                ratio("compile", peers.FUSED),
                ratio("compile", peers.FUSED + COMPILED),
            ]
        )
    lines = ["milliseconds, medians"] + (table.align(rows, left=2) if len(rows) > 1 else ["no case was timed"])
    lines += table._memory(run["records"])
    swaps = {r["case"]: r for r in run["records"] if r.get("swap_s")}
    lines += [""] + [f"{n}: swap_ took {r['units']} units, {r['swap_s']:.1f} s" for n, r in swaps.items()]
    lines += [f"could not run: {s['case']}, {s['mode']}, {s['impl']}: {s['reason']}" for s in run["skipped"]]
    lines += [f"ERROR: {record['error']}" for record in run["records"] if record.get("error")]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.swapped", description=__doc__.split("\n")[0])
    p.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    p.add_argument("--impls", nargs="+", default=list(IMPLS), choices=IMPLS, help="eager always takes part")
    p.add_argument("--batch", type=int, nargs="+", help="images, in every mode (default: 1 to infer, more to train)")
    p.add_argument("--size", type=int, help="side of the images (default: 224 for dla34, else 512)")
    p.add_argument("--layout", default="contiguous", choices=list(LAYOUTS), help="(default: %(default)s, NCHW)")
    p.add_argument("--rounds", type=int, default=9, help="samples of each, at most (default: %(default)s)")
    p.add_argument(
        "--seconds", type=float, default=25.0, help="time of a case, 3 rounds at least (default: %(default)s)"
    )
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--no-memory", action="store_true", help="times alone")
    p.add_argument(
        "--quick", action="store_true", help="small images, few rounds, nothing compiled: to see that it runs"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the run there, after every case")
    p.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw it there")
    p.add_argument(
        "--show", type=Path, metavar="FILE", help="measure nothing: table and picture of a run that was kept"
    )
    p.add_argument("--measure", choices=IMPLS, help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    """Measure, print, draw; 1 where results disagree, 130 when interrupted."""
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(given)
    if args.measure is not None:
        print(json.dumps(measured(args.measure, args)))
        return 0
    if args.quick:
        args.size, args.batch = args.size or 64, args.batch or [2]
        args.rounds, args.seconds = min(args.rounds, 3), min(args.seconds, 1.0)
        args.impls = [impl for impl in args.impls if not impl.endswith("compile")]
    args.impls = [impl for impl in IMPLS if impl in {*args.impls, "eager"}]
    if args.show is not None:
        kept = records.load(args.show)
    else:
        torch.set_num_threads(args.threads)
        run = records.Run(torch.device("cpu"), args.json, ["benchmarks.swapped", *given])
        try:
            run_all(run, args)
        except KeyboardInterrupt:
            print("swapped: interrupted; what was measured is kept", file=sys.stderr)
        kept = run.to_dict()
    print(render(kept))
    if args.picture is not None and picture.cases(kept["records"]):
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        args.picture.write_bytes(picture.draw(kept))
        print(f"wrote {args.picture}")
    if any(record.get("error") for record in kept["records"]):
        return 1
    return 0 if kept["complete"] else 130


if __name__ == "__main__":
    sys.exit(main())
