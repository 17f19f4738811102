"""``python -m dla_fast bench``: its arguments, the order of the work, and what remains when it is stopped."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dla_fast import models
from dla_fast.bench import (
    cases,
    compare,
    compare_table,
    memory,
    neck_timing,
    necks,
    network_timing,
    networks,
    peers,
    table,
    timing,
    units,
)
from dla_fast.bench.cases import DTYPES, LAYOUTS, MODES, Case, Rates
from dla_fast.bench.records import NotARun, Run, load
from dla_fast.commands import UsageError, require
from dla_fast.commands.options import check_device, check_size, number, whole, writable

SUITES = {
    "ops": "each op at a high and a low resolution",
    "nodes": "the aggregation nodes of --models",
    "ida": "the steps of dla34up's ladder at 512x512",
    "convs": "the convolution-norm-activation units of --models, beside the library's convolution",
    "models": "whole networks",
    "necks": "ladders as others write them, before and after swap_",
    "memory": "memory of a training step of whole networks",
    "launch": "what a call costs on the smallest maps",
    "small": "a node and convolution units on maps of 8x8",
    "scaling": "time against batch, resolution, inputs, channels, threads",
}
DEFAULT_SUITES = ("nodes", "ida")
NODE_MODELS = ("dla34", "dla60", "dla102")
UNIT_MODELS = (*NODE_MODELS, "dla34up")
BATCHES = (1, 8)
# Suites that run whole networks on images, and which networks those are without --models.
_NETWORKS_OF = {"nodes": NODE_MODELS, "convs": UNIT_MODELS, **dict.fromkeys(("models", "memory"), models.list_models())}


@dataclass(frozen=True)
class Job:
    """A piece of work: one case in one mode."""

    suite: str
    label: str
    run: Callable[[], timing.Outcome]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``bench``."""
    parser.set_defaults(parser=parser)
    what = "; ".join(f"{name}: {text}" for name, text in SUITES.items())
    parser.add_argument(
        "what",
        nargs="*",
        metavar="SUITE",
        help=f"what to time, before any option: {what}; all: everything. Also cpu or cuda, for --device. "
        "Or: compare A.json B.json, what of dla_fast changed from A to B beyond the noise of both, by op and by case, "
        "and what would have shown; exits 1 on a regression, 2 where they share no case "
        f"(default: {' '.join(DEFAULT_SUITES)})",
    )
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--layout", default="channels_last", choices=list(LAYOUTS))
    parser.add_argument(
        "--batch",
        nargs="+",
        type=whole(),
        metavar="N",
        help="images (default: 1 and 8; networks 8, dense ones 2, necks 1)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=models.list_models(),
        metavar="NAME",
        help=f"networks (default: {', '.join(NODE_MODELS)} for nodes, {UNIT_MODELS[-1]} too for convs, all of them for "
        "models and memory)",
    )
    parser.add_argument(
        "--size", type=whole(most=2**15), help="side of the images in pixels (default: 224, dense ones and necks 512)"
    )
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=MODES)
    parser.add_argument(
        "--peers",
        nargs="+",
        default=["eager", "compile"],
        choices=[*peers.PEERS, "all"],
        metavar="PEER",
        help=f"whom to compare with, beside every backend of dla_fast: {', '.join(peers.PEERS)}, all",
    )
    parser.add_argument(
        "--variants",
        nargs="*",
        default=["swapped", "frozen"],
        choices=["swapped", "frozen", "low"],
        help="whole networks: beside the one of this package's modules, the stock network after swap_, and after "
        "freeze_ too; ops with a convolution: as frozen models run them (default: both)",
    )
    parser.add_argument("--rounds", type=whole(), default=15, help="samples of each peer")
    parser.add_argument(
        "--seconds", type=number(above=0), default=8.0, help="time for a case: a long one gets fewer rounds"
    )
    parser.add_argument(
        "--minutes", type=number(above=0), help="start no new case after this time; what is left out is told"
    )
    parser.add_argument("--rotate", type=whole(), metavar="N", help="copies of the inputs (default: past a GPU's L2)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the records there, after every case")
    parser.add_argument("--html", type=writable, metavar="FILE", help="write a report there, in one file")
    parser.add_argument(
        "--threshold",
        type=number(least=0),
        default=0.05,
        help="compare: the smallest change that counts, as a fraction",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--absolute", action="store_true", help="compare: the times themselves, so that a slower machine counts"
    )
    how.add_argument(
        "--relative",
        dest="absolute",
        action="store_false",
        default=argparse.SUPPRESS,
        help="compare: the times over those of the peers of the same run, as without either",
    )


def _suites(args: argparse.Namespace) -> list[str]:
    """The suites asked for; a device among them is moved to where it belongs."""
    chosen: list[str] = []
    for word in args.what:
        if word in ("cpu", "cuda"):
            if args.device not in (None, word):
                args.parser.error(f"argument --device: device given twice: {word} and --device {args.device}")
            args.device = word
        elif word == "all":
            chosen += SUITES
        elif word in SUITES:
            chosen.append(word)
        else:
            args.parser.error(
                f"argument SUITE: unknown suite {word!r}: expected {', '.join(SUITES)}, all, cpu, cuda or compare"
            )
    args.device = "cpu" if args.device is None else args.device
    return list(dict.fromkeys(chosen or DEFAULT_SUITES))


def _check(suites: list[str], args: argparse.Namespace) -> None:
    """What options mean together.

    Raises:
        UsageError: they mean nothing.
    """
    if args.json is not None and args.html is not None and args.json.resolve() == args.html.resolve():
        raise UsageError(f"--html {args.html}: --json is the same file")
    if args.size is None:
        return
    for suite, usual in _NETWORKS_OF.items():
        if suite in suites:
            names = args.models or usual
            check_size("--size", args.size, dense=any(name in models.list_models(dense=True) for name in names))


class _Rates:
    """Rates of the machine by thread count, each measured when it is first needed."""

    def __init__(self, settings: timing.Settings, run: Run) -> None:
        self.settings, self.run = settings, run
        self.known: dict[int, Rates] = {}

    def get(self) -> Rates:
        """Of as many threads as there are now."""
        count = torch.get_num_threads()
        if count not in self.known:
            rates = cases.measure_rates(self.settings.torch_dtype, self.settings.device)
            self.known[count] = rates
            where = f", {count} thread{'s' if count > 1 else ''}" if self.settings.device.type == "cpu" else ""
            self.run.rates[f"{self.settings.dtype}{where}"] = rates
        return self.known[count]


def _case_job(case: Case, mode: str, batch: int, settings: timing.Settings, rates: _Rates, suite: str) -> Job:
    count = case.value if case.axis == "threads" else None
    if case.axis == "batch" and case.value is not None:
        batch = case.value

    def run() -> timing.Outcome:
        with networks.threads(count):
            return timing.time_case(case, mode, batch, settings, rates.get(), suite=suite)

    return Job(suite, f"{case.name} {mode}", run)


def _thread_counts(device: torch.device) -> list[int]:
    """1, 2, 4 and so on up to the threads there are; none on a GPU."""
    most = torch.get_num_threads()
    if device.type != "cpu" or most == 1:
        return []
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def jobs(suites: list[str], args: argparse.Namespace, settings: timing.Settings, rates: _Rates) -> list[Job]:
    """The work, in the order it is done; under ``--minutes`` the suites take turns, so that none is cut away whole."""
    found: list[list[Job]] = []
    batches = args.batch or BATCHES
    alone = args.batch or [None]
    names = args.models or models.list_models()
    for suite in suites:
        work: list[Job] = []
        if suite in ("ops", "nodes", "ida", "convs", "launch", "small", "scaling"):
            several = batches
            if suite == "ops":
                chosen = cases.op_cases()
            elif suite == "nodes":
                alike = [case for name in args.models or NODE_MODELS for case in cases.network_cases(name, args.size)]
                chosen = list({case.name: case for case in alike}.values())
            elif suite == "ida":
                chosen = cases.ida_cases()
            elif suite == "convs":
                chosen = units.unit_cases(args.models or UNIT_MODELS, args.size)
            elif suite == "launch":
                chosen, several = cases.launch_cases(), [2]
            elif suite == "small":
                chosen, several = cases.small_cases(), [1]
            else:
                chosen, several = cases.scaling_cases(threads=_thread_counts(settings.device)), [max(batches)]
            work = [
                _case_job(case, mode, batch, settings, rates, suite)
                for batch in several
                for case in chosen
                for mode in args.modes
            ]
        elif suite == "models":
            for name, batch, mode in ((n, b, m) for n in names for b in alone for m in args.modes):
                work.append(_network_job(networks.Network.of(name, args.size, batch), mode, settings, rates))
        elif suite == "necks":
            for name, batch, mode in ((n, b, m) for n in necks.NECKS for b in alone for m in args.modes):
                work.append(_neck_job(neck_timing.Neck.of(name, args.size, batch), mode, settings, rates))
        else:
            for network in (networks.Network.of(n, args.size, b) for n in names for b in alone):
                work.append(_memory_job(network, settings))
        found.append(work)
    if args.minutes is None:
        return [job for work in found for job in work]
    # Spread evenly: the j-th of n is due at (j + 1/2) / n of the way.
    spread = [((j + 0.5) / len(work), job) for work in found for j, job in enumerate(work)]
    return [job for _, job in sorted(spread, key=lambda item: item[0])]


def _network_job(network: networks.Network, mode: str, settings: timing.Settings, rates: _Rates) -> Job:
    def run() -> timing.Outcome:
        return network_timing.time_network(network, mode, settings, rates.get())

    return Job("models", f"{network.name} {mode}", run)


def _neck_job(neck: neck_timing.Neck, mode: str, settings: timing.Settings, rates: _Rates) -> Job:
    def run() -> timing.Outcome:
        return neck_timing.time_neck(neck, mode, settings, rates.get())

    return Job("necks", f"{neck.case} {mode}", run)


def _memory_job(network: networks.Network, settings: timing.Settings) -> Job:
    return Job("memory", network.name, lambda: memory.measure_network(network, settings))


def _with_progress(work: list[Job], minutes: float | None, run: Run) -> Iterator[Job]:
    """The jobs one by one beside a bar with the time left; past ``minutes`` the rest is noted as left out."""
    from tqdm import tqdm

    start = time.monotonic()
    with tqdm(total=len(work), unit="case", disable=None, dynamic_ncols=True, smoothing=0.1) as bar:
        for i, job in enumerate(work):
            if minutes is not None and time.monotonic() - start > 60 * minutes:
                run.left_out = [f"{rest.suite}: {rest.label}" for rest in work[i:]]
                return
            bar.set_postfix_str(job.label)
            yield job
            bar.update()


def run(args: argparse.Namespace) -> int:
    """Time what was asked for; what is done is reported and kept even when interrupted.

    Returns:
        0; 1 where a case is an error, a file could not be written, or ``compare`` found a regression; 130 after an
        interruption.
    """
    if args.what[:1] == ["compare"]:
        if len(args.what) != 3:
            args.parser.error("argument SUITE: compare: expected two files, A.json B.json")
        return _compare(Path(args.what[1]), Path(args.what[2]), args.threshold, absolute=args.absolute)
    suites = _suites(args)
    device = check_device(args.device)
    _check(suites, args)
    if args.html is not None:
        require({"matplotlib": "matplotlib"}, "demo")
    chosen = tuple(peers.PEERS) if "all" in args.peers else tuple(args.peers)
    settings = timing.Settings(
        device,
        args.dtype,
        args.layout,
        args.rounds,
        chosen,
        seconds=args.seconds,
        rotate=args.rotate,
        variants=tuple(f"{peers.FUSED}+{name}" for name in args.variants),
    )
    result = Run(device, args.json, sys.argv[1:])
    rates = _Rates(settings, result)
    interrupted, unwritten = False, ""
    try:
        work = jobs(suites, args, settings, rates)
        rates.get()
        for job in _with_progress(work, args.minutes, result):
            outcome = job.run()
            try:
                result.add(outcome.records, outcome.skipped)
            except OSError as error:
                # What comes after it could not be kept either.
                unwritten = (
                    f"--json {args.json}: {error.strerror or error}; no more was measured, what there is is above"
                )
                break
        result.complete = not (result.left_out or unwritten)
    except KeyboardInterrupt:
        interrupted = True
    return _finish(result, args, interrupted, unwritten)


def _finish(result: Run, args: argparse.Namespace, interrupted: bool, unwritten: str = "") -> int:
    """Print and write what there is."""
    data: dict[str, Any] = result.to_dict()
    if result.records:
        print(table.render(data))
        try:
            if args.json is not None and not unwritten:
                result.save()
                print(f"records: {args.json}")
            if args.html is not None:
                from dla_fast.bench import report

                report.write(data, args.html)
                print(f"report: {args.html}")
        except OSError as error:
            unwritten = f"{error.filename or 'the files'}: {error.strerror or error}; what there is is above"
    if unwritten:
        print(f"bench: {unwritten}", file=sys.stderr)
    if result.left_out:
        print(f"time was up: {table.counted(len(result.left_out))} left out", file=sys.stderr)
    if interrupted:
        what = "the cases above are complete" if result.records else "no case was complete, and nothing was written"
        print(f"bench: interrupted; {what}", file=sys.stderr)
        return 130
    errors = sum(1 for record in result.records if record.get("error"))
    if errors:
        print(f"bench: errors in {table.counted(errors)}, see above", file=sys.stderr)
    return 1 if errors or unwritten else 0


def _compare(a: Path, b: Path, threshold: float, *, absolute: bool = False) -> int:
    """Compare two files and print; 1 where dla_fast got worse past the threshold, or gives no figure any more.

    Raises:
        UsageError: a file that is no run, or two that have no case in common.
    """
    try:
        before, after = load(a), load(b)
    except NotARun as error:
        raise UsageError(str(error)) from error
    result = compare.compare(before, after, threshold, absolute=absolute)
    if not result.ours and not result.broken:
        raise UsageError(f"{a} and {b} have no case of dla_fast in common: {compare_table.apart(before, after)}")
    print(compare_table.render(result, before, after))
    return 1 if result.regressions() or result.broken else 0
