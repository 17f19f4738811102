"""The paper's four tasks: networks trained, evaluated and used on the layouts that their data comes in.

``python -m dla_fast train | evaluate | predict TASK``; from Python those of
:mod:`dla_fast.tasks.running`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from dla_fast.tasks.errors import DataError, TaskError

# What the others import may be missing, and is to be told in a line.
if TYPE_CHECKING:
    from dla_fast.tasks.task import Task

__all__ = ["EXTRAS", "NAMES", "DataError", "TaskError", "get"]

# By name, where each is.
NAMES = {
    "classification": "classification.Classification",
    "fine-grained": "classification.FineGrainedRecognition",
    "segmentation": "segmentation.Segmentation",
    "boundary": "boundary.Boundary",
}

EXTRAS = {
    "timm": "timm",
    "PIL": "pillow",
    "torchvision": "torchvision",
    "scipy": "scipy",
    "skimage": "scikit-image",
    "torchmetrics": "torchmetrics",
    "tensorboard": "tensorboard",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}


def get(name: str) -> Task:
    """A task by its name, one of :data:`NAMES`; the packages in :data:`EXTRAS` have to be there."""
    module, kind = NAMES[name].split(".")
    task: Task = getattr(importlib.import_module(f"dla_fast.tasks.{module}"), kind)()
    return task
