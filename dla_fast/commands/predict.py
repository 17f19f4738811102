"""``python -m dla_fast predict TASK``: what a trained network sees in images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dla_fast import tasks
from dla_fast.commands import task_options
from dla_fast.commands.options import reported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``predict``."""
    task_options.add_tasks(parser, _add)


def _add(parser: argparse.ArgumentParser, task: Any) -> None:
    parser.add_argument("images", type=Path, nargs="+", help="images, and folders of them")
    parser.add_argument(
        "--weights", type=Path, required=True, help="a run's folder, its model.safetensors, or any checkpoint"
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder for pictures and tables")
    parser.add_argument("--model", help="the network, where the weights are from elsewhere")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="and the names of its outputs, a line each")
    task_options.add_options(parser, task.evaluation)


def run(args: argparse.Namespace) -> int:
    """Predict; returns 0."""
    from dla_fast.tasks import running

    task = tasks.get(args.task)
    try:
        classes = args.classes.read_text(encoding="utf-8").split("\n") if args.classes else None
        written = running.predict(
            task,
            task_options.given(args, task.evaluation),
            args.weights,
            args.images,
            args.out,
            model=args.model,
            classes=[name.strip() for name in classes if name.strip()] if classes else None,
        )
    except OSError as error:
        raise reported(tasks.TaskError(f"--classes {args.classes}: {error}")) from error
    except tasks.TaskError as error:
        raise reported(error) from error
    print(f"{len(written)} files in {args.out}")
    return 0
