"""Modules over the functional API."""

from dla_fast.nn.aggregate import AggregationNode
from dla_fast.nn.blocks import BasicBlock, Bottleneck, ConvLevel, SplitBottleneck
from dla_fast.nn.tree import Projection, Tree

__all__ = ["AggregationNode", "BasicBlock", "Bottleneck", "ConvLevel", "Projection", "SplitBottleneck", "Tree"]
