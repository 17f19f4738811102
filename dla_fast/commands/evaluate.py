"""``python -m dla_fast evaluate TASK``: judge a trained network on a data set."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dla_fast import tasks
from dla_fast.bench import files
from dla_fast.commands import task_options
from dla_fast.commands.options import reported, writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``evaluate``."""
    task_options.add_tasks(parser, _add)


def _add(parser: argparse.ArgumentParser, task: Any) -> None:
    parser.add_argument(
        "--weights", type=Path, required=True, help="a run's folder, its model.safetensors, or any checkpoint"
    )
    parser.add_argument("--model", help="the network, where the weights are from elsewhere")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"), help="(default: val)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="write the figures there")
    if task.plot:
        parser.add_argument("--plot", type=writable, metavar="FILE", help=f"write the {task.plot} there, a PNG")
    task_options.add_options(parser, task.evaluation)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print; returns 0."""
    from dla_fast.tasks import running

    task = tasks.get(args.task)
    try:
        found, tells = running.evaluate(
            task, task_options.given(args, task.evaluation), args.weights, split=args.split, model=args.model
        )
    except tasks.TaskError as error:
        raise reported(error) from error
    if not tells:
        return 0
    for name, value in found.classes.items():
        print(f"  {name:30} {value:.4f}" if not math.isnan(value) else f"  {name:30} -")
    print(", ".join(f"{name} {value:.4f}" for name, value in found.metrics.items()), f"on {found.images} images")
    if args.json is not None:
        classes = {name: None if math.isnan(value) else value for name, value in found.classes.items()}
        facts = {"task": task.name, "metrics": found.metrics, "classes": classes, "images": found.images}
        files.write(args.json, json.dumps(facts, indent=2) + "\n")
    if task.plot and args.plot is not None and found.plot is not None:
        files.write(args.plot, found.plot)
    return 0
