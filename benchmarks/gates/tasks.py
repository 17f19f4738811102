"""The paper's four tasks on made data: trained, evaluated again from the file, and predictions drawn. No GPU needed.

``python -m benchmarks.gates.tasks`` makes the data under ``build/tasks``, runs ``python -m dla_fast train``,
``evaluate`` and ``predict`` for each task as a user would, and ends with a line each, ``task: NAME METRIC VALUE``.
Exit status 1: a figure is below what it should be, or the saved weights do not give it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from dla_fast.tasks import logs

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "tasks"


@dataclass(frozen=True)
class Case:
    """A task on made data.

    Attributes:
        name: of the task.
        part: of the made data.
        metric: the figure.
        least: what it should reach.
        images: what is predicted, below the data.
        options: of training.
    """

    name: str
    part: str
    metric: str
    least: float
    images: str
    options: tuple[str, ...] = field(default=())


SMALL = ("--model", "dla46_c", "--evaluate-every", "1000", "--optimizer", "adamw", "--weight-decay", "0.01")
SMALL += ("--warmup-epochs", "1", "--ema", "0.98")
CASES = (
    Case(
        "classification",
        "digits",
        "top-1",
        0.95,
        "val/3",
        (*SMALL, "--size", "64", "--epochs", "8", "--batch", "32", "--lr", "0.004", "--schedule", "cosine")
        + ("--hflip", "0", "--crop-scale", "0.85", "--color-jitter", "0", "--resize", "1"),
    ),
    Case(
        "fine-grained",
        "birds",
        "top-1",
        0.6,
        "images",
        (*SMALL, "--size", "96", "--epochs", "12", "--batch", "16", "--lr", "0.004", "--resize", "1")
        + ("--crop-scale", "0.5", "--color-jitter", "0.2"),
    ),
    Case(
        "segmentation",
        "scenes",
        "mIoU",
        0.8,
        "leftImg8bit/val",
        (*SMALL, "--size", "128", "--epochs", "18", "--batch", "4", "--lr", "0.004", "--random-rotate", "0")
        + ("--random-scale", "1.2", "--down-ratio", "4"),
    ),
    Case(
        "boundary",
        "boundaries",
        "ODS",
        0.8,
        "data/images/val",
        (*SMALL, "--size", "96", "--epochs", "11", "--batch", "4", "--lr", "0.004", "--annotators", "majority"),
    ),
)


def dla_fast(*arguments: str) -> str:
    """What a command prints; its progress goes to this terminal."""
    command = [sys.executable, "-m", "dla_fast", *arguments]
    # Threads that wait for each other leave the cores to the processes that read images.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    sys.stdout.write(done.stdout)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}")
    return done.stdout


def run(case: Case, out: Path, backend: str) -> tuple[float, list[str]]:
    """Train, evaluate and predict; gives the figure, and what is wrong."""
    started = time.monotonic()
    data, folder = out / "data" / case.part, out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    common = ("--backend", backend)
    dla_fast("train", case.name, "--data", str(data), "--out", str(folder), *case.options, *common)
    trained = time.monotonic()
    figures = folder / "evaluation.json"
    plot = ("--plot", str(folder / "evaluation.png")) if case.name == "boundary" else ()
    dla_fast("evaluate", case.name, "--weights", str(folder), "--json", str(figures), *plot, *common)
    images = sorted(path for path in (data / case.images).rglob("*") if path.suffix in (".png", ".jpg"))[:8]
    shown = folder / "predictions"
    dla_fast(
        "predict", case.name, "--weights", str(folder), "--out", str(shown), *common, *(str(path) for path in images)
    )
    value = float(json.loads(figures.read_text())["metrics"][case.metric])
    then = logs.rows(folder / logs.EPOCHS)[-1][case.metric]
    wrong = []
    if value < case.least:
        wrong.append(f"{case.name}: {case.metric} {value:.4f} is below {case.least}")
    if abs(value - float(then)) > 1e-6:
        wrong.append(f"{case.name}: {case.metric} was {then} after training, from the file it is {value}")
    if not list(shown.glob("*.png")):
        wrong.append(f"{case.name}: no pictures in {shown}")
    print(f"{case.name}: {trained - started:.0f} s of training, {time.monotonic() - started:.0f} s in all", flush=True)
    return value, wrong


def main() -> int:
    """Run the cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder for data and runs")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="some of the tasks")
    parser.add_argument("--backend", default="auto", help="who computes the fused ops")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only is None or case.name in args.only]
    made = [sys.executable, str(ROOT / "examples" / "made_data.py"), str(args.out / "data"), "--only"]
    subprocess.run([*made, *(case.part for case in cases)], check=True)
    lines, wrong = [], []
    for case in cases:
        value, faults = run(case, args.out, args.backend)
        lines.append(f"task: {case.name} {case.metric} {value:.4f}")
        wrong += faults
    print("\n".join([*(f"WRONG: {fault}" for fault in wrong), *lines]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
