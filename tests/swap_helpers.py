"""Nodes as other people write them, for the tests of swap_."""

from __future__ import annotations

import torch
from torch import nn


class Root(nn.Module):
    """Shaped like the original DLA's."""

    def __init__(self, in_channels=24, out_channels=8, kernel_size=1, residual=False):
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, bias=False, padding=padding)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.residual = residual

    def forward(self, *x):
        y = self.bn(self.conv(torch.cat(x, 1)))
        if self.residual:
            y += x[0]
        return self.relu(y)


class ListRoot(Root):
    def forward(self, x_children):
        return super().forward(*x_children)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Root(), Root(16, residual=True)

    def forward(self, a, b, c):
        return self.second(self.first(a, b, c), c)


def inputs(count=3, **kwargs):
    return [torch.randn(2, 8, 5, 3, **kwargs) for _ in range(count)]


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()
