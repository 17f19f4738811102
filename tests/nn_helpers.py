"""What the tests of modules share: random norms, and two modules compared in all that they compute."""

from __future__ import annotations

import torch
from torch import nn


def randomise(module: nn.Module) -> nn.Module:
    """Norms with parameters and statistics that cannot be taken for one another or for the identity."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(-1.0, 1.5)
                m.bias.normal_(0, 0.3)
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 1.5)
    return module


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def assert_same_function(ours: nn.Module, theirs: nn.Module, run_ours, run_theirs, *inputs: torch.Tensor) -> None:
    """Outputs, every gradient and every buffer, evaluation then training, in float64."""
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for training in (False, True):
        results = []
        for module, run in ((ours, run_ours), (theirs, run_theirs)):
            module.train(training)
            leaves = [x.clone().requires_grad_() for x in inputs]
            y = run(module, *[x * 1 for x in leaves])
            grads = torch.autograd.grad((y * torch.sin(torch.arange(y.numel()).view_as(y))).sum(), leaves)
            y = run(module, *inputs)
            params = dict(module.named_parameters())
            weight_grads = torch.autograd.grad(y.square().mean(), list(params.values()))
            results.append([y, *grads, *weight_grads, *(b.double() for b in module.buffers())])
        assert len(results[0]) == len(results[1])
        for got, want in zip(*results, strict=True):
            assert got.shape == want.shape
            assert relative(got, want) < 1e-9
