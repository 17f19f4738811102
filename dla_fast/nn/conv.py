"""Which convolutions a functional call may stand for."""

from __future__ import annotations

from typing import TypeGuard

from torch import nn

from dla_fast.nn import stock
from dla_fast.nn.batch_norm import is_observed


def is_plain_conv(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a child is a convolution as :func:`dla_fast.functional.conv_norm_act` knows it, that nobody watches.

    A Conv2d in effect, whose kernel is square and odd, with the padding that keeps the size, and one stride and one
    dilation for both directions.
    """
    if (type(conv) is not nn.Conv2d and stock.kind(conv) not in stock.CONVS) or is_observed(conv):
        return False
    assert isinstance(conv, nn.Conv2d)
    k, d, p = conv.kernel_size[0], conv.dilation[0], conv.padding
    return (
        k % 2 == 1
        and conv.kernel_size[1] == k
        and conv.dilation[1] == d
        and conv.stride[0] == conv.stride[1]
        and p[0] == p[1] == d * (k // 2)
        and conv.padding_mode == "zeros"
    )
