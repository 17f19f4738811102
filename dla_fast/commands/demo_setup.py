"""What the demo works on: photographs, timm's networks, and one step of inference or training."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dla_fast._timm import import_timm
from dla_fast.commands import CommandError, UsageError

EXTRAS = {"timm": "timm", "sklearn": "scikit-learn", "PIL": "pillow", "matplotlib": "matplotlib", "tqdm": "tqdm"}

# The comparison that the demo's last line quotes.
LOGITS = "logits, evaluation, float32"

# What every crop is from, in the order in which scikit-learn gives them and crops take turns.
PHOTOGRAPHS = ("china.jpg", "flower.jpg")

# Normalisation of the networks' training images.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Task:
    """The options that decide what is computed."""

    model: str
    batch: int
    size: int
    device: str
    channels_last: bool
    pretrained: bool

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def photographs(count: int, size: int) -> Tensor:
    """Square crops of the two photographs that scikit-learn ships, values 0 to 1, (count, 3, size, size).

    Where a crop lies and how large it is follows from its number alone.
    """
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    by_name = {os.path.basename(name): image for name, image in zip(found.filenames, found.images, strict=True)}
    images = [torch.tensor(by_name[name]).permute(2, 0, 1).float() / 255 for name in PHOTOGRAPHS]
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(count):
        image = images[i % len(images)]
        height, width = image.shape[1:]
        scale, down, right = torch.rand(3, generator=generator).tolist()
        side = int(min(height, width) * (0.5 + 0.5 * scale))
        top, left = int(down * (height - side)), int(right * (width - side))
        crop = image[None, :, top : top + side, left : left + side]
        crops.append(nn.functional.interpolate(crop, size=(size, size), mode="bilinear", antialias=True))
    return torch.cat(crops)


def make_inputs(task: Task) -> tuple[Tensor, Tensor]:
    """A normalised batch of photographs, and a label for each."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
    x = (photographs(task.batch, task.size) - mean) / std
    labels = torch.arange(task.batch) * 37 % 1000
    return x.to(task.device, memory_format=task.memory_format), labels.to(task.device)


def make_model(task: Task) -> nn.Module:
    """timm's network, with the same weights every time.

    Raises:
        UsageError: timm has no such DLA.
        CommandError: its weights cannot be fetched.
    """
    timm = import_timm()
    known = timm.list_models("dla*")
    if task.model not in known:
        raise UsageError(f"--model {task.model}: expected a DLA of timm, one of {', '.join(known)}")
    torch.manual_seed(0)
    try:
        model: nn.Module = timm.create_model(task.model, pretrained=task.pretrained)
    except Exception as error:
        if not task.pretrained:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"--pretrained: the weights could not be fetched: {reason}") from error
    return in_format(model.to(task.device), task.memory_format).eval()


def in_format(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """``model`` with its convolutions in this memory format."""
    result: nn.Module = model.to(memory_format=memory_format)  # type: ignore[call-overload]
    return result


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call of the network in evaluation mode."""

    def step() -> Tensor:
        with torch.inference_mode():
            result: Tensor = model(x)
            return result

    model.eval()
    return step


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Forward, backward and SGD, in training mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    model.train()
    return step


def detached(value: Any, requires_grad: bool) -> Any:
    """The arguments of a module with every tensor copied, as leaves of their own graph."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(requires_grad and value.is_floating_point())
    if isinstance(value, (list, tuple)):
        return type(value)(detached(v, requires_grad) for v in value)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors among the arguments of a module."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_of(v)]
    return []


def unnormalised(x: Tensor) -> Tensor:
    """The photographs of a batch as they were, values 0 to 1, on the CPU."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _STD))
    return (x.detach().cpu().contiguous() * std + mean).clamp(0, 1)
