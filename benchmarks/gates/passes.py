"""What the traffic gate measures: the passes of one op, at a size that stands for the real one.

A pass is measured twice. On meta tensors of the real size its launches are recorded, not run: that gives the tiles that
are chosen, and the size of every operand. In the interpreter the same tiles run over a few of them, with every access
counted: that gives the share of each operand that is read and written. The product of the two is what the real size
moves. It is exact where the share does not depend on the number of pixels, which is why the small size of a kernel that
walks pixels is a whole number of its tiles: none has an edge.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gates.counting import Pass, counting, tensors_of
from dla_fast.bench import Case
from dla_fast.kernels import config, conv_norm_act, conv_norm_act_backward, launch, moments, tail
from dla_fast.kernels import upsample as upsampling

MODES = ("inference", "forward", "backward")
# N * K * 4 bytes up to which the design asks for dx and dW in one pass.
FUSED_BYTES = 128 * 1024
# What the kernels are given beside their maps and weights.
_EPS, _MOMENTUM, _ACT, _SLOPE = 1e-5, 0.1, "relu", 0.0


@dataclass(frozen=True)
class Row:
    """What one launch, or a whole pass, moves; all in bytes.

    Attributes:
        case: the op and its shapes.
        what: the pass, and the kernel where it is one launch.
        moved: each distinct byte of an operand once, weights and vectors per channel left out.
        floor: the least of it that is possible; None for a launch without a floor of its own.
        weights: distinct bytes of what ``moved`` leaves out, partial sums of the weight's gradient included.
        issued: bytes of all loads and stores, those of other tiles' re-reads and of weights included.
        gated: whether ``moved`` is held to ``floor``.
    """

    case: str
    what: str
    moved: float
    floor: float | None
    weights: float
    issued: float
    gated: bool = False

    @property
    def ratio(self) -> float | None:
        """Moved over floor."""
        return self.moved / self.floor if self.floor else None


def over(rows: Iterable[Row], limit: float) -> list[Row]:
    """The gated rows that move more than ``limit`` times their floor, or less than it: then the counting is wrong."""
    return [r for r in rows if r.gated and not (r.ratio is not None and 0.999 <= r.ratio <= limit)]


@dataclass(frozen=True)
class Unit:
    """An op at its real size.

    Attributes:
        case: where it stands, and its shapes at batch 1.
        batch: images.
        dtype: of the real tensors; in the interpreter float16 stands for bfloat16, which it cannot read.
        layout: ``"channels_last"`` or ``"contiguous"``.
    """

    case: Case
    batch: int
    dtype: torch.dtype
    layout: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Images, rows and columns of the output."""
        return self.batch, self.case.height, self.case.width

    @property
    def pixels(self) -> int:
        """Pixels of the output over all images."""
        return math.prod(self.sizes)

    @property
    def label(self) -> str:
        """The op and its shapes."""
        return f"{self.case.op} {self.case.describe()}{' residual' if self.case.residual else ''}"

    @property
    def modes(self) -> tuple[str, ...]:
        """The passes that there are: upsampling has one forward."""
        return MODES if self.case.op in ("aggregate", "merge", "batch_norm_act") else MODES[1:]

    def floors(self, kernels: list[str]) -> dict[str, float]:
        """Values that a pass has to move, by the kernel that moves them (DESIGN, "The floor …").

        Where a 3x3 node upsamples its map first, that is a pass of its own, and the node then reads the whole map.
        """
        case, pixels = self.case, self.pixels
        k, n = sum(case.in_channels) * pixels, case.out_channels * pixels
        low = case.in_channels[-1] * pixels // case.factor**2
        again = n if case.residual else 0
        # Of a link of a chain the first input is z of the unit before; its residual is read wherever y is formed.
        first = case.in_channels[0] * pixels
        added = first if case.residual else 0
        up = {"upsample_kernel": low * (1 + case.factor**2), "backward_kernel": low * (2 + case.factor**2)}
        if case.op in ("upsample", "upsample_add"):
            skip = low * case.factor**2 if case.op == "upsample_add" else 0
            found = {**up, "upsample_kernel": up["upsample_kernel"] + skip}
        elif case.op == "batch_norm_act":
            found = {"moments_kernel": n, "tail_kernel": 2 * n + again}
            found |= {"reduce_kernel": 2 * n + again, "apply_kernel": 3 * n + 2 * again}
        elif case.op == "chain":
            # What is not done on load is a pass of its own: y before, and its gradient's way back behind.
            found = {"tail_kernel": 2 * first + added, "reduce_kernel": 3 * first + added}
            on_load = 0 if "tail_kernel" in kernels else added
            found |= {"stage_kernel": k + n + on_load, "fused_kernel": 2 * n + 2 * k + on_load}
            found |= {"weight_kernel": n + k + on_load, "dx_kernel": 3 * n + k}
            if "reduce_kernel" not in kernels:
                found["dx_kernel"] += first + added
        elif case.op == "merge":
            if "upsample_kernel" not in kernels:
                k -= case.in_channels[-1] * pixels - low
            found = {"inference_kernel": k + n, "stage_kernel": k + n, "tail_kernel": 2 * n, **up}
            found |= {"reduce_kernel": 2 * n, "apply_kernel": 3 * n}
        else:
            found = {"inference_kernel": k + n, "stage_kernel": k + n, "tail_kernel": 2 * n + again}
            found["reduce_kernel"] = 2 * n + again
            together = case.out_channels * sum(case.in_channels) * 4 <= FUSED_BYTES
            # Where one pass should have made both, what they share is counted once. dz is left to the weight's pass.
            found["dx_kernel"] = (2 if together else 3) * n + k + again
            found["weight_kernel"] = (0 if together else n) + k
            # A residual is the first input, which this pass reads anyway.
            found["fused_kernel"] = 2 * n + 2 * k
            # The library's products are no kernels of ours.
            found["apply_kernel"] = 3 * n + 2 * again
        return {name: float(values) for name, values in found.items() if name in kernels}

    def is_weight(self, t: Tensor) -> bool:
        """Whether a tensor is left out of the floor: weights, their gradients and partial sums of those, vectors."""
        n, k, taps = self.case.out_channels, sum(self.case.in_channels), 4 * self.case.factor**2
        side = self.case.kernel
        return (
            t.dim() <= 1
            or tuple(t.shape) in ((n, k, side, side), (self.case.in_channels[-1], 1, *[2 * self.case.factor] * 2))
            or (t.dim() == 2 and t.shape[1] == n * k)
            or (t.dim() == 3 and t.shape[0] == taps)
        )


def work_of(unit: Unit, mode: str, sizes: tuple[int, int, int], device: str) -> Callable[[], object]:
    """The host functions of a pass over new tensors of a size, ready to be called."""
    case, (images, height, width) = unit.case, sizes
    dtype = torch.float16 if device == "cpu" and unit.dtype == torch.bfloat16 else unit.dtype
    layout = torch.channels_last if unit.layout == "channels_last" else torch.contiguous_format

    def some(*shape: int, of: torch.dtype = dtype) -> Tensor:
        t = torch.empty(shape, dtype=of, device=device)
        t = t if device == "meta" else t.uniform_(0.5, 1.5)
        return t.contiguous(memory_format=layout) if t.dim() == 4 else t

    n, factor = case.out_channels, case.factor
    y, z = some(images, n, height, width), some(images, n, height, width)
    vector = some(n, of=torch.float32)
    norm = (vector,) * 4
    sums, count = (vector, vector), unit.pixels
    act = (_EPS, _ACT, _SLOPE)
    skip = some(images, n, height, width) if case.residual else None
    if case.op in ("upsample", "upsample_add"):
        x, up = some(images, n, height // factor, width // factor), some(n, 1, 2 * factor, 2 * factor)
        if mode == "backward":
            return lambda: upsampling.upsample_backward(y, x, up, factor, True, True)
        if case.op == "upsample_add":
            return lambda: upsampling.upsample_add(x, y, up, factor)
        return lambda: upsampling.upsample(x, up, factor)
    if case.op == "batch_norm_act":

        def normalise() -> None:
            if mode == "backward":
                tail.tail_backward_reduce(y, z, *norm, skip, *act)
                tail.tail_backward_apply(y, z, *norm, skip, *sums, count, *act, case.residual)
                return
            if mode == "forward":
                moments.moments(y, vector, vector, _MOMENTUM)
            tail.tail(y, *norm, skip, *act)

        return normalise
    xs, ups = [some(images, c, height, width) for c in case.in_channels], []
    weight = some(n, sum(case.in_channels), case.kernel, case.kernel)
    factors = [1] * len(xs)
    if case.op == "merge":
        factors[-1], ups = factor, [some(case.in_channels[-1], 1, 2 * factor, 2 * factor)]
        xs[-1] = some(images, case.in_channels[-1], height // factor, width // factor)
    # A residual is the first input.
    geometry, index = (factors, 1, 1, 1), 0 if case.residual else -1

    if case.op == "chain":
        own, c = some(images, case.in_channels[0], height, width) if case.residual else None, case.in_channels[0]
        pre = (0, own, *[some(c, of=torch.float32) for _ in range(4)], *act)

        def link() -> None:
            if mode == "forward":
                conv_norm_act.conv_norm_act_stage(
                    xs, ups, weight, None, vector, vector, *geometry, _MOMENTUM, True, *pre
                )
                return
            conv_norm_act_backward.conv_norm_act_backward(
                y, xs, ups, weight, None, z, *norm, *sums, factors, 1, 1, 1, -1, count, _EPS, "identity", 0.0,
                [True] * len(xs), [], True, False, *pre, True,
            )  # fmt: skip

        return link

    def gather() -> None:
        added = xs[0] if case.residual else None
        if mode == "inference":
            conv_norm_act.conv_norm_act_inference(xs, ups, weight, None, None, *norm, *geometry, index, *act)
        elif mode == "forward":
            made, *statistics = conv_norm_act.conv_norm_act_stage(
                xs, ups, weight, None, vector, vector, *geometry, _MOMENTUM, True
            )
            tail.tail(made, *statistics, vector, vector, added, *act)
        else:
            tail.tail_backward_reduce(y, z, *norm, added, *act)
            conv_norm_act_backward.conv_norm_act_backward(
                y, xs, ups, weight, None, z, *norm, *sums, *geometry, index, count, *act,
                [True] * len(xs), [True] * len(ups), True, False,
            )  # fmt: skip

    return gather


def real_launches(unit: Unit, mode: str) -> list[launch.Launch]:
    """The launches of a pass at the real size, recorded."""
    with launch.record() as launches:
        work_of(unit, mode, unit.sizes, "meta")()
    return list(launches)


def small_sizes(unit: Unit, tile: int) -> tuple[int, int, int]:
    """Images, rows and columns over which a kernel with so many pixels a tile runs: one tile over two images."""
    least = unit.case.factor if unit.case.op in ("merge", "upsample", "upsample_add") else 1
    each = max(tile // 2, (2 * least) ** 2)
    rows = 1 << (each.bit_length() - 1) // 2
    return 2, rows, each // rows


@contextlib.contextmanager
def _as_real(unit: Unit, small: int, names: set[str]) -> Iterator[None]:
    """Choose tiles and strategies as for the real size; launch these kernels alone."""
    choose, launched, on_load = config.choose, launch.launch, conv_norm_act.ON_LOAD_PIXELS

    def choose_real(kernel: str, m: int, k: int, n: int, dtype: torch.dtype, *rest: Any, **named: Any) -> Any:
        return choose(kernel, unit.pixels if m == small else m, k, n, unit.dtype, *rest, **named)

    def launch_some(kernel: Any, *args: Any, **named: Any) -> None:
        if kernel.fn.__name__ in names:
            launched(kernel, *args, **named)

    choose_real.cache_clear = choose.cache_clear  # type: ignore[attr-defined]
    try:
        config.choose, launch.launch = choose_real, launch_some  # type: ignore[assignment]
        conv_norm_act.ON_LOAD_PIXELS = small if unit.pixels <= on_load else 0
        config.install({})
        yield
    finally:
        config.choose, launch.launch, conv_norm_act.ON_LOAD_PIXELS = choose, launched, on_load
        config.install({})


def counted_passes(unit: Unit, mode: str, names: set[str], sizes: tuple[int, int, int]) -> list[Pass]:
    """The launches of some of a pass's kernels over a few tiles, counted."""
    work = work_of(unit, mode, sizes, "cpu")
    with _as_real(unit, math.prod(sizes), names), counting() as passes:
        work()
    return passes


def measure(unit: Unit, mode: str) -> list[Row]:
    """Rows of a pass: one for each launch, and the pass as a whole, which is gated.

    Raises:
        RuntimeError: the interpreter ran other kernels than would be launched at the real size.
    """
    launches = real_launches(unit, mode)
    names = [_name(one) for one in launches]
    tiles: dict[int, set[str]] = {}
    for one in launches:
        # What only adds up what others wrote runs with those of the smallest tile.
        tiles.setdefault(one.constexprs.get("BM", 0), set()).add(_name(one))
    rest = tiles.pop(0, set())
    tiles[min(tiles)] |= rest
    counted: dict[str, Pass] = {}
    for tile, kernels in tiles.items():
        counted |= {p.kernel: p for p in counted_passes(unit, mode, kernels, small_sizes(unit, tile))}
    if len(set(names)) != len(names) or set(counted) - set(names):
        raise RuntimeError(f"{unit.label}: {sorted(counted)} ran in {mode}, not {names}")
    floors = unit.floors(names)
    rows: list[Row] = []
    for one in launches:
        arguments = zip(one.kernel.arg_names, one.args, strict=False)
        given = dict(pair for n, a in arguments for pair in tensors_of(n, a))
        floor = floors.get(_name(one))
        floor = None if floor is None else floor * unit.dtype.itemsize
        if _name(one) in counted:
            rows.append(
                Row(unit.label, f"{mode}: {_name(one)}", *_scaled(unit, one, counted[_name(one)], given, floor))
            )
        elif all(unit.is_weight(t) for t in given.values()):
            # Adding up the parts of dW, which a problem of a few tiles does not split.
            size = float(sum(t.nbytes for t in given.values()))
            rows.append(Row(unit.label, f"{mode}: {_name(one)}", 0.0, floor, size, size))
        else:
            raise RuntimeError(f"{unit.label}: {_name(one)} should have run in {mode}, not {sorted(counted)}")
    total = [sum(getattr(r, field) or 0.0 for r in rows) for field in ("moved", "floor", "weights", "issued")]
    return [*rows, Row(unit.label, mode, *total, gated=True)]


def _scaled(
    unit: Unit, one: launch.Launch, counted: Pass, given: dict[str, Tensor], floor: float | None
) -> tuple[float, float | None, float, float]:
    """(moved, floor, weights, issued) of a launch at the real size."""
    moved = weights = issued = 0.0
    for operand in counted.operands:
        t = given[operand.names[0]]
        scale = t.nbytes / operand.nbytes
        if unit.is_weight(t):
            weights += operand.moved * scale
            # Every program asks for its part of them again.
            issued += operand.issued * math.prod(one.grid) / counted.programs
        else:
            moved += operand.moved * scale
            issued += operand.issued * scale
    return moved, floor, weights, issued


def _name(one: launch.Launch) -> str:
    return str(one.kernel.fn.__name__)
