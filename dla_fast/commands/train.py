"""``python -m dla_fast train TASK``: train a network on a data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dla_fast import tasks
from dla_fast.commands import UsageError, task_options
from dla_fast.commands.options import reported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``train``."""
    task_options.add_tasks(parser, _add)


def _add(parser: argparse.ArgumentParser, task: Any) -> None:
    parser.add_argument("--out", type=Path, help="folder of a new run: checkpoints, weights, tables, TensorBoard")
    parser.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder, with the options it has"
    )
    task_options.add_options(parser, task.training)


def run(args: argparse.Namespace) -> int:
    """Train; returns 0."""
    if (args.out is None) == (args.resume is None):
        raise UsageError("give --out for a new run, or --resume for one to go on with")
    from dla_fast.tasks import running

    task = tasks.get(args.task)
    folder = args.resume or args.out
    try:
        options = task_options.given(args, task.training)
        found = running.train(task, options, folder, resume=args.resume is not None, say=_say)
    except tasks.TaskError as error:
        raise reported(error) from error
    if found is None:
        _say("the run had ended")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)
