"""The convolution-norm-activation units of networks, as cases: read off the networks while they run, on no data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dla_fast import backend, models
from dla_fast.bench.cases import Case, image_size


class _Units(TorchDispatchMode):
    """Notes every convolution with the batch norm, the residual and the activation that follow it.

    What has several inputs is an aggregation node, or one of a ladder, and has suites of its own.
    """

    def __init__(self, model: nn.Module, label: str) -> None:
        super().__init__()
        self.label = label
        self.names = {id(p): name.removesuffix(".weight") for name, p in model.named_parameters()}
        # By the tensor that a unit has given so far; kept alive, so that no other gets its address.
        self.units: dict[int, Case] = {}
        self.nodes: set[int] = set()
        self.alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.alive.append(result)
        name = func.overloadpacket.__name__
        if name == "cat" and len(args[0]) > 1:
            self.nodes.add(id(result))
        elif name == "convolution" and not args[6] and id(args[0]) not in self.nodes:
            self._begin(result, *args)
        elif "batch_norm" in name:
            self._follow(args[0], result[0], op="conv_norm_act")
        elif name == "add" and isinstance(args[1], Tensor):
            # What is added to stands first; what is added may be a unit too, and is complete.
            self._follow(args[0], result, residual=True)
        elif name == "relu":
            self._follow(args[0], result, act="relu")
        return result

    def _begin(self, z: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any,
               transposed: bool, output_padding: Any, groups: int) -> None:  # fmt: skip
        self.units[id(z)] = Case(
            f"{self.label}.{self.names[id(weight)]}",
            (x.shape[1],),
            z.shape[1],
            z.shape[2],
            z.shape[3],
            op="convolution",
            kernel=weight.shape[-1],
            stride=stride[0],
            dilation=dilation[0],
            groups=groups,
            act="identity",
        )

    def _follow(self, before: Tensor, after: Tensor, **changes: Any) -> None:
        case = self.units.get(id(before))
        # A convolution without a norm is no unit, whatever follows it.
        if case is not None and (case.op == "conv_norm_act" or "op" in changes):
            if id(before) != id(after):
                del self.units[id(before)]
            self.units[id(after)] = dataclasses.replace(case, **changes)

    def found(self) -> list[Case]:
        """The units in the order they finished."""
        return [case for case in self.units.values() if case.op == "conv_norm_act"]


def unit_cases(names: Iterable[str], size: int | None = None) -> list[Case]:
    """The convolution-norm-activation units of some networks, alike ones once, in the order they run.

    Args:
        names: of :func:`dla_fast.models.list_models`.
        size: side of the images in pixels; by default 224, and 512 for dense prediction.
    """
    found: dict[tuple[Any, ...], Case] = {}
    for name in names:
        model = models.create_model(name, device="meta").eval()
        side = image_size(name, size)
        units = _Units(model, name)
        with torch.no_grad(), backend.use_backend("reference"), units:
            model(torch.empty(1, 3, side, side, device="meta"))
        for case in units.found():
            found.setdefault(dataclasses.astuple(case)[1:], case)
    return list(found.values())
