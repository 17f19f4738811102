"""Modules over the functional API."""

from dla_fast.nn.aggregate import AggregationNode
from dla_fast.nn.batch_norm_act import BatchNormAct2d
from dla_fast.nn.blocks import BasicBlock, Bottleneck, ConvLevel, SplitBottleneck
from dla_fast.nn.ida import DLAUp, IDAUp
from dla_fast.nn.shallow import FCNMerge, FPNMerge, UNetMerge
from dla_fast.nn.tree import Projection, Tree
from dla_fast.nn.upsample import Upsample

__all__ = [
    "AggregationNode",
    "BasicBlock",
    "BatchNormAct2d",
    "Bottleneck",
    "ConvLevel",
    "DLAUp",
    "FCNMerge",
    "FPNMerge",
    "IDAUp",
    "Projection",
    "SplitBottleneck",
    "Tree",
    "UNetMerge",
    "Upsample",
]
