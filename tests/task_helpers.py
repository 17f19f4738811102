"""Tiny data and options for the tasks' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("dark", "light", "red")
# A training of 2 epochs with 3 steps each.
TINY = {
    "model": "dla46_c",
    "size": 32,
    "epochs": 2,
    "batch": 6,
    "optimizer": "adamw",
    "lr": 0.003,
    "schedule": "cosine",
    "resize": 1.0,
    "workers": 0,
    "save_every": 2,
}


def colours(root: Path, each: int = 6, splits: tuple[str, ...] = ("train", "val"), side: int = 32) -> Path:
    """An ImageFolder of noise in three colours, ``each`` images a class."""
    draw = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(each):
                pixels = draw.integers(0, 90, (side, side, 3))
                pixels += 150 * np.array([(0, 0, 0), (1, 1, 1), (1, 0, 0)][label])
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def session(model: Any, kind: type, **given: Any) -> Any:
    """What an evaluation of a model runs with, in this process; an image that cannot be read fails."""
    import pytest
    import torch

    from dla_fast.tasks import loading, options
    from dla_fast.tasks.processes import Processes
    from dla_fast.tasks.task import Session

    failures = loading.Failures(skip=False, say=pytest.fail)
    chosen = options.make(kind, {"workers": 0, **given})
    return Session(model, Processes(0, 1, torch.device("cpu")), chosen, failures)


def curve(run: Path) -> list[tuple[str, ...]]:
    """A run's losses and learning rates as they were written."""
    from dla_fast.tasks import logs

    return [tuple(row[name] for name in ("step", "epoch", "loss", "lr")) for row in logs.rows(run / logs.STEPS)]


def train(data: Path, run: Path, task: str = "classification", **given: Any) -> Any:
    """Train in this process, with tiny options where none are given."""
    from dla_fast import tasks
    from dla_fast.tasks import running

    resume = given.pop("resume", False)
    common = {} if resume else {**TINY, "data": str(data), "layout": "folder"}
    lines: list[str] = given.pop("lines", [])
    return running.train(tasks.get(task), {**common, **given}, run, resume=resume, say=lines.append)
