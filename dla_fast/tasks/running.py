"""A task from its options to its result: training, evaluation of a split, prediction of images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import dla_fast
from dla_fast.tasks import engine, loading, options, processes, weights
from dla_fast.tasks.errors import DataError, TaskError
from dla_fast.tasks.layouts import files as layout_files
from dla_fast.tasks.task import Evaluation, Session, Task, memory_format


def train(
    task: Task,
    given: Mapping[str, Any],
    run: Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> Evaluation | None:
    """Train a network of a task.

    Args:
        task: from :func:`dla_fast.tasks.get`.
        given: options by name; the others have their defaults, or, of a run that goes on, the values it began with.
        run: the run's folder: ``config.json``, ``checkpoints``, ``steps.csv``, ``epochs.csv``, ``tensorboard``, and
            ``model.safetensors``, the best weights.
        resume: go on with the run that is there.
        say: where lines about it go.

    Returns:
        The last evaluation; None where the run had ended before.

    Raises:
        TaskError: an option, the data or a checkpoint is not what it should be.
        KeyboardInterrupt: asked to end; the run can go on.
    """
    saved = engine.saved_options(run, task) if resume else {}
    chosen = options.make(task.training, given, saved)
    if chosen.data:  # what uses the weights later may stand elsewhere
        chosen = dataclasses.replace(chosen, data=os.path.abspath(chosen.data))
    if resume:
        engine.check_resumed(saved, chosen)
    with processes.join(chosen.device) as joined, dla_fast.use_backend(chosen.backend):
        return engine.Trainer(task, chosen, run, joined, resume=resume, say=say).run()


@contextmanager
def _session(
    task: Task, given: Mapping[str, Any], source: Path, model: str | None, classes: Callable[[Any], Sequence[str]]
) -> Iterator[tuple[Session, weights.Facts]]:
    """A trained network and what it runs with; ``classes`` gives them from the options, where the file does not."""
    path = weights.find(source)
    facts = weights.facts_of(path)
    if facts is None and model is None:
        raise TaskError(f"--weights {source}: it does not say which network it is of; --model NAME does")
    if facts is not None and facts.task != task.name:
        raise TaskError(f"--weights {source}: it is a network of {facts.task}, not of {task.name}")
    # The size of a batch is training's; what else both have holds for both.
    saved = {name: value for name, value in (facts.options if facts else {}).items() if name != "batch"}
    chosen = options.make(task.evaluation, given, saved)
    if facts is None:
        facts = weights.Facts(task.name, str(model), list(task.classes or classes(chosen)), {})
    with processes.join(chosen.device) as joined, dla_fast.use_backend(chosen.backend):
        network = weights.load(path, facts, dense=task.dense, device=joined.device)
        network = network.to(memory_format=memory_format(chosen))  # type: ignore[call-overload]
        failures = loading.Failures(skip=chosen.broken == "skip")
        with torch.inference_mode():
            yield Session(network, joined, chosen, failures), facts


def evaluate(
    task: Task, given: Mapping[str, Any], source: Path, *, split: str = "val", model: str | None = None
) -> tuple[Evaluation, bool]:
    """Judge a network on a split of a data set.

    Args:
        task: from :func:`dla_fast.tasks.get`.
        given: options by name; the others are those that it was trained with, else the defaults.
        source: a run's folder, a file of weights, or a checkpoint of a run.
        split: "train", "val" or "test".
        model: the network's name, where the file does not say it.

    Returns:
        The evaluation, and whether this process is the one to tell it.

    Raises:
        TaskError: an option, the data or the weights are not what they should be.
    """

    def classes(chosen: Any) -> list[str]:
        task.check(chosen)
        return task.read(chosen, split).classes

    with _session(task, given, source, model, classes) as (session, facts):
        task.check(session.options)
        data = task.read(session.options, split, facts.classes)
        return task.evaluate(session, data), session.processes.is_first


def images(sources: Sequence[Path]) -> list[Path]:
    """Images, and those in folders.

    Raises:
        DataError: one is not there, or a folder has none.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            found += layout_files.images(source)
        elif source.is_file():
            found.append(source)
        else:
            raise DataError(f"{source}: there is no such file or folder")
    return found


def predict(
    task: Task,
    given: Mapping[str, Any],
    source: Path,
    paths: Sequence[Path],
    out: Path,
    *,
    model: str | None = None,
    classes: Sequence[str] | None = None,
) -> list[Path]:
    """Write what a network sees in images.

    Args:
        task: from :func:`dla_fast.tasks.get`.
        given: options by name; the others are those that it was trained with, else the defaults.
        source: a run's folder, a file of weights, or a checkpoint of a run.
        paths: images, and folders of them.
        out: the folder for pictures and tables.
        model: the network's name, where the file does not say it.
        classes: the names of its outputs, where the file does not say them.

    Returns:
        The files written.

    Raises:
        TaskError: an option, an image or the weights are not what they should be.
    """
    found = images(paths)

    def named(chosen: Any) -> Sequence[str]:
        if not classes:
            raise TaskError("--classes has to be given: the weights do not say the names of the network's outputs")
        return classes

    with _session(task, given, source, model, named) as (session, facts):
        return task.predict(session, found, facts, out)
