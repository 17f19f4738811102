"""What the tests of networks share: their sizes, small ones, and pairs of ours and timm's."""

from __future__ import annotations

import torch
from nn_helpers import relative
from torch import nn

from dla_fast.models import DLA, create_model, load_state_dict
from dla_fast.nn import BasicBlock

__all__ = ["NAMES", "PARAMETERS", "network", "randomise", "relative", "tiny", "twins"]

# Parameters as timm counts them, and those of the projects that only the original layout has.
PARAMETERS = {
    "dla34": (15742104, 41728),
    "dla46_c": (1301400, 8448),
    "dla46x_c": (1068440, 8448),
    "dla60x_c": (1319832, 16896),
    "dla60": (22036632, 297472),
    "dla60x": (17352344, 297472),
    "dla102": (33268888, 462848),
    "dla102x": (26309272, 462848),
    "dla102x2": (41282200, 462848),
    "dla169": (53389720, 599296),
}
NAMES = list(PARAMETERS)


def randomise(model: nn.Module) -> nn.Module:
    """Norms with parameters and statistics that cannot be taken for one another or for the identity."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.4, 1.2)
                m.bias.normal_(0, 0.2)
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.5, 1.5)
    return model


def network(name: str, **kwargs) -> DLA:
    """A network whose weights are about to be loaded, so they need no initialisation."""
    return create_model(name, device="meta", **kwargs).to_empty(device="cpu")


def twins(timm, name: str, dtype: torch.dtype = torch.float32, **kwargs) -> tuple[DLA, nn.Module]:
    theirs = randomise(timm.create_model(name, **kwargs)).to(dtype)
    return load_state_dict(network(name, dtype=dtype, **kwargs), theirs.state_dict()), theirs


def tiny(**kwargs) -> DLA:
    return DLA((1, 1, 1, 2, 2, 1), (4, 6, 8, 8, 12, 16), BasicBlock, **{"num_classes": 5, **kwargs})
