"""Roots that do something else when they are called, for the tests of swap_."""

from __future__ import annotations

import random
from collections import deque

import torch
from swap_helpers import ListRoot, Root
from torch import nn

calls = 0
seen_by_all = {"calls": 0}


def root(forward, base=Root, **attributes):
    return type("LyingRoot", (base,), {"forward": forward, **attributes})


def plain(self, *x):
    y = self.bn(self.conv(torch.cat(x, 1)))
    return self.relu(y + x[0]) if self.residual else self.relu(y)


def clamp(most, least=None):
    return root(lambda self, *x: plain(self, *x).clamp(least, most))


def where(asks, then=lambda y, x: 1.001 * y):
    """A root that does something else where the question is answered with yes."""

    def forward(self, *x):
        y = plain(self, *x)
        return then(y, x) if asks(self, x) else y

    return root(forward)


class Counts(Root):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0

    def forward(self, *x):
        self.calls += 1
        return plain(self, *x)


class KeepsOutput(Root):
    def forward(self, *x):
        self.last = plain(self, *x)
        return self.last


class Appends(Root):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.sizes = []

    def forward(self, *x):
        self.sizes.append(tuple(x[0].shape))
        return plain(self, *x)


class KeepsInAnObject(Root):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stats = type("Stats", (), {})()
        self.stats.deep = {"all": [deque(maxlen=3)]}

    def forward(self, *x):
        self.stats.deep["all"][0].append(len(x))
        return plain(self, *x)


class CountsOnAChild(Root):
    def forward(self, *x):
        self.conv.calls = getattr(self.conv, "calls", 0) + 1
        return plain(self, *x)


class CountsOnTheClass(Root):
    calls = 0

    def forward(self, *x):
        type(self).calls += 1
        return plain(self, *x)


class ListOfTheClass(Root):
    everything = []  # noqa: RUF012

    def forward(self, *x):
        self.everything.append(len(x))
        return plain(self, *x)


class CountsInTheFile(Root):
    def forward(self, *x):
        global calls
        calls += 1
        return plain(self, *x)


class DictionaryOfTheFile(Root):
    def forward(self, *x):
        seen_by_all["calls"] += 1
        return plain(self, *x)


def _counts_around():
    count = 0

    def forward(self, *x):
        nonlocal count
        count += 1
        return plain(self, *x)

    return root(forward)()


class WritesParameters(Root):
    def forward(self, *x):
        y = plain(self, *x)
        self.conv.weight.data.mul_(0.999)
        return y


class ExchangesAChild(Root):
    def forward(self, *x):
        y = plain(self, *x)
        self.relu = nn.ReLU()
        return y


class SetsTheMode(Root):
    def forward(self, *x):
        y = plain(self, *x)
        self.relu.train(len(x) == 3)
        return y


class DropsRarely(Root):
    """Nothing to be seen in most calls but that it draws."""

    def forward(self, *x):
        y = plain(self, *x)
        return y * 0 if self.training and random.random() < 1e-9 else y


class DropsNothing(Root):
    def forward(self, *x):
        return plain(self, *x) + 0 * torch.rand(())


class Noise(Root):
    def forward(self, *x):
        y = plain(self, *x)
        return y + 0.1 * torch.randn_like(y) if self.training else y


class WritesIntoItsInput(Root):
    def forward(self, *x):
        y = plain(self, *x)
        with torch.no_grad():
            x[-1].mul_(2)
        return y


class WritesIntoItsInputSometimes(Root):
    def forward(self, *x):
        y = plain(self, *x)
        if not torch.is_grad_enabled() and len(x) > 4:
            x[-1].mul_(2)
        return y


class PopsFromTheList(ListRoot):
    def forward(self, x_children):
        y = plain(self, *x_children)
        x_children.pop()
        return y


class GivesTheListBack(ListRoot):
    def forward(self, x_children):
        x_children[-1] = y = plain(self, *x_children)
        return y


class CastsToFloat(Root):
    def forward(self, *x):
        y = self.bn(self.conv(torch.cat(x, 1)))
        return self.relu(y).float() if y.dtype == torch.bfloat16 else self.relu(y)


class WithoutAutocast(Root):
    def forward(self, *x):
        with torch.autocast("cpu", enabled=False):
            return plain(self, *x)


class RefusesOne(Root):
    def forward(self, *x):
        if len(x) == 1:
            raise ValueError("more inputs")
        return plain(self, *x)


# What lies, and a part of the reason.
ROOTS = {
    "clamps at 6": (clamp(6), "outputs differ"),
    "clamps at 100": (clamp(100), "outputs differ"),
    "clamps at 10000": (clamp(1e4), "outputs differ"),
    "clamps at 1e-6 from below": (clamp(None, 1e-6), "outputs differ"),
    "clamps its inputs": (root(lambda self, *x: plain(self, *(v.clamp(-30, 30) for v in x))), "outputs differ"),
    "clamps in training": (where(lambda self, x: self.training, lambda y, x: y.clamp(max=100)), "in training mode"),
    "more than three inputs": (where(lambda self, x: len(x) > 3), "outputs differ"),
    "eight inputs": (where(lambda self, x: len(x) == 8), "outputs differ"),
    "one input": (where(lambda self, x: len(x) == 1), "outputs differ"),
    "more than three inputs in training": (where(lambda self, x: self.training and len(x) > 3), "in training mode"),
    "at least 8 high": (where(lambda self, x: x[0].shape[2] >= 8, lambda y, x: y + x[0]), "outputs differ"),
    "at least 100 wide": (where(lambda self, x: x[0].size(-1) >= 100), "outputs differ"),
    "one pixel": (where(lambda self, x: x[0][0, 0].numel() == 1), "outputs differ"),
    "square": (where(lambda self, x: x[0].shape[2] == x[0].shape[3]), "outputs differ"),
    "odd sides": (where(lambda self, x: x[0].shape[2] % 2 and x[0].shape[3] % 2), "outputs differ"),
    "a batch of one": (where(lambda self, x: len(x[0]) == 1), "outputs differ"),
    "a batch of three": (where(lambda self, x: len(x[0]) == 3), "outputs differ"),
    "an uneven split": (where(lambda self, x: len({v.shape[1] for v in x}) > 1), "outputs differ"),
    "a narrow input": (where(lambda self, x: any(v.shape[1] == 1 for v in x)), "outputs differ"),
    "refuses one input": (RefusesOne, "ValueError: more inputs"),
    "only positive values": (where(lambda self, x: all((v >= 0).all() for v in x)), "positive values"),
    "only negative values": (where(lambda self, x: all((v <= 0).all() for v in x)), "negative values"),
    "drops NaN": (root(lambda self, *x: plain(self, *x).nan_to_num(posinf=float("inf"))), "NaN or infinity"),
    "clamps at 1e30": (clamp(1e30), "outputs differ"),
    "nan_to_num of inputs": (root(lambda self, *x: plain(self, *map(torch.nan_to_num, x))), "nan values"),
    "scales in training": (where(lambda self, x: self.training), "in training mode"),
    "scales in evaluation": (where(lambda self, x: not self.training), "in evaluation mode"),
    "frozen norms": (where(lambda self, x: self.training and not self.bn.training), "norms frozen"),
    "asks for gradients": (where(lambda self, x: torch.is_grad_enabled()), "outputs differ"),
    "asks for none": (where(lambda self, x: not torch.is_grad_enabled()), "without gradients"),
    "asks for those of inputs": (where(lambda self, x: x[0].requires_grad), "outputs differ"),
    "inputs without gradients": (
        where(lambda self, x: torch.is_grad_enabled() and not x[0].requires_grad),
        "inputs without gradients",
    ),
    "inference mode": (where(lambda self, x: torch.is_inference_mode_enabled()), "outputs differ"),
    "channels_last": (
        where(lambda self, x: not x[0].is_contiguous()),
        "channels_last",
    ),
    "detaches in training": (where(lambda self, x: self.training, lambda y, x: y.detach()), "in training mode"),
    "gradients alone": (where(lambda self, x: True, lambda y, x: 2 * y - y.detach()), "gradients of"),
    "scales by little": (where(lambda self, x: True, lambda y, x: y * 1.00000001), "outputs differ"),
    "asks for float32": (where(lambda self, x: x[0].dtype == torch.float32), "outputs differ"),
    "asks for half": (where(lambda self, x: x[0].dtype == torch.float16, lambda y, x: 2 * y), "outputs differ"),
    "asks for autocast": (
        where(lambda self, x: torch.is_autocast_enabled("cpu"), lambda y, x: 2 * y),
        "under autocast",
    ),
    "casts": (CastsToFloat, "torch.float32"),
    "without autocast": (WithoutAutocast, "under autocast"),
    "counts its calls": (Counts, "forward changes calls of the module"),
    "keeps its output": (KeepsOutput, "forward changes last of the module"),
    "appends to a list": (Appends, "forward changes sizes of the module"),
    "keeps in an object": (KeepsInAnObject, "forward changes stats of the module"),
    "counts on a child": (CountsOnAChild, "forward changes conv.calls of the module"),
    "counts on the class": (CountsOnTheClass, "forward changes CountsOnTheClass.calls"),
    "list of the class": (ListOfTheClass, "forward changes ListOfTheClass.everything"),
    "counts in the file": (CountsInTheFile, "forward changes calls beside forward"),
    "dictionary of the file": (DictionaryOfTheFile, "forward changes seen_by_all beside forward"),
    "counts around": (_counts_around, "forward changes count around forward"),
    "writes parameters": (WritesParameters, "differ by"),
    "exchanges a child": (ExchangesAChild, "forward changes _modules"),
    "sets the mode": (SetsTheMode, "the mode after the call differs"),
    "drops rarely": (DropsRarely, "the random state after the call differs"),
    "drops nothing": (DropsNothing, "the random state after the call differs"),
    "noise in training": (Noise, "outputs differ"),
    "writes into its input": (WritesIntoItsInput, "values of input 2 after the call differ"),
    "writes into its input sometimes": (WritesIntoItsInputSometimes, "after the call differ"),
    "pops from the list": (PopsFromTheList, "the list that was given differs"),
    "writes into the list": (GivesTheListBack, "the list that was given"),
}
