"""A convolution unit by itself: as the library has it at its best, and as a frozen model of this package has it.

The library's is what a compiled network with its weights as constants calls: the norm folded into a weight that has
been reordered beforehand, residual and ReLU in the convolution's own pass. Where there is no such call (another dtype,
a GPU) it is the bare convolution, and in training that with its gradients: less than the op, and so no peer of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dla_fast
from dla_fast.bench import eager
from dla_fast.bench.cases import Case
from dla_fast.nn import ConvLevel
from dla_fast.nn.unit import run_unit

Function = Callable[[dict[str, Tensor]], Tensor]
REORDERED = (torch.float32, torch.bfloat16, torch.float16)


def _geometry(case: Case) -> tuple[list[int], list[int], list[int], int]:
    """Padding, stride, dilation and groups, as the library's calls order them."""
    padding = case.dilation * (case.kernel // 2)
    return [padding] * 2, [case.stride] * 2, [case.dilation] * 2, case.groups


def _inputs(case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensors[f"x{i}"] for i in range(len(case.in_channels))]


def prepared(case: Case, tensors: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
    """What the library's convolution reads, made beforehand: the concatenation, the folded weight, the residual.

    Args:
        case: the unit.
        tensors: of its problem.
        mode: "inference" or "training".
    """
    with torch.no_grad():
        xs = _inputs(case, tensors)
        if case.op == "merge":
            xs[-1] = eager.upsample(xs[-1], tensors["up_weight"], case.factor)
        x, weight = xs[0] if len(xs) == 1 else torch.cat(xs, 1), tensors["weight"]
        if mode != "inference":
            return {"x": x.detach().requires_grad_(), "weight": weight}
        if x.device.type != "cpu" or x.dtype not in REORDERED or not torch.backends.mkldnn.is_available():
            return {"x": x, "weight": weight}
        gamma, beta, mean, var = (
            tensors[name].double() for name in ("bn_weight", "bn_bias", "running_mean", "running_var")
        )
        scale = gamma * (var + 1e-5).rsqrt()
        folded = (weight.double() * scale.view(-1, 1, 1, 1)).to(x.dtype)
        reordered = torch.ops.mkldnn._reorder_convolution_weight(folded, *_geometry(case), list(x.shape))
        found = {"x": x, "reordered": reordered, "bias": (beta - mean * scale).to(x.dtype)}
        if case.residual:
            found["residual"] = xs[0] if case.op == "aggregate" else tensors["residual"]
        return {name: t.detach() for name, t in found.items()}


def is_whole(prepared: dict[str, Tensor]) -> bool:
    """Whether the library computes the whole unit from these, and not the convolution alone."""
    return "reordered" in prepared


def library(case: Case) -> Function:
    """The library's convolution, of what :func:`prepared` gives."""
    geometry = _geometry(case)
    padding, stride, dilation, groups = geometry
    act = "none" if case.act == "identity" else case.act
    pointwise: Any = torch.ops.mkldnn._convolution_pointwise

    def run(tensors: dict[str, Tensor]) -> Tensor:
        x, weight = tensors["x"], tensors.get("reordered")
        if weight is None:
            return F.conv2d(x, tensors["weight"], None, stride, padding, dilation, groups)
        residual, bias = tensors.get("residual"), tensors["bias"]
        result: Tensor
        if residual is None:
            result = pointwise(x, weight, bias, *geometry, act, [], "")
        else:
            after = None if act == "none" else act
            result = pointwise.binary(x, residual, weight, bias, *geometry, "add", 1.0, after, [], "")
        return result

    return run


def frozen(case: Case) -> Function:
    """The unit as a frozen model of this package runs it, with the weights of the first call."""
    made: list[ConvLevel] = []

    def run(tensors: dict[str, Tensor]) -> Tensor:
        if not made:
            made.append(_level(case, tensors))
        conv, norm = made[0][0], made[0][1]
        residual = (0 if case.op == "aggregate" else tensors["residual"]) if case.residual else None
        upsample = None
        if case.op == "merge":
            upsample = [*[None] * (len(case.in_channels) - 1), (tensors["up_weight"], case.factor)]
        return run_unit(_inputs(case, tensors), conv, norm, act=case.act, residual=residual, upsample=upsample)

    return run


def _level(case: Case, tensors: dict[str, Tensor]) -> ConvLevel:
    """The unit's convolution and norm as modules of this package, frozen."""
    weight, channels = tensors["weight"], case.out_channels
    padding, stride, dilation, groups = _geometry(case)
    level = ConvLevel(channels, channels)
    level[0] = nn.Conv2d(
        sum(case.in_channels), channels, case.kernel, stride[0], padding[0], dilation[0], groups, bias=False
    )
    level[0].weight = nn.Parameter(weight.detach(), requires_grad=False)
    for name, field in (("weight", "bn_weight"), ("bias", "bn_bias")):
        setattr(level[1], name, nn.Parameter(tensors[field].detach(), requires_grad=False))
    for name in ("running_mean", "running_var"):
        setattr(level[1], name, tensors[name].detach())
    dla_fast.freeze_(level.eval())
    return level
