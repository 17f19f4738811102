"""The scenario of every day: training steps, evaluation, and both ways between them."""

from __future__ import annotations

import pytest
import torch
from pairs import ALL, LAYOUTS, compare, step


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_steps(name, layout, training):
    def scenario(model, x):
        model.train(training)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        outputs = []
        for _ in range(3):
            optimizer.zero_grad()
            outputs.append(step(model, x))
            optimizer.step()
        return outputs

    compare(scenario, name, layout)
