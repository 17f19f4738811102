"""Iterative deep aggregation: the ladders that bring the levels of a network to one resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dla_fast import checks
from dla_fast.nn.batch_norm import is_observed
from dla_fast.nn.unit import run_unit
from dla_fast.nn.upsample import Upsample

MERGES = ("concat", "add")


class ConvNormAct(nn.Sequential):
    """k x k convolution, batch norm, ReLU over one or several maps. Keys ``0.weight`` and ``1.*``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                padding=kernel_size // 2,
                bias=False,
                device=device,
                dtype=dtype,
            ),
            nn.BatchNorm2d(out_channels, device=device, dtype=dtype),
            nn.ReLU(inplace=True),
        )

    def forward(self, *xs: Tensor, upsample: Sequence[tuple[Tensor, int] | None] | None = None) -> Tensor:
        return run_unit(xs, self[0], self[1], upsample=upsample)


class IDAUp(nn.Module):
    """Iterative deep aggregation of levels that are brought to one resolution.

    Deep Layer Aggregation (Yu, Wang, Shelhamer, Darrell, CVPR 2018), equation 1 and section 3.2. Every level is
    projected to ``out_channels`` and upsampled; then, from the first on, the next one is merged in: concatenated, and
    mixed by a convolution, batch norm and ReLU, or added first. A level is handed to its node at its own resolution,
    and upsampled there.

    State dict keys, those of the original code: ``proj_i`` (``0.weight``, ``1.*``), ``up_i.weight``, ``node_i``
    (``0.weight``, ``1.*``), ``node_i`` from 1 on. A level that has ``out_channels`` already, or factor 1, has an
    Identity there.

    Args:
        out_channels: channels of every level after its projection, and of the output.
        channels: channels of each level.
        up_factors: integer factor that brings each level to the common resolution, 1 for none.
        node_kernel: kernel of the nodes, 1 or 3.
        merge: "concat", as the paper has it, or "add", as CenterNet's detectors do.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an option out of its range; in ``forward`` a wrong number of layers, or channels or sizes that do
            not fit, naming the layer.
        TypeError: a factor that is not an integer; in ``forward`` a layer that is not a floating tensor.

    Shape:
        ``forward(layers)``: layer i (N, channels[i], H_i, W_i). Gives the last node's output, (N, out_channels, H, W),
        and the list of every node's. The caller's list stays as it is.
    """

    def __init__(
        self,
        out_channels: int,
        channels: Sequence[int],
        up_factors: Sequence[int],
        *,
        node_kernel: int = 3,
        merge: str = "concat",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(channels) < 2 or len(channels) != len(up_factors):
            raise ValueError(
                f"channels: expected two levels or more and a factor for each, got {list(channels)} and "
                f"{list(up_factors)}"
            )
        if node_kernel not in (1, 3):
            raise ValueError(f"node_kernel: expected 1 or 3, got {node_kernel!r}")
        if merge not in MERGES:
            raise ValueError(f"merge: expected {' or '.join(map(repr, MERGES))}, got {merge!r}")
        self.out_channels, self.channels, self.merge = out_channels, tuple(channels), merge
        self.up_factors = tuple(
            f if type(f) is int and f == 1 else checks.check_factor(f, f"up_factors[{i}]")
            for i, f in enumerate(up_factors)
        )
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        for i, (c, f) in enumerate(zip(self.channels, self.up_factors, strict=True)):
            proj = nn.Identity() if c == out_channels else ConvNormAct(c, out_channels, 1, **options)
            up = nn.Identity() if f == 1 else Upsample(out_channels, f, **options)
            self.add_module(f"proj_{i}", proj)
            self.add_module(f"up_{i}", up)
            if i > 0:
                depth = out_channels * (2 if merge == "concat" else 1)
                self.add_module(f"node_{i}", ConvNormAct(depth, out_channels, node_kernel, **options))

    def _check(self, layers: Sequence[Tensor]) -> None:
        if isinstance(layers, Tensor) or len(layers) != len(self.channels):
            got = "one tensor" if isinstance(layers, Tensor) else f"{len(layers)} layers"
            raise ValueError(f"layers: expected {len(self.channels)} layers, got {got}")
        first: tuple[int, ...] = ()
        for i, (x, c, f) in enumerate(zip(layers, self.channels, self.up_factors, strict=True)):
            checks.check_tensor(f"layers[{i}]", x, rank=4)
            if x.shape[1] != c:
                raise checks.MismatchError(f"layers[{i}]: expected {c} channels, got shape {tuple(x.shape)}")
            height, width = (side if f == 1 else checks.upsampled(side, f) for side in x.shape[2:])
            size = (x.shape[0], height, width)
            first = first or size
            if size != first:
                raise checks.MismatchError(
                    f"layers[{i}]: expected (N, H, W) = {first} after upsampling by {f}, as layers[0] has, got {size} "
                    f"from shape {tuple(x.shape)}"
                )

    def _full(self, i: int, x: Tensor) -> Tensor:
        return cast(Tensor, getattr(self, f"up_{i}")(x))

    def forward(self, layers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        self._check(layers)
        projected = [cast(Tensor, getattr(self, f"proj_{i}")(x)) for i, x in enumerate(layers)]
        x = self._full(0, projected[0])
        outputs = []
        for i, low in enumerate(projected[1:], 1):
            up, node = getattr(self, f"up_{i}"), getattr(self, f"node_{i}")
            if self.merge == "add":
                x = node(up(low, x) if isinstance(up, Upsample) else low + x)
            elif isinstance(up, Upsample) and not is_observed(up):
                x = node(x, low, upsample=[None, (up.weight, up.factor)])
            else:
                x = node(x, up(low))
            outputs.append(x)
        return x, outputs

    def extra_repr(self) -> str:
        return f"{self.out_channels}, {list(self.channels)}, {list(self.up_factors)}, merge={self.merge!r}"


class DLAUp(nn.Module):
    """The ladders of a dense-prediction network: every level below the finest is aggregated upwards in turn.

    Deep Layer Aggregation (CVPR 2018), section 3.2 and figure 4. Ladder k merges the k + 2 coarsest levels at the
    resolution of its finest; its outputs take their places. State dict keys ``ida_k.*``, see :class:`IDAUp`.

    Args:
        channels: channels of each level, finest first.
        scales: stride of each level; powers of two by default.
        node_kernel: see :class:`IDAUp`.
        merge: see :class:`IDAUp`.
        all_scales: give the outcome of every ladder and not only of the last.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: fewer than two levels, scales that do not divide each other; in ``forward`` as :class:`IDAUp`.

    Shape:
        ``forward(layers)``: layer i (N, channels[i], H / scales[i], W / scales[i]). Gives (N, channels[0], ...) at the
        finest level's resolution; with ``all_scales`` one map a level, finest first, the last being the coarsest level
        itself.
    """

    def __init__(
        self,
        channels: Sequence[int],
        scales: Sequence[int] | None = None,
        *,
        node_kernel: int = 3,
        merge: str = "concat",
        all_scales: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        strides = [2**i for i in range(len(channels))] if scales is None else list(scales)
        if len(channels) < 2 or len(strides) != len(channels):
            raise ValueError(
                f"channels: expected two levels or more and a scale for each, got {list(channels)} and {strides}"
            )
        for i, (fine, coarse) in enumerate(zip(strides[:-1], strides[1:], strict=True), 1):
            if fine < 1 or coarse <= fine or coarse % fine:
                raise ValueError(f"scales[{i}]: expected a multiple of {fine}, the scale before it, got {coarse}")
        self.channels, self.scales, self.all_scales = tuple(channels), tuple(strides), all_scales
        incoming = list(channels)
        for k in range(len(channels) - 1):
            j = len(channels) - 2 - k
            factors = [stride // strides[j] for stride in strides[j:]]
            ladder = IDAUp(
                channels[j],
                incoming[j:],
                factors,
                node_kernel=node_kernel,
                merge=merge,
                device=device,
                dtype=dtype,
            )
            self.add_module(f"ida_{k}", ladder)
            strides[j + 1 :] = [strides[j]] * (len(strides) - j - 1)
            incoming[j + 1 :] = [channels[j]] * (len(channels) - j - 1)

    def forward(self, layers: Sequence[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(layers, Tensor) or len(layers) != len(self.channels):
            got = "one tensor" if isinstance(layers, Tensor) else f"{len(layers)} layers"
            raise ValueError(f"layers: expected {len(self.channels)} layers, got {got}")
        work = list(layers)
        self._check(work)
        finished = [work[-1]]
        for k in range(len(work) - 1):
            j = len(work) - 2 - k
            x, work[j + 1 :] = getattr(self, f"ida_{k}")(work[j:])
            finished.insert(0, x)
        return finished if self.all_scales else finished[0]

    def _check(self, layers: Sequence[Tensor]) -> None:
        """Sizes that fit each other, before any ladder runs."""
        for i, (x, c) in enumerate(zip(layers, self.channels, strict=True)):
            checks.check_tensor(f"layers[{i}]", x, rank=4)
            if x.shape[1] != c:
                raise checks.MismatchError(f"layers[{i}]: expected {c} channels, got shape {tuple(x.shape)}")
            if i == 0:
                continue
            factor, finer = self.scales[i] // self.scales[i - 1], layers[i - 1]
            sides = tuple(checks.upsampled(side, factor) for side in x.shape[2:])
            if x.shape[0] != finer.shape[0] or sides != tuple(finer.shape[2:]):
                raise checks.MismatchError(
                    f"layers[{i}]: expected batch {finer.shape[0]} and a size that upsampling by {factor} brings to "
                    f"{tuple(finer.shape[2:])}, that of layers[{i - 1}], got shape {tuple(x.shape)}"
                )
