"""The residual blocks between the aggregation nodes, and the plain convolution levels before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dla_fast.nn.batch_norm import is_observed
from dla_fast.nn.unit import run_deferred, run_unit
from dla_fast.ops.chain import form
from dla_fast.ops.ending import Ending


class ConvLevel(nn.Sequential):
    """``convs`` times convolution, batch norm, ReLU: DLA's base layer and its levels 0 and 1.

    State dict keys: ``0.weight``, ``1.*``, then ``3.weight``, ``4.*`` and so on, as in a plain Sequential of the three.

    Args:
        in_channels: channels of the input.
        out_channels: channels of every convolution's output.
        convs: number of convolutions.
        kernel_size: of each, odd; the padding keeps the size.
        stride: of the first.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        convs: int = 1,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        layers: list[nn.Module] = []
        for i in range(convs):
            layers += [
                nn.Conv2d(
                    in_channels if i == 0 else out_channels,
                    out_channels,
                    kernel_size,
                    stride if i == 0 else 1,
                    kernel_size // 2,
                    bias=False,
                    device=device,
                    dtype=dtype,
                ),
                nn.BatchNorm2d(out_channels, device=device, dtype=dtype),
                nn.ReLU(),
            ]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor | Ending) -> Tensor:
        """:meth:`forward`, also of what :meth:`deferred` gives."""
        if not self.is_plain():
            return super().forward(form(x) if isinstance(x, Ending) else x)
        *before, (conv, bn) = self._units()
        return run_unit([self._run(before, x)], conv, bn)

    def deferred(self, x: Tensor | Ending) -> Tensor | Ending:
        """:meth:`forward`, the last unit's ending left to the reader; nobody who watches the module's calls sees it."""
        return self._run(self._units(), x)

    def is_plain(self) -> bool:
        """Whether its activations are the ReLUs that it was made with, and nobody watches them."""
        return all(type(act) is nn.ReLU and not is_observed(act) for act in list(self)[2::3])

    def _units(self) -> list[tuple[nn.Module, nn.Module]]:
        layers = list(self)
        return list(zip(layers[0::3], layers[1::3], strict=True))

    def _run(self, units: Sequence[tuple[nn.Module, nn.Module]], x: Tensor | Ending) -> Tensor | Ending:
        for conv, bn in units:
            x = run_deferred([x], conv, bn)
        return x


def _conv3x3(
    in_channels: int,
    out_channels: int,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False, device=device, dtype=dtype
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a residual, the block of DLA-34.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), section 4.1. State dict keys: ``conv1.weight``,
    ``bn1.*``, ``conv2.weight``, ``bn2.*``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution.
        dilation: of the convolutions.
        first_dilation: of the first convolution, where it differs: a level that trades its stride for dilation has
            nothing to make up for before its first strided convolution. Default: ``dilation``.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        ``forward(x, shortcut=None)``: x (N, in_channels, H, W); the output and ``shortcut``, which is added before the
        last ReLU, (N, out_channels, H / stride, W / stride). Without a shortcut x itself is added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        first = dilation if first_dilation is None else first_dilation
        self.conv1 = _conv3x3(in_channels, out_channels, stride, first, device=device, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.conv2 = _conv3x3(out_channels, out_channels, 1, dilation, device=device, dtype=dtype)
        self.bn2 = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        own = shortcut is None
        y = run_deferred([x], self.conv1, self.bn1, carries=own)
        return run_unit([y], self.conv2, self.bn2, residual=x if shortcut is None else shortcut, carried=own)

    def deferred(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | Ending:
        """:meth:`forward`, the last unit's ending left to the reader; nobody who watches the module's calls sees it."""
        own = shortcut is None
        y = run_deferred([x], self.conv1, self.bn1, carries=own)
        return run_deferred([y], self.conv2, self.bn2, residual=x if shortcut is None else shortcut, carried=own)


class _BottleneckBase(nn.Module):
    """1x1 to ``width`` channels, 3x3 in ``groups`` groups, 1x1 to ``out_channels``, with a residual."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        stride: int,
        dilation: int,
        groups: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False, device=device, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(width, device=device, dtype=dtype)
        self.conv2 = _conv3x3(width, width, stride, dilation, groups, device=device, dtype=dtype)
        self.bn2 = nn.BatchNorm2d(width, device=device, dtype=dtype)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.bn3 = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        own = shortcut is None
        y = self._inside(x, own)
        return run_unit([y], self.conv3, self.bn3, residual=x if shortcut is None else shortcut, carried=own)

    def deferred(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | Ending:
        """:meth:`forward`, the last unit's ending left to the reader; nobody who watches the module's calls sees it."""
        own = shortcut is None
        y = self._inside(x, own)
        return run_deferred([y], self.conv3, self.bn3, residual=x if shortcut is None else shortcut, carried=own)

    def _inside(self, x: Tensor, carries: bool) -> Tensor | Ending:
        y = run_deferred([x], self.conv1, self.bn1, carries=carries)
        return run_deferred([y], self.conv2, self.bn2)


class Bottleneck(_BottleneckBase):
    """1x1, 3x3, 1x1 convolutions with a residual, ``out_channels // 2`` channels inside.

    Deep Layer Aggregation (CVPR 2018), section 4.1. State dict keys: ``conv1.weight``, ``bn1.*`` up to ``bn3.*``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the 3x3 convolution.
        dilation: of the 3x3 convolution.
        first_dilation: takes the place of ``dilation`` where given, see :class:`BasicBlock`.
        device: of the parameters.
        dtype: of the parameters.

    Shape:
        As :class:`BasicBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dilation = dilation if first_dilation is None else first_dilation
        super().__init__(in_channels, out_channels // 2, out_channels, stride, dilation, 1, device, dtype)


class SplitBottleneck(_BottleneckBase):
    """A bottleneck whose 3x3 convolution is split into ``cardinality`` paths, as in ResNeXt.

    Deep Layer Aggregation (CVPR 2018), section 4.1; the split transform is that of Xie et al. (CVPR 2017). The width
    inside is ``out_channels * cardinality / 32``. State dict keys: as :class:`Bottleneck`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, a multiple of 32.
        stride: of the 3x3 convolution.
        dilation: of the 3x3 convolution.
        first_dilation: takes the place of ``dilation`` where given, see :class:`BasicBlock`.
        cardinality: number of paths.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``out_channels`` that cannot be split, ``cardinality`` below 1.

    Shape:
        As :class:`BasicBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        *,
        cardinality: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if cardinality < 1:
            raise ValueError(f"cardinality: expected an integer >= 1, got {cardinality}")
        if out_channels < 32 or out_channels % 32:
            raise ValueError(f"out_channels: expected a positive multiple of 32, got {out_channels}")
        width = out_channels // 32 * cardinality
        dilation = dilation if first_dilation is None else first_dilation
        super().__init__(in_channels, width, out_channels, stride, dilation, cardinality, device, dtype)
