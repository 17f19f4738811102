"""The problems from which the list of shipped specialisations is drawn: nodes of the DLA networks, as meta tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dla_fast.kernels import launch
from dla_fast.ops.precision import fp32_precision

# Inputs, outputs, side of the map at 224x224: from one input to seven, and every width that the ten networks have.
_NODES = (
    ((64,), 128, 56),
    ((64, 64), 64, 56),
    ((128, 128, 64), 128, 28),
    ((128, 128, 64, 128), 128, 28),
    ((256, 256, 128, 256, 256), 256, 14),
    ((512, 512, 256), 512, 7),
    ((512, 512, 256, 512, 512, 512, 512), 512, 14),
    ((1024, 1024, 512), 1024, 7),
)


@dataclass(frozen=True)
class Example:
    """A node, its dtype and layout, and the variants of its epilogue that ship.

    Attributes:
        channels: of each input.
        out_channels: of the output.
        side: of the map in pixels.
        batch: images.
        dtype: of the tensors.
        channels_last: layout.
        acts: activations.
        residuals: whether the first input is added before the activation.
        frozen: also without batch statistics.
        strict: float32 is multiplied as such, not as TF32.
    """

    channels: tuple[int, ...]
    out_channels: int
    side: int
    batch: int
    dtype: torch.dtype
    channels_last: bool
    acts: tuple[str, ...] = ("relu",)
    residuals: tuple[bool, ...] = (False,)
    frozen: bool = False
    strict: bool = False

    @property
    def label(self) -> str:
        """The example in a few characters."""
        layout = "nhwc" if self.channels_last else "nchw"
        return f"{'+'.join(map(str, self.channels))}to{self.out_channels}@{self.batch}x{self.side} {layout}"


def roots() -> Iterator[Example]:
    """Nodes in every dtype: all of them in bfloat16 channels_last, and fewer where the kernels differ less."""
    for channels, out_channels, side in _NODES:
        residuals = (False, True) if len(channels) == 5 or out_channels == 1024 else (False,)
        yield Example(channels, out_channels, side, 256, torch.bfloat16, True, ("relu",), residuals)
    for channels, out_channels, side in (_NODES[1], _NODES[5]):
        yield Example(channels, out_channels, side, 1, torch.bfloat16, True)
        yield Example(channels, out_channels, side, 32, torch.bfloat16, False)
        yield Example(channels, out_channels, side, 32, torch.float32, False)
    for channels, out_channels, side in (_NODES[1], _NODES[5]):
        yield Example(channels, out_channels, side, 32, torch.float16, True)
        yield Example(channels, out_channels, side, 32, torch.float32, True)
    channels, out_channels, side = _NODES[1]
    others = ("identity", "silu", "leaky_relu", "hardswish")
    yield Example(channels, out_channels, side, 32, torch.bfloat16, True, others, frozen=True)
    yield Example(channels, out_channels, side, 32, torch.float32, False, strict=True)
    # Masked in every direction, and float64.
    yield Example((24, 5), 17, 9, 2, torch.float32, True)
    yield Example((24, 5), 24, 9, 2, torch.float16, False, ("relu",), (True,))
    yield Example((64, 64), 64, 14, 2, torch.float64, True)
    yield Example((128, 128, 64), 128, 14, 2, torch.float64, False)


def maps() -> Iterator[Example]:
    """Maps for the passes over every value."""
    for channels, side, batch in ((16, 224, 32), (64, 56, 256), (512, 7, 256)):
        yield Example((channels,), channels, side, batch, torch.bfloat16, True, ("relu",), (False, True))
        yield Example((channels,), channels, side, batch, torch.bfloat16, False)
    for channels_last in (True, False):
        yield Example((64,), 64, 56, 32, torch.float32, channels_last, ("relu",), (False, True))
    yield Example((64,), 64, 56, 32, torch.bfloat16, True, ("silu", "hardswish", "leaky_relu", "identity"))
    yield Example((64,), 64, 56, 32, torch.float16, True)
    yield Example((24,), 24, 9, 2, torch.float64, False)


@contextlib.contextmanager
def recording(example: Example) -> Iterator[list[launch.Launch]]:
    """Record the launches of an example, with float32's switch as the example has it."""
    with fp32_precision("ieee" if example.strict else "tf32"), launch.record() as launches:
        yield launches


def tensor(example: Example, channels: int) -> Tensor:
    """A meta tensor of the example's map."""
    layout = torch.channels_last if example.channels_last else torch.contiguous_format
    sizes = (example.batch, channels, example.side, example.side)
    return torch.empty(sizes, dtype=example.dtype, device="meta", memory_format=layout)


def tensors(example: Example) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs, weight and a map of the output, on meta."""
    xs = [tensor(example, c) for c in example.channels]
    weight = torch.empty(example.out_channels, sum(example.channels), 1, 1, dtype=example.dtype, device="meta")
    return xs, weight, tensor(example, example.out_channels)
