"""What host functions share: how a node's tensors lie, and the constants that follow from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dla_fast.kernels import config
from dla_fast.ops.layout import accumulation_dtype, empty_like_layout, is_channels_last, node_channels_last
from dla_fast.ops.precision import tf32_products

_LARGE = 2**31


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton dtype that sums are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """How a product rounds its float32 operands, as PyTorch's convolutions would."""
    return "tf32" if dtype == torch.float32 and tf32_products() else "ieee"


def signature(xs: Sequence[Tensor], weight: Tensor) -> Any:
    """What a plan depends on, cheaply: shapes, strides, dtype, device, float32's switch, the table."""
    described = tuple([(x.shape, x.stride()) for x in xs])
    rest = weight.shape, weight.stride(), weight.dtype, weight.device, precision(weight.dtype)
    return described, rest, config.generation


def format_of(channels_last: bool) -> torch.memory_format:
    """The memory format of a layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def arranged(t: Tensor, channels_last: bool) -> Tensor:
    """The tensor in the layout that a kernel walks; copied only where it has another."""
    return t.contiguous(memory_format=format_of(channels_last))


@dataclass(frozen=True)
class Node:
    """An aggregation node's sizes and layout."""

    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int, int, int]  # images, height, width
    channels: tuple[int, ...]
    starts: tuple[int, ...]
    out_channels: int
    channels_last: bool

    @staticmethod
    def of(xs: Sequence[Tensor], weight: Tensor) -> Node:
        """Describe the node of these inputs.

        Raises:
            ValueError: no inputs, or channels that do not add up to the weight's.
        """
        if not xs:
            raise ValueError("xs: expected at least one input, got none")
        channels = tuple(int(x.shape[1]) for x in xs)
        starts = tuple(sum(channels[:i]) for i in range(len(channels)))
        if sum(channels) != weight.shape[1]:
            raise ValueError(f"weight: expected {sum(channels)} input channels, got {weight.shape[1]}")
        images, _, height, width = xs[0].shape
        cl = node_channels_last(xs, weight)
        return Node(weight.dtype, weight.device, (images, height, width), channels, starts, int(weight.shape[0]), cl)

    @property
    def total(self) -> int:
        """Pixels over all images."""
        return self.sizes[0] * self.pixels

    @property
    def pixels(self) -> int:
        """Pixels of an image."""
        return self.sizes[1] * self.sizes[2]

    @property
    def depth(self) -> int:
        """Input channels over all inputs."""
        return sum(self.channels)

    @property
    def step(self) -> int:
        """The largest step through the inputs' channels."""
        return config.channel_block(self.channels, 128)

    @property
    def arch(self) -> int:
        """The device's architecture."""
        return config.arch_of(self.device)

    @property
    def acc(self) -> Any:
        """The accumulation dtype, Triton's."""
        return accumulator(self.dtype)

    @property
    def precision(self) -> str:
        """See :func:`precision`."""
        return precision(self.dtype)

    @property
    def exact(self) -> bool:
        """Whether float32 is multiplied as such."""
        return self.dtype == torch.float32 and self.precision == "ieee"

    @property
    def large(self) -> bool:
        """Whether an offset into one of the tensors passes 32 bits."""
        # A tile may reach past the last pixel before its mask says so.
        return (self.total + 1024) * max(*self.channels, self.out_channels) >= _LARGE

    def arrange(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs in the node's layout."""
        return tuple([arranged(x, self.channels_last) for x in xs])

    def output(self, like: Tensor) -> Tensor:
        """A new tensor of the node's output."""
        images, height, width = self.sizes
        return empty_like_layout(like, (images, self.out_channels, height, width), self.channels_last)


@dataclass(frozen=True)
class Map:
    """Sizes and layout of one (N, C, H, W) tensor for the passes over its values."""

    total: int
    pixels: int
    channels: int
    channels_last: bool
    dtype: torch.dtype
    cfg: config.TileConfig

    @staticmethod
    def of(z: Tensor, channels_last: bool | None = None) -> Map:
        """Describe a tensor; the layout is its own unless another is asked for."""
        images, channels, height, width = z.shape
        cl = is_channels_last(z) if channels_last is None else channels_last
        total = images * height * width
        cfg = config.choose("elementwise", total, 0, channels, z.dtype, config.arch_of(z.device), 0, cl)
        return Map(total, height * width, channels, cl, z.dtype, cfg)

    @property
    def tiles(self) -> int:
        """Tiles of pixels."""
        return -(-self.total // self.cfg.block_m)

    @property
    def blocks(self) -> int:
        """Tiles of channels."""
        return -(-self.channels // self.cfg.block_n)

    @property
    def large(self) -> bool:
        """Whether an offset passes 32 bits."""
        return (self.total + 1024) * self.channels >= _LARGE

    def constexprs(self) -> dict[str, Any]:
        """Those of every pass."""
        return {
            "BM": self.cfg.block_m,
            "BN": self.cfg.block_n,
            "CL": self.channels_last,
            "EVEN": self.channels % self.cfg.block_n == 0,
            "ACC": accumulator(self.dtype),
            "I64": self.large,
        }


def vectors(like: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Two new vectors of per-channel statistics in the accumulation dtype."""
    dtype = accumulation_dtype(like.dtype)
    return like.new_empty(channels, dtype=dtype), like.new_empty(channels, dtype=dtype)


def like(z: Tensor, channels_last: bool) -> Tensor:
    """A new tensor of the same sizes in a layout."""
    return empty_like_layout(z, z.shape, channels_last)


def inverse(count: float) -> float:
    """1 / count; an empty batch has no terms that it could scale."""
    return 1.0 / count if count > 0 else 0.0
