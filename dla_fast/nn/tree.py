"""Hierarchical deep aggregation: blocks and aggregation nodes in a binary tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dla_fast import checks
from dla_fast.nn.aggregate import AggregationNode
from dla_fast.nn.batch_norm import is_observed
from dla_fast.nn.blocks import BasicBlock, Bottleneck, SplitBottleneck
from dla_fast.nn.pool import MaxPool2d
from dla_fast.nn.unit import run_unit

BlockFactory = Callable[..., nn.Module]


class Projection(nn.Sequential):
    """1x1 convolution and batch norm, for a shortcut whose channels change: an aggregation node with one input.

    State dict keys: ``0.weight`` and ``1.*``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, bias=False, device=device, dtype=dtype),
            nn.BatchNorm2d(out_channels, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        return run_unit([x], self[0], self[1], act="identity")


def _last(block: nn.Module, root: nn.Module, x: Tensor, children: Sequence[Tensor]) -> Tensor:
    """``root(block(x), x, *children)``; what the root alone reads, and nobody watches, it normalises on the way."""
    if (
        isinstance(block, BasicBlock | Bottleneck | SplitBottleneck)
        and type(block).forward in (BasicBlock.forward, Bottleneck.forward)
        and type(root) is AggregationNode
        and not root.residual
        and not (is_observed(block) or is_observed(root) or nn.modules.module._has_any_global_hook())
    ):
        return root.run([block.deferred(x), x, *children])
    y: Tensor = root(block(x), x, *children)
    return y


class Tree(nn.Module):
    """One level of hierarchical deep aggregation (HDA).

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), equations 3 to 5. A tree of one level runs two
    blocks and aggregates both with the children that came from above; a deeper one runs two trees of one level less and
    hands the output of the first to the second as a child, so that the last root sees every subtree before it.

    The shortcut's max-pool is the same for a tree and for every tree down its left edge: it is computed once and
    passed down. State dict keys: ``tree1.*``, ``tree2.*``, and in trees of one level ``root.conv``, ``root.bn`` and,
    where the channels change, ``project.0``, ``project.1``.

    Args:
        levels: depth of the tree.
        block: called as ``block(in_channels, out_channels, stride, dilation, first_dilation, device=, dtype=)``; gives
            a module that takes ``(x, shortcut)``, such as :class:`dla_fast.nn.BasicBlock`.
        in_channels: channels of the input.
        out_channels: channels of every block, every root and the output.
        stride: of the first block; the shortcut is max-pooled by it.
        dilation: of the blocks.
        first_dilation: of the first block's first 3x3 convolution, where it differs.
        level_root: aggregate the pooled input too (every level after the first tree's).
        residual_root: add a root's first input, the last block's output, before its ReLU (the deeper networks).
        child_channels: channels of the ``children`` that ``forward`` gets.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``levels``, ``stride`` or ``dilation`` below 1; in ``forward`` a height or width that ``stride``
            does not divide (block and shortcut would differ in size), or children that do not fit ``child_channels``.

    Shape:
        ``forward(x, children=(), bottom=None)``: x (N, in_channels, H, W); children, ``bottom`` (x already pooled, to
        share it) and output (N, C, H / stride, W / stride).
    """

    def __init__(
        self,
        levels: int,
        block: BlockFactory,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        dilation: int = 1,
        first_dilation: int | None = None,
        level_root: bool = False,
        residual_root: bool = False,
        child_channels: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("levels", levels), ("stride", stride), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")
        self.levels = levels
        self.stride = stride
        self.level_root = level_root
        self.child_channels = tuple(child_channels)
        children = (*child_channels, in_channels) if level_root else tuple(child_channels)
        # The order of registration is that of timm's trees, so that an optimizer's state fits as well.
        self.downsample = MaxPool2d(stride, stride) if stride > 1 else nn.Identity()
        if levels == 1:
            self.project = (
                Projection(in_channels, out_channels, device=device, dtype=dtype)
                if in_channels != out_channels
                else nn.Identity()
            )
            self.tree1 = block(in_channels, out_channels, stride, dilation, first_dilation, device=device, dtype=dtype)
            self.tree2 = block(out_channels, out_channels, 1, dilation, None, device=device, dtype=dtype)
            inputs = [out_channels, out_channels, *children]
            self.root = AggregationNode(inputs, out_channels, residual_root, device=device, dtype=dtype)
            return
        self.tree1 = Tree(
            levels - 1,
            block,
            in_channels,
            out_channels,
            stride,
            dilation=dilation,
            first_dilation=first_dilation,
            residual_root=residual_root,
            device=device,
            dtype=dtype,
        )
        self.tree2 = Tree(
            levels - 1,
            block,
            out_channels,
            out_channels,
            dilation=dilation,
            residual_root=residual_root,
            child_channels=(*children, out_channels),
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, children: Sequence[Tensor] = (), bottom: Tensor | None = None) -> Tensor:
        checks.check_channels("children", children, self.child_channels, "child_channels")
        if bottom is None:
            self._check_size(x)
            bottom = self.downsample(x)
        if self.level_root:
            children = (*children, bottom)
        if self.levels == 1:
            x1 = self.tree1(x, self.project(bottom))
            return _last(self.tree2, self.root, x1, children)
        x1 = self.tree1(x, bottom=bottom)
        return self.tree2(x1, (*children, x1))

    def _check_size(self, x: Tensor) -> None:
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride:
            low = [max(size - size % self.stride, self.stride) for size in (height, width)]
            raise checks.MismatchError(
                f"x: expected a height and width that the stride {self.stride} divides, got {height}x{width}; "
                f"{low[0]}x{low[1]} would fit"
            )

    def extra_repr(self) -> str:
        return f"levels={self.levels}, stride={self.stride}, level_root={self.level_root}"
