"""Blocks and Sequentials that do something else when called: each is left alone, and the reason says why."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from block_helpers import BasicBlock, Projected
from swap_helpers import relative
from torch import nn

import dla_fast


class ClampingBlock(BasicBlock):
    def forward(self, x, residual=None):
        return super().forward(x, residual).clamp(max=100)


class SizedBlock(BasicBlock):
    def forward(self, x, residual=None):
        y = super().forward(x, residual)
        return F.avg_pool2d(y, 3, 1, 1) if x.shape[-2] > 12 else y


class OddBlock(Projected):
    """Cuts what has odd sides."""

    def forward(self, x):
        return super().forward(x[:, :, : x.shape[2] // 2 * 2])


class CountingBlock(BasicBlock):
    def forward(self, x, residual=None):
        self.seen = getattr(self, "seen", 0) + 1
        return super().forward(x, residual)


class ShortcutOnlyInTraining(BasicBlock):
    def forward(self, x, residual=None):
        return super().forward(x, residual if self.training else None)


class ClampedInside(BasicBlock):
    def forward(self, x, residual=None):
        y = self.conv2(self.relu(self.bn1(self.conv1(x))).clamp(max=6))
        return self.relu(self.bn2(y) + (x if residual is None else residual))


class WritesIntoItsShortcut(BasicBlock):
    def forward(self, x, residual=None):
        y = super().forward(x, residual)
        if residual is not None and not residual.requires_grad:
            residual.add_(1)
        return y


BLOCKS = {
    ClampingBlock: "outputs differ",
    SizedBlock: "outputs differ",
    OddBlock: "outputs: ",
    CountingBlock: "forward changes seen of the module",
    ShortcutOnlyInTraining: "in evaluation mode",
    ClampedInside: "outputs differ",
    WritesIntoItsShortcut: "values of input 1 after the call differ",
}


@pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)
def test_blocks_that_lie(make):
    report = dla_fast.swap_(make(), units="blocks")
    assert not report.swapped
    assert report.skipped[0].reason.startswith("verification failed: ")
    assert BLOCKS[make] in report.skipped[0].reason, report.skipped[0].reason


class ClampingConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class Backwards(nn.Sequential):
    """Its forward is nn.Sequential's, and runs over something else."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


class OwnForward(nn.Sequential):
    def forward(self, x):
        return super().forward(x).clamp(max=6)


class OwnCall(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x).clamp(max=6)


class OwnItems(nn.Sequential):
    def __getitem__(self, i):
        return nn.Identity()


def _children(conv=nn.Conv2d):
    return conv(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()


def test_a_sequential_that_is_none():
    module = OwnForward(*_children())
    assert not dla_fast.swap_(module).swapped
    assert type(module) is OwnForward


def test_a_convolution_that_clamps_is_called_as_it_is():
    module = nn.Sequential(*_children(ClampingConv)).eval()
    nn.init.constant_(module[0].bias, 200)
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin).swapped  # norm and activation
    x = torch.randn(2, 8, 5, 4)
    assert relative(twin(x), module(x)) <= 1e-6


def test_a_sequential_that_runs_over_something_else_stays():
    module = Backwards(*reversed(_children()))
    assert not dla_fast.swap_(module).swapped
    assert type(module) is Backwards


@pytest.mark.parametrize("cls", [OwnCall, OwnItems])
def test_a_sequential_keeps_what_is_around_its_forward(cls):
    """A call, and items, of its own are not what its forward goes through: they stay, and the children are fused."""
    module = cls(*_children()).eval()
    nn.init.constant_(module._modules["1"].weight, 50)
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin).swapped
    x = torch.randn(2, 8, 5, 4)
    assert relative(twin(x), module(x)) <= 1e-5
