"""Families of modules that concatenate in their own forward, a file for each: what they look like, and what they do."""

from dla_fast.swap.concat import ConcatAdapter
from dla_fast.swap.families.aspp import ASPP
from dla_fast.swap.families.csp import CrossStage, CrossStage3
from dla_fast.swap.families.hgnet import HGBlock, HGStem
from dla_fast.swap.families.res2net import Bottle2neck, DlaBottle2neck
from dla_fast.swap.families.selecsls import SelecSLS
from dla_fast.swap.families.vovnet import OsaBlock
from dla_fast.swap.families.yolo import C3, SPP, SPPF, C2f

FAMILIES: tuple[ConcatAdapter, ...] = (
    OsaBlock(),
    CrossStage(),
    CrossStage3(),
    SelecSLS(),
    HGBlock(),
    HGStem(),
    Bottle2neck(),
    DlaBottle2neck(),
    ASPP(),
    C2f(),
    C3(),
    SPP(),
    SPPF(),
)

__all__ = ["FAMILIES"]
