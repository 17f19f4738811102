"""The networks of ``python -m benchmarks.swapped``, what they are fed, and one pass of each."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast._timm import import_timm
from dla_fast.bench import networks
from dla_fast.bench.cases import LAYOUTS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLASSES = 19  # of the segmenter, as in Cityscapes


@dataclass(frozen=True)
class Model:
    """A network, its images' side, and the batches that it is run with: one image to infer, more to train."""

    name: str
    size: int
    inference: int
    training: int

    def batches(self, mode: str, wanted: list[int] | None) -> list[int]:
        """The batch of a mode, or those that were asked for."""
        return wanted or [self.inference if mode == "inference" else self.training]


MODELS = {m.name: m for m in (Model("dla34", 224, 1, 8), Model("detector", 512, 1, 2), Model("segmenter", 512, 1, 2))}


def _example(name: str) -> Any:
    """A module of examples/, found as ``python examples/<name>.py`` finds it."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def build(name: str) -> nn.Module:
    """A network as its authors have it, with the same weights every time."""
    torch.manual_seed(0)
    model: nn.Module
    if name == "dla34":
        model = import_timm().create_model("dla34")
    elif name == "detector":
        model = _example("networks").Detector()
    else:
        model = _example("networks").Segmenter(CLASSES)
    return model


def batch_of(name: str, count: int, size: int, layout: str) -> tuple[Tensor, Callable[[Any], Tensor]]:
    """Images, and the loss of what the network gives for them."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
    if name == "dla34":
        labels = torch.randint(1000, (count,), generator=generator)
    elif name == "segmenter":
        labels = torch.randint(CLASSES, (count, size, size), generator=generator)
    else:
        images, _, objects = _example("common").scenes(count, size, generator)
        wanted = _example("detector").targets(objects, size // 4)
    images = images.to(memory_format=LAYOUTS[layout])
    if name == "detector":
        return images, lambda outputs: _example("detector").loss(outputs, wanted)
    return images, lambda outputs: F.cross_entropy(outputs, labels)


def training_step(
    model: Callable[..., Any], parameters: list[nn.Parameter], images: Tensor, loss: Callable[[Any], Tensor]
) -> Callable[[], Tensor]:
    """A function that trains one step and gives the loss; the gradients stay until the next."""
    optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(model(images))
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def inference(model: Callable[..., Any], images: Tensor) -> Callable[[], list[Tensor]]:
    """A function that infers, and gives the outputs."""

    def infer() -> list[Tensor]:
        with torch.inference_mode():
            return networks.tensors_of(model(images))

    return infer
