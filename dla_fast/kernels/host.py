"""What host functions share: how a node's tensors lie, and the constants that follow from that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dla_fast import checks
from dla_fast.kernels import config
from dla_fast.ops.layout import accumulation_dtype, empty_like_layout, is_channels_last, node_channels_last
from dla_fast.ops.precision import tf32_products

_LARGE = 2**31
# Programs that CUDA launches along a grid's second dimension.
_MOST_ROWS = 65535


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton dtype that sums are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """How a product rounds its float32 operands, as PyTorch's convolutions would."""
    return "tf32" if dtype == torch.float32 and tf32_products() else "ieee"


class Norm(NamedTuple):
    """A batch norm as the kernels take it, in their order: dense vectors."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def of(mean: Tensor, var: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None) -> Norm:
        """A norm of vectors with any stride."""
        return Norm(mean.contiguous(), var.contiguous(), *dense(bn_weight, bn_bias))


class Running(NamedTuple):
    """What moves with a batch: the running statistics, or None, and by how much.

    Attributes:
        bias: (C,) or None, added to what the running mean moves towards.
        mean: (C,) or None, updated in place.
        var: (C,) or None, updated in place.
        momentum: weight of this batch.
    """

    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    momentum: float


def dense(*vectors: Tensor | None) -> list[Tensor | None]:
    """Vectors as the kernels read them: one value after the other; copied only where it is not so."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def format_of(channels_last: bool) -> torch.memory_format:
    """The memory format of a layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def arranged(t: Tensor, channels_last: bool) -> Tensor:
    """The tensor in the layout that a kernel walks; copied only where it has another."""
    return t.contiguous(memory_format=format_of(channels_last))


def optional(t: Tensor | None, channels_last: bool) -> Tensor | None:
    """:func:`arranged`, of a tensor that may be absent."""
    return None if t is None else arranged(t, channels_last)


def in_layout(t: Tensor, channels_last: bool) -> Tensor:
    """The tensor with the very strides that an operator promises of a layout, sides of length 1 included."""
    out = empty_like_layout(t, t.shape, channels_last)
    return t if t.stride() == out.stride() else out.copy_(t)


@dataclass(frozen=True)
class Node:
    """A node's sizes and layout.

    Attributes:
        dtype: of its tensors.
        device: of its tensors.
        images: of its maps.
        sides: height and width of its inputs, those at low resolution upsampled.
        output_sizes: of its output, (N, C, H, W).
        channels: of each input.
        starts: the weight's first input channel of each input.
        out_channels: of the output.
        kernel: side of the kernel.
        channels_last: layout.
    """

    dtype: torch.dtype
    device: torch.device
    images: int
    sides: tuple[int, int]
    output_sizes: tuple[int, int, int, int]
    channels: tuple[int, ...]
    starts: tuple[int, ...]
    out_channels: int
    kernel: int
    channels_last: bool

    @staticmethod
    def of(
        xs: Sequence[Tensor],
        weight: Tensor,
        factors: Sequence[int] | None = None,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> Node:
        """Describe the node of these inputs.

        Raises:
            ValueError: no inputs, or channels that do not add up to the weight's.
        """
        if not xs:
            raise ValueError("xs: expected at least one input, got none")
        channels = tuple(int(x.shape[1]) for x in xs)
        starts = tuple(sum(channels[:i]) for i in range(len(channels)))
        if sum(channels) != weight.shape[1] * groups:
            raise ValueError(f"weight: expected {sum(channels) // groups} input channels, got {weight.shape[1]}")
        factor, kernel = factors[0] if factors else 1, int(weight.shape[2])
        height, width = (checks.upsampled(s, factor) if factor > 1 else int(s) for s in xs[0].shape[2:])
        return Node(
            dtype=weight.dtype,
            device=weight.device,
            images=int(xs[0].shape[0]),
            sides=(height, width),
            output_sizes=(
                int(xs[0].shape[0]),
                int(weight.shape[0]),
                checks.convolved(height, kernel, stride, dilation),
                checks.convolved(width, kernel, stride, dilation),
            ),
            channels=channels,
            starts=starts,
            out_channels=int(weight.shape[0]),
            kernel=kernel,
            channels_last=node_channels_last(xs, weight),
        )

    @property
    def total(self) -> int:
        """Pixels of the output over all images."""
        return self.images * self.pixels

    @property
    def pixels(self) -> int:
        """Pixels of an image of the output."""
        return self.output_sizes[2] * self.output_sizes[3]

    @property
    def depth(self) -> int:
        """Input channels over all inputs."""
        return sum(self.channels)

    @property
    def step(self) -> int:
        """The largest step through the inputs' channels."""
        return config.channel_block(self.channels, 128)

    @property
    def widest(self) -> int:
        """The power of two that holds the channels of the widest input, or a step of 128 through them."""
        return config.power_of_two(max(self.channels), 16, 128)

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
        most = max(self.total, self.images * self.sides[0] * self.sides[1])
        return (most + 1024) * max(*self.channels, self.out_channels) >= _LARGE

    @property
    def alignment(self) -> int:
        """Pixels in a row that always lie side by side, and start at a multiple of as many: for 16 bytes at most."""
        return math.gcd(self.pixels, 16 // self.dtype.itemsize)

    def arrange(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs in the node's layout."""
        return tuple([arranged(x, self.channels_last) for x in xs])

    def output(self, like: Tensor) -> Tensor:
        """A new tensor of the node's output."""
        return empty_like_layout(like, self.output_sizes, self.channels_last)

    def tile(self, cfg: config.TileConfig) -> dict[str, Any]:
        """The constexprs of every kernel that multiplies, in order."""
        return {
            "BM": cfg.block_m,
            "BN": cfg.block_n,
            "BK": cfg.block_k,
            "CL": self.channels_last,
            "EVEN_M": self.total % cfg.block_m == 0,
            "EVEN_K": cfg.block_k > 0 and all(c % cfg.block_k == 0 for c in self.channels),
            "EVEN_N": self.out_channels % cfg.block_n == 0,
            "PRECISION": self.precision,
            "ACC": self.acc,
            "I64": self.large,
            "ALIGN": self.alignment,
        }


@dataclass(frozen=True)
class Map:
    """Sizes and layout of one (N, C, H, W) tensor for the passes over its values.

    Attributes:
        total: pixels over all images.
        pixels: of an image.
        channels: as the kernels walk them.
        channels_last: layout, as the kernels walk it.
        dtype: of the tensor.
        cfg: the passes' tile.
        arch: the device's architecture.
        span: neighbours along ``channels`` that are one channel of the norm.
    """

    total: int
    pixels: int
    channels: int
    channels_last: bool
    dtype: torch.dtype
    cfg: config.TileConfig
    arch: int
    span: int = 1

    @staticmethod
    def of(z: Tensor, channels_last: bool | None = None) -> Map:
        """Describe a tensor; the layout is its own unless another is asked for."""
        images, channels, height, width = z.shape
        cl = is_channels_last(z) if channels_last is None else channels_last
        total = images * height * width
        arch = config.arch_of(z.device)
        cfg = config.choose("elementwise", total, 0, channels, z.dtype, arch, 0, cl)
        return Map(total, height * width, channels, cl, z.dtype, cfg, arch)

    def flat(self) -> Map:
        """The same map for a pass without sums: a contiguous image whose planes end amid 16 bytes is one row of
        all its values, as if each were a channel. Norms are then gathered, and loads are wide."""
        plane, wide = self.channels * self.pixels, 16 // self.dtype.itemsize
        if self.channels_last or self.pixels % wide == 0 or plane % 16:
            return self
        images = self.total // self.pixels
        cfg = config.choose("elementwise", images, 0, plane, self.dtype, self.arch, 0, True)
        return Map(images, 1, plane, True, self.dtype, cfg, self.arch, self.pixels)

    @property
    def tiles(self) -> int:
        """Tiles of pixels."""
        return -(-self.total // self.cfg.block_m)

    @property
    def blocks(self) -> int:
        """Tiles of channels."""
        return -(-self.channels // self.cfg.block_n)

    def halved(self) -> Map:
        """With a tile of half the pixels, for a pass that holds twice as much of each."""
        return replace(self, cfg=replace(self.cfg, block_m=max(1, self.cfg.block_m // 2)))

    @property
    def parts(self) -> int:
        """In how many steps a tile is added up: a thread's sums are of one access's width, its loads of all steps."""
        access = 32 * self.cfg.num_warps * 16 // self.dtype.itemsize
        return min(config.power_of_two(self.cfg.block_m * self.cfg.block_n // access, 1, 4), self.cfg.block_m)

    @property
    def large(self) -> bool:
        """Whether an offset passes 32 bits."""
        return (self.total + 1024) * self.channels >= _LARGE

    def each(self, most: int, waves: int = 4) -> int:
        """Tiles that a program takes one after the other: about as many as leave so many times a GPU's programs."""
        few = max(1, min(-(-self.tiles * self.blocks // (waves * config.PROGRAMS)), most))
        if self.channels_last:
            few = max(few, -(-self.tiles // _MOST_ROWS))
        # As many programs, but all with about as many tiles.
        return max(1, -(-self.tiles // max(1, -(-self.tiles // few))))

    def grid(self, each: int) -> tuple[int, int]:
        """Programs for so many tiles each, as ``program_of`` reads it."""
        groups = -(-self.tiles // each)
        return (self.blocks, groups) if self.channels_last else (groups, self.blocks)

    def constexprs(self) -> dict[str, Any]:
        """Those of every pass."""
        return {
            "BM": self.cfg.block_m,
            "BN": self.cfg.block_n,
            "CL": self.channels_last,
            "EVEN": self.channels % self.cfg.block_n == 0,
            "ACC": accumulator(self.dtype),
            "I64": self.large,
            "ALIGN": 1 if self.channels_last else math.gcd(self.pixels, 16),
        }


def vectors(like: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Two new vectors of per-channel statistics in the accumulation dtype."""
    dtype = accumulation_dtype(like.dtype)
    return like.new_empty(channels, dtype=dtype), like.new_empty(channels, dtype=dtype)


def like(z: Tensor, channels_last: bool) -> Tensor:
    """A new tensor of the same sizes in a layout."""
    return empty_like_layout(z, z.shape, channels_last)


def inverse(count: int) -> float:
    """1 / count; an empty batch has no terms that it could scale."""
    return 1.0 / count if count > 0 else 0.0


def epilogue(eps: float, act: str, slope: float) -> dict[str, Any]:
    """The constexprs of what follows a product or a map's load: norm and activation."""
    return {"EPS": eps, "ACT": act, "SLOPE": slope}
