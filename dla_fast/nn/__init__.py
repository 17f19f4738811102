"""Modules over the functional API."""

from dla_fast.nn.aggregate import AggregationNode

__all__ = ["AggregationNode"]
