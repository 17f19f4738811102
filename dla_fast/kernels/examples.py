"""The problems from which the list of shipped specialisations is drawn: nodes of the DLA networks, as meta tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dla_fast.kernels import launch
from dla_fast.ops.layout import accumulation_dtype
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
        side: of the output in pixels.
        batch: images.
        dtype: of the tensors.
        channels_last: layout.
        acts: activations.
        residuals: whether the first input is added before the activation.
        frozen: also without batch statistics.
        strict: float32 is multiplied as such, not as TF32.
        kernel: side of the kernel.
        factor: by which the last input is upsampled; 1 for none.
        stride: of the convolution.
        dilation: of the convolution.
        pre: the input that is z of the unit before, or -1; ``residuals`` and ``acts`` are that unit's then.
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
    kernel: int = 1
    factor: int = 1
    stride: int = 1
    dilation: int = 1
    pre: int = -1

    @property
    def label(self) -> str:
        """The example in a few characters."""
        layout = "nhwc" if self.channels_last else "nchw"
        options = {"f": self.factor, "k": self.kernel, "s": self.stride, "d": self.dilation}
        more = "".join(f" {name}{value}" for name, value in options.items() if value > 1)
        more += f" z{self.pre}" if self.pre >= 0 else ""
        return f"{'+'.join(map(str, self.channels))}to{self.out_channels}@{self.batch}x{self.side} {layout}{more}"

    @property
    def factors(self) -> list[int]:
        """Of each input."""
        return [1] * (len(self.channels) - 1) + [self.factor]


def roots() -> Iterator[Example]:
    """Nodes in every dtype: all of them in bfloat16 channels_last, and fewer where the kernels differ less."""
    for channels, out_channels, side in _NODES:
        residuals = (False, True) if len(channels) == 5 or out_channels == 1024 else (False,)
        yield Example(channels, out_channels, side, 256, torch.bfloat16, True, ("relu",), residuals)
    # Contiguous maps of many pixels, whose vectors are shorter at 14 x 14.
    yield Example((128, 128), 128, 28, 256, torch.bfloat16, False)
    yield Example((256, 256), 256, 14, 256, torch.bfloat16, False)
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


def blocks() -> Iterator[Example]:
    """Convolutions of one input: of the residual blocks, and those that shrink or dilate."""
    bf16, both = torch.bfloat16, (False, True)
    yield Example((64,), 64, 56, 256, bf16, True, ("relu",), both, kernel=3)
    yield Example((64,), 64, 56, 32, bf16, False, ("relu",), both, kernel=3)
    yield Example((64,), 128, 28, 256, bf16, True, kernel=3, stride=2)
    yield Example((64,), 128, 28, 32, torch.float32, False, kernel=3, stride=2)
    yield Example((64,), 128, 28, 256, bf16, True, ("identity",), stride=2)
    yield Example((512,), 512, 7, 256, bf16, True, ("relu",), both, kernel=3, dilation=2)
    # Masked in every direction, and float64.
    yield Example((24,), 17, 9, 2, torch.float16, True, kernel=3, stride=2, dilation=2)
    yield Example((16,), 16, 8, 2, torch.float64, False, ("relu",), both, kernel=3, stride=2)


def chains() -> Iterator[Example]:
    """1 x 1 nodes of whose inputs one is z of the unit before: a bottleneck's last convolution, and roots."""
    bf16, both = torch.bfloat16, (False, True)
    for channels, out_channels, side in (((64,), 128, 56), ((128,), 256, 28), ((256,), 512, 14)):
        yield Example(channels, out_channels, side, 256, bf16, True, pre=0)
    yield Example((64, 64), 64, 56, 256, bf16, True, ("relu",), both, pre=0)
    yield Example((128, 128, 64), 128, 28, 256, bf16, True, ("relu",), both, pre=0)
    yield Example((256, 256, 128, 256, 256), 256, 14, 256, bf16, True, ("relu",), (True,), pre=0)
    yield Example((64,), 128, 56, 32, bf16, False, pre=0)
    yield Example((128, 128), 128, 28, 32, bf16, False, ("relu",), (True,), pre=1)
    others = ("identity", "silu", "leaky_relu", "hardswish")
    yield Example((64,), 64, 56, 32, bf16, True, others, pre=0)
    for channels_last in (True, False):
        yield Example((64, 64), 64, 56, 32, torch.float32, channels_last, ("relu",), both, pre=0)
    yield Example((64, 64), 64, 56, 32, torch.float16, True, ("relu",), (True,), pre=1)
    yield Example((64, 64), 64, 56, 32, torch.float32, True, ("relu",), (True,), strict=True, pre=0)
    # Masked in every direction, and float64.
    yield Example((24, 5), 17, 9, 2, torch.float16, False, ("relu",), (True,), pre=1)
    yield Example((64, 64), 64, 14, 2, torch.float64, True, ("relu",), (True,), pre=0)


# Channels of either input and the output, side of the output at 512 x 512: the nodes of the IDA ladders.
_LADDERS = ((64, 128), (128, 64), (256, 32))


def ladders() -> Iterator[Example]:
    """Nodes of the IDA ladders, whose second input is upsampled."""
    for c, side in _LADDERS:
        for batch in (1, 16):
            yield Example((c, c), c, side, batch, torch.bfloat16, True, kernel=3, factor=2)
        yield Example((c, c), c, side, 16, torch.bfloat16, False, kernel=3, factor=2)
        yield Example((c, c), c, side, 16, torch.float32, False, kernel=3, factor=2)
    yield Example((64, 64), 64, 128, 16, torch.bfloat16, True, factor=4)
    yield Example((64, 64), 64, 128, 16, torch.float16, True, kernel=3, factor=2)
    # Masked in every direction, and float64.
    yield Example((24, 5), 24, 8, 2, torch.float32, True, kernel=3, factor=2)
    yield Example((16, 16), 16, 8, 2, torch.float64, False, kernel=3, factor=2)


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


def tensor(example: Example, channels: int, side: int | None = None) -> Tensor:
    """A meta tensor of the example's map, or of one with another side."""
    layout = torch.channels_last if example.channels_last else torch.contiguous_format
    sides = (example.side if side is None else side,) * 2
    return torch.empty((example.batch, channels, *sides), dtype=example.dtype, device="meta", memory_format=layout)


def tensors(example: Example) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Inputs, kernels of those that are upsampled, weight and a map of the output, on meta."""
    k, f, side = example.kernel, example.factor, example.side * example.stride
    xs = [tensor(example, c, side // g) for c, g in zip(example.channels, example.factors, strict=True)]
    ups = [torch.empty(example.channels[-1], 1, 2 * f, 2 * f, dtype=example.dtype, device="meta")] if f > 1 else []
    weight = torch.empty(example.out_channels, sum(example.channels), k, k, dtype=example.dtype, device="meta")
    if example.channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return xs, ups, weight, tensor(example, example.out_channels)


def prologue(example: Example, act: str, residual: bool) -> tuple[Any, ...]:
    """What the operators take of the input that is z of the unit before, on meta."""
    channels = example.channels[example.pre]
    vector = torch.empty(channels, dtype=accumulation_dtype(example.dtype), device="meta")
    return example.pre, tensor(example, channels) if residual else None, *[vector] * 4, 1e-5, act, 0.0
