"""Import timm, also where torchvision's compiled half does not fit this torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch


def import_timm() -> ModuleType:
    """Import timm.

    A torchvision built for another torch (a CUDA wheel beside a CPU torch, say) raises while it registers a fake for an
    operators that its missing library would have defined. timm needs only torchvision's Python side, so those operators
    are declared, without kernels, and the import tried again.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")
