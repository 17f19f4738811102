"""Ladders as code bases have them, as rows: alone, each in its own calling convention, and in whole necks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from shapes_roots import FrozenBatchNorm2d
from swap_shapes import Row
from torch import nn

from dla_fast.bench import necks
from dla_fast.bench.ladders import RangeDLAUp

OUT, CHANNELS, FACTORS, SIDES = 6, (6, 8, 5), (1, 2, 4), (8, 4, 2)
LEVELS, LEVEL_SIDES = (4, 6, 8), (8, 4, 2)

# How many of its 2, 3 or 4 units run fused, from the convolution on, or from the norm on alone.
CONCAT = {"conv_norm_act_inference": 4, "upsample": 0, "native_batch_norm": 0}
ADD = {"conv_norm_act_inference": 4, "upsample_add": 2, "native_batch_norm": 0}
TAILS = {"tail": 4, "upsample_add": 2, "native_batch_norm": 0}


def _maps(channels: tuple[int, ...], sides: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(2, c, s, s, dtype=dtype) for c, s in zip(channels, sides, strict=True)]


def layers(dtype: torch.dtype) -> list:
    """(layers)."""
    return [_maps(CHANNELS, SIDES, dtype)]


def ranged(dtype: torch.dtype) -> list:
    """(layers, start, end), a layer before them that is none of the ladder's business."""
    return [_maps((3, *CHANNELS), (16, *SIDES), dtype), 1, 4]


def levels(dtype: torch.dtype) -> list:
    """(levels) of a neck."""
    return [_maps(LEVELS, LEVEL_SIDES, dtype)]


def ladder(name: str) -> Callable[[], nn.Module]:
    return lambda: necks.LADDERS[name](OUT, CHANNELS, FACTORS)


def with_norm(name: str, norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    """A ladder with another norm in place of each."""

    def make() -> nn.Module:
        module = ladder(name)()
        for parent in list(module.modules()):
            for key, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, key, norm(child.num_features))
        return module

    return make


def neck(name: str) -> Callable[[], nn.Module]:
    return lambda: necks.make(name, LEVELS)


ROWS = {
    "`IDAUp(layers) -> (x, y)`, own identity, concat, Sequential units": Row(
        ladder("original"), layers, {"": ""}, ops=CONCAT
    ),
    "`DLAUp` of these": Row(
        neck("original"),
        levels,
        {"ida_0": "", "ida_1": ""},
        ops={"conv_norm_act_inference": 6, "upsample": 0, "native_batch_norm": 0},
    ),
    "`IDAUp(layers, startp, endp)` writes the list, add, units {actf, conv}": Row(
        ladder("plain"), ranged, {"": ""}, ops=ADD
    ),
    "`DLAUp(startp, …)` of these, and a last `ida_up`": Row(
        neck("plain"),
        levels,
        {"dla_up.ida_0": "", "dla_up.ida_1": "", "ida_up": ""},
        ops={"conv_norm_act_inference": 8, "upsample_add": 4, "native_batch_norm": 0},
    ),
    "`DLAUp(startp, …)` that leaves the first level out": Row(
        lambda: RangeDLAUp(1, LEVELS),
        lambda dtype: [_maps((3, *LEVELS), (16, *LEVEL_SIDES), dtype)],
        {"ida_0": "", "ida_1": ""},
        ops={"conv_norm_act_inference": 6, "upsample_add": 3, "native_batch_norm": 0},
    ),
    "the same, a deformable convolution in one module": Row(ladder("deformable"), ranged, {"": "tail"}, ops=TAILS),
    "the same, units {actf, offset, conv}": Row(ladder("offset"), ranged, {"": "tail"}, ops=TAILS),
    "the same, units {gcl, gcr, act}": Row(ladder("global"), ranged, {"": "tail"}, ops=TAILS),
    "ModuleLists `projs`, `ups`, `nodes`, add, units {conv, bn, relu}": Row(
        ladder("convbnrelu"), ranged, {"": ""}, ops=ADD
    ),
    "the same after `convert_sync_batchnorm`": Row(
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(ladder("convbnrelu")()), ranged, {"": ""}, ops=ADD
    ),
    "the same, frozen norms": Row(with_norm("convbnrelu", FrozenBatchNorm2d), ranged, {"": ""}, ops=ADD),
    "the same, GroupNorm": Row(
        with_norm("convbnrelu", lambda channels: nn.GroupNorm(2, channels)),
        ranged,
        {"": "0 of 4 units fused"},
        ops={"upsample_add": 2},
    ),
    "ModuleLists, own ConvTranspose2d, units {norm, relu, deform_conv}": Row(
        ladder("normfirst"), ranged, {"": "tail"}, ops=TAILS
    ),
    "ModuleLists, own Conv2d and ConvTranspose2d, units {conv, bn, activate}": Row(
        ladder("convmodule"), ranged, {"": ""}, ops=ADD
    ),
    "`IDAUp(layers) -> layers` writes the list, concat, units {conv: Sequential}": Row(
        ladder("wrapped"), layers, {"": ""}, ops=CONCAT
    ),
    "`IDAUp(layers) -> layers` writes the list, concat, Sequential units": Row(
        ladder("returning"), layers, {"": ""}, ops=CONCAT
    ),
    "the same with frozen norms": Row(with_norm("returning", FrozenBatchNorm2d), layers, {"": ""}, ops=CONCAT),
    "`IDAUp(layers) -> layers` writes the list, add, Sequential units": Row(
        ladder("returning_add"), layers, {"": ""}, ops=ADD
    ),
    "`DLAUp` of ladders that give the list": Row(
        neck("wrapped"),
        levels,
        {"ida_0": "", "ida_1": ""},
        ops={"conv_norm_act_inference": 6, "upsample": 0, "native_batch_norm": 0},
    ),
}
