"""Residual blocks as other people write them, and what the tests of swap_ on blocks and Sequentials share."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from nn_helpers import randomise
from swap_helpers import Root
from torch import nn

import dla_fast
from dla_fast.swap import block, convs


class BasicBlock(nn.Module):
    """Shaped like the original DLA's, which detectors have copied."""

    def __init__(self, inplanes=8, planes=8, stride=1, dilation=1):
        super().__init__()
        options = {"kernel_size": 3, "padding": dilation, "bias": False, "dilation": dilation}
        self.conv1 = nn.Conv2d(inplanes, planes, stride=stride, **options)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, **options)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride

    def forward(self, x, residual=None):
        if residual is None:
            residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += residual
        return self.relu(out)


class BottleneckX(nn.Module):
    """The original's split block, its activations children of their own."""

    def __init__(self, inplanes=8, planes=8, stride=1, act=nn.ReLU):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, 8, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(8), act()
        self.conv2 = nn.Conv2d(8, 8, 3, stride, 1, groups=4, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(8), act()
        self.conv3 = nn.Conv2d(8, planes, 1, bias=False)
        self.bn3, self.act3 = nn.BatchNorm2d(planes), act()

    def forward(self, x, shortcut=None, children=None):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.act2(self.bn2(self.conv2(y)))))
        return self.act3(y + (x if shortcut is None else shortcut))


class Projected(BasicBlock):
    """A ResNet's: the shortcut is made by a child, if there is one."""

    def __init__(self, inplanes=8, planes=12, stride=2):
        super().__init__(inplanes, planes, stride)
        self.drop_block, self.se = nn.Identity(), None
        self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        return super().forward(x, x if self.downsample is None else self.downsample(x))


class Functional(BasicBlock):
    """Without activations among its children, the shortcut an empty Sequential."""

    act = staticmethod(F.relu)

    def __init__(self):
        super().__init__()
        del self.relu
        self.shortcut = nn.Sequential()

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Required(Functional):
    """As the examples have it: a shortcut is always given."""

    def __init__(self, inplanes=8, planes=8, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, 8, 3, stride, 1)
        del self.shortcut

    def forward(self, x, shortcut):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class Small(nn.Module):
    """Everything that swap_ knows but a ladder."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AvgPool2d(2)
        )
        self.first, self.second, self.third = Projected(), BasicBlock(12, 12), BottleneckX(12, 12, act=nn.SiLU)
        self.root = Root(36, 8)
        self.head = nn.Sequential(nn.Dropout(0.0), nn.Conv2d(8, 5, 1))

    def forward(self, x):
        a = self.first(self.stem(x))
        b = self.second(a)
        return self.head(self.root(self.third(b, a), b, a))


def count_fused_calls(monkeypatch):
    """A list that grows with every block and every run that takes the fused path; verification is over by then."""
    calls = []

    def counting(name, run):
        def counted(*args, **kwargs):
            calls.append(name)
            return run(*args, **kwargs)

        return counted

    monkeypatch.setattr(block, "run_block", counting("block", block.run_block))
    for name in ("run_unit_on", "run_deferred_on"):
        monkeypatch.setattr(convs, name, counting("run", getattr(convs, name)))
    return calls


def swapped_pair(module, **options):
    randomise(module)
    twin = copy.deepcopy(module)
    assert dla_fast.swap_(twin, on_unsupported="raise", **options).swapped
    return module, twin
