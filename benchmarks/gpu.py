"""``python -m benchmarks.gpu``: everything that only a GPU can tell, in one run of under eight minutes.

Builds the extension, then checks (parity of every op and dtype against float64, gradients, bitwise determinism,
moments, CUDA graphs and torch.compile, whole networks) and measures (what a call costs the host; every root of the
networks and the other ops, as a share of the machine's floor and against eager, compiled and frozen peers). Each
section runs in a process of its own, so that a crash costs the case it happened in and nothing else. One JSON holds all
of it, and is whole at any moment. With ``--device cpu`` the same code runs on the CPU's kernels: for testing it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks._gpu_sections import SECTIONS, cases_of, is_fatal
from dla_fast.commands.bench import records as recorded

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(__file__).resolve().parent / "out" / "gpu.json"
# What a section's process runs; it ends in main() below.
CHILD = "benchmarks.gpu"
# Seconds that a section may go past its share, to finish the case it is at.
GRACE = 20.0


def build(device: str) -> dict[str, Any]:
    """Build the extension in place for the device at hand; a failure is a record, not the end."""
    environment = dict(os.environ)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        # "a" brings the instructions that sm_90 alone has.
        environment.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    detail = "" if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip())[-600:]
    return {
        "section": "build", "check": "extension", "ok": done.returncode == 0, "detail": detail,
        "seconds": time.monotonic() - start,
    }  # fmt: skip


def child(args: argparse.Namespace) -> int:
    """Do the cases of one section, and write a line before and after each; 3 where the device is lost."""
    with Path(args.lines).open("a", encoding="utf-8") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for index, (label, run) in enumerate(cases_of(args.section, args.device, args.small)):
            if index < args.skip:
                continue
            if time.time() > args.until:
                write(left_out=f"{args.section}: {label}")
                continue
            write(begun=index, label=label)
            try:
                found = run()
            except Exception as error:
                found = [{"check": label, "ok": False, "detail": f"{type(error).__name__}: {error}"[:600]}]
                if is_fatal(error):
                    write(record={"section": args.section, **found[0]})
                    return 3
            for record in found:
                write(record={"section": args.section, **record})
    return 0


class Collected:
    """What the sections gave so far, on disk after every one of them."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.lines: list[dict[str, Any]] = []
        self.started = time.time()

    def records(self) -> list[dict[str, Any]]:
        """Every record, checks and figures."""
        return [line["record"] for line in self.lines if "record" in line]

    def left_out(self) -> list[str]:
        """The cases that time did not reach."""
        return [line["left_out"] for line in self.lines if "left_out" in line]

    def to_dict(self, complete: bool) -> dict[str, Any]:
        """The run as the JSON file has it: figures under "records", all else under "checks"."""
        found = self.records()
        return {
            "machine": recorded.machine_facts(torch.device(self.device), {}),
            "versions": recorded.versions() | _triton_version(),
            "commit": recorded.commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": time.time() - self.started,
            "complete": complete and not self.left_out(),
            "left_out": self.left_out(),
            "checks": [r for r in found if "check" in r],
            "records": [r for r in found if "check" not in r],
            "targets": targets(found),
        }

    def save(self, complete: bool = False) -> dict[str, Any]:
        """Write the file at one stroke."""
        data = self.to_dict(complete)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)
        return data


def _triton_version() -> dict[str, str]:
    import importlib.metadata

    try:
        return {"triton": importlib.metadata.version("triton")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def run_section(name: str, seconds: float, args: argparse.Namespace, collected: Collected, bar: Any) -> None:
    """Run a section to its end or its time; a process that dies is started again behind the case that killed it."""
    until, skip = time.time() + seconds, 0
    while True:
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "lines"
            lines.touch()
            command = [sys.executable, "-m", CHILD, "--section", name, "--lines", str(lines)]
            command += ["--skip", str(skip), "--until", str(until), "--device", args.device]
            process = subprocess.Popen(
                command + ["--small"] * args.small,
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                _, said = process.communicate(timeout=max(1.0, until - time.time()) + args.grace)
                status: int | str = process.returncode
            except subprocess.TimeoutExpired:
                process.kill()
                _, said = process.communicate()
                status = "out of time"
            except BaseException:
                process.kill()
                process.wait()
                collected.lines += _read(lines)
                raise
            found = _read(lines)
        collected.lines += found
        begun = [line for line in found if "begun" in line]
        if status == 0:
            return
        label = begun[-1]["label"] if begun else "the start"
        detail = f"the process ended with {status} in {label}: {said.strip()[-300:]}"
        collected.lines.append({"record": {"section": name, "check": label, "ok": False, "detail": detail}})
        bar.write(f"gpu: {name}: {detail.splitlines()[0][:160]}")
        if not begun or status == "out of time" or time.time() > until:
            collected.lines.append({"left_out": f"{name}: what comes after {label}"})
            return
        skip = begun[-1]["begun"] + 1


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a section; the last may be cut short where the process was killed."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


# Whichever of them is fastest on a case stands for a compiled network.
COMPILED = ("compile", "compile_max_autotune", "compile_frozen")


def _pairs(
    found: Sequence[dict[str, Any]], op: str, mode: str, *impls: str, batch: int | None = None
) -> list[tuple[float, dict[str, Any]]]:
    """(time of the fastest of the peers over dla_fast's, dla_fast's record) of the cases that both have."""
    timed = [r for r in found if r.get("op") == op and r.get("mode") == mode and r.get("median_ms")]
    best: dict[tuple[Any, ...], float] = {}
    for r in timed:
        if r["impl"] in impls:
            key = _case(r)
            best[key] = min(best.get(key, r["median_ms"]), r["median_ms"])
    mine = [r for r in timed if r["impl"] == "dla_fast" and _case(r) in best and batch in (None, r["batch"])]
    return [(best[_case(r)] / r["median_ms"], r) for r in mine]


def _case(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[k] for k in ("case", "mode", "batch", "dtype"))


def targets(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures that were set as goals, beside what was measured; None where nothing was."""
    rows: list[dict[str, Any]] = []

    def add(what: str, goal: float, values: list[float]) -> None:
        value = recorded.geometric_mean(values) if values else None
        rows.append({"what": what, "goal": goal, "value": value, "worst": min(values, default=None),
                     "met": None if value is None else value >= goal})  # fmt: skip

    for op in ("upsample", "batch_norm_act"):
        for mode in ("inference", "training"):
            mine = [r for _, r in _pairs(found, op, mode, "eager")]
            add(f"{op} {mode}: share of the floor", 0.8, [r["floor_ms"] / r["median_ms"] for r in mine])
    add("upsample forward and backward over eager", 5.0, [s for s, _ in _pairs(found, "upsample", "training", "eager")])
    add("upsample_add over eager", 3.0, [s for s, _ in _pairs(found, "upsample_add", "training", "eager")])
    add(
        "bare convolution over merge 3x3, inference",
        0.8,
        [s for s, _ in _pairs(found, "merge", "inference", "library")],
    )
    for mode, over_eager, over_compiled in (("inference", 2.5, 1.8), ("training", 1.6, 1.4)):
        everywhere = [s for s, _ in _pairs(found, "aggregate", mode, "eager")]
        add(f"aggregate {mode}: slowest shape over eager", 1.0, [min(everywhere)] if everywhere else [])
        large = _pairs(found, "aggregate", mode, "eager", batch=256)
        add(f"aggregate {mode} over eager, batch 256", over_eager, [s for s, _ in large])
        compiled = _pairs(found, "aggregate", mode, *COMPILED, batch=256)
        add(f"aggregate {mode} over compiled, batch 256", over_compiled, [s for s, _ in compiled])
        if mode == "inference":
            # Memory decides where a byte costs no more than it does anywhere.
            byte = min((r["floor_ms"] / r["bytes"] for _, r in large), default=0.0)
            memory = [r for _, r in large if r["floor_ms"] / r["bytes"] < 1.01 * byte]
            what = "aggregate inference, batch 256, memory-bound: share of the floor"
            add(what, 0.85, [r["floor_ms"] / r["median_ms"] for r in memory])
    return rows


def summary(data: dict[str, Any]) -> str:
    """What failed, the slowest cases against eager, and the goals."""
    lines = [f"FAILED {c['section']}: {c['check']}: {c['detail']}"[:300] for c in data["checks"] if not c["ok"]]
    errors = [r for r in data["records"] if r.get("error")]
    lines += [f"ERROR {r['case']} {r['mode']} batch {r['batch']}: {r['error']}"[:300] for r in errors]
    modes = (("aggregate", "inference"), ("aggregate", "training"), ("merge", "inference"), ("upsample", "training"))
    for op, mode in modes:
        worst = sorted(_pairs(data["records"], op, mode, "eager"), key=lambda pair: pair[0])[:3]
        for ratio, r in worst:
            share = r["floor_ms"] / r["median_ms"]
            lines.append(
                f"{op} {mode} {r['shape']} batch {r['batch']} {r['dtype']}: {r['median_ms']:.4f} ms, "
                f"{share:.0%} of the floor, {ratio:.2f}x eager"
            )
    for t in data["targets"]:
        value = "not measured" if t["value"] is None else f"{t['value']:.2f}, worst {t['worst']:.2f}"
        verdict = {None: "", True: ": met", False: ": MISSED"}[t["met"]]
        lines.append(f"goal {t['what']} >= {t['goal']:g}: {value}{verdict}")
    good = sum(bool(c["ok"]) for c in data["checks"])
    lines.append(
        f"gpu: {good} of {len(data['checks'])} checks hold, {len(data['records'])} records, "
        f"{len(data['left_out'])} left out, {data['seconds']:.0f} s"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sections: 0 where everything holds or there is no GPU, 1 where not, 130 after an interruption."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", default=["build", *SECTIONS], choices=["build", *SECTIONS])
    parser.add_argument("--json", type=Path, default=OUT, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="the smallest shapes alone, for testing this program")
    parser.add_argument("--grace", type=float, default=GRACE, help=argparse.SUPPRESS)
    for hidden, kind in (("--section", str), ("--lines", str), ("--skip", int), ("--until", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.section:
        return child(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu: no CUDA device was found, so nothing was measured; --device cpu tests this program on the CPU")
        return 0
    collected = Collected(args.json, args.device)
    end = collected.started + 60 * args.minutes
    interrupted = False
    try:
        with tqdm(total=len(args.sections), unit="section", disable=not sys.stderr.isatty()) as bar:
            for position, name in enumerate(args.sections):
                bar.set_postfix_str(name)
                if name == "build":
                    collected.lines.append({"record": build(args.device)})
                else:
                    shares = [SECTIONS[n] for n in args.sections[position:] if n != "build"]
                    left = max(0.0, end - time.time() - args.grace)
                    run_section(name, left * shares[0] / sum(shares), args, collected, bar)
                collected.save()
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    data = collected.save(complete=not interrupted)
    print(summary(data))
    print(f"records: {args.json}")
    if interrupted:
        print("gpu: interrupted; what was done is kept", file=sys.stderr)
        return 130
    return 0 if all(c["ok"] for c in data["checks"]) and not any(r.get("error") for r in data["records"]) else 1


if __name__ == "__main__":
    sys.exit(main())
