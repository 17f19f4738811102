"""The blocks of one-stage detectors whose units are ``cv1``, ``cv2`` and so on, with their norms or folded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dla_fast.swap.concat import ConcatAdapter, Merge


def _holds(module: nn.Module, names: set[str], kind: type[nn.Module]) -> bool:
    return module._modules.keys() == names and isinstance(module._modules["m"], kind)


def _pools(module: nn.Module | None) -> bool:
    return module is not None and all(isinstance(pool, nn.MaxPool2d) for pool in module.children())


class C2f(ConcatAdapter):
    """``cv1`` in halves, the blocks of ``m`` in a row from the second half on, and ``cv2`` over all of them."""

    child = "cv2"

    def resembles(self, module: nn.Module) -> bool:
        return _holds(module, {"cv1", "cv2", "m"}, nn.ModuleList) and not _pools(module._modules["m"])

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        maps = list(module.cv1(x).chunk(2, 1))
        for block in module.m:
            maps.append(block(maps[-1]))
        return merge(maps)


class C3(ConcatAdapter):
    """``cv1`` and the blocks of ``m`` on one side, ``cv2`` on the other, and ``cv3`` over both."""

    child = "cv3"

    def resembles(self, module: nn.Module) -> bool:
        return _holds(module, {"cv1", "cv2", "cv3", "m"}, nn.Module)

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        return merge([module.m(module.cv1(x)), module.cv2(x)])


class SPP(ConcatAdapter):
    """``cv1``, the max poolings of ``m`` side by side, and ``cv2`` over it and them."""

    child = "cv2"

    def resembles(self, module: nn.Module) -> bool:
        return _holds(module, {"cv1", "cv2", "m"}, nn.ModuleList) and _pools(module._modules["m"])

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        x = module.cv1(x)
        return merge([x, *(pool(x) for pool in module.m)])


class SPPF(ConcatAdapter):
    """``cv1``, one max pooling ``m`` three times in a row (or ``n`` times), and ``cv2`` over it and all they gave.

    Where a flag ``add`` is set, the input is added.
    """

    child = "cv2"

    def resembles(self, module: nn.Module) -> bool:
        return _holds(module, {"cv1", "cv2", "m"}, nn.MaxPool2d)

    def forward(self, module: Any, merge: Merge, x: Tensor) -> Tensor:
        maps = [module.cv1(x)]
        for _ in range(getattr(module, "n", 3)):
            maps.append(module.m(maps[-1]))
        y = merge(maps)
        return y + x if getattr(module, "add", False) else y
