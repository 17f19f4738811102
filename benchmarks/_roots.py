"""What the traffic gate measures: the passes of an aggregation node, at a size that stands for the real one.

A pass is measured twice. On meta tensors of the real size its launches are recorded, not run: that gives the tiles that
are chosen, and the size of every operand. In the interpreter the same tiles run over a few of them, with every access
counted: that gives the share of each operand that is read and written. The product of the two is what the real size
moves. It is exact where the share does not depend on the number of pixels, which is why the small size is a whole
number of tiles: no tile has an edge.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks._counting import Pass, counting, tensors_of
from dla_fast import functional, use_backend
from dla_fast.commands.bench import Case
from dla_fast.kernels import aggregate, aggregate_backward, config, launch, tail

MODES = ("inference", "forward", "backward")
# Kernels that only add up what another wrote have no share of the floor of their own.
_OWN_FLOOR = ("inference_kernel", "stage_kernel", "tail_kernel", "reduce_kernel", "dx_kernel", "weight_kernel")
# N * K * 4 bytes up to which the design asks for dx and dW in one pass.
_FUSED_BYTES = 128 * 1024


@dataclass(frozen=True)
class Row:
    """What one launch, or a whole pass, moves; all in bytes.

    Attributes:
        case: the node.
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


def over(rows: list[Row], limit: float) -> list[Row]:
    """The gated rows that move more than ``limit`` times their floor."""
    return [r for r in rows if r.gated and not (r.ratio is not None and r.ratio <= limit)]


@dataclass(frozen=True)
class Root:
    """A node at its real size.

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
    def pixels(self) -> int:
        """Pixels over all images."""
        return self.batch * self.case.height * self.case.width

    def floors(self, kernels: list[str]) -> dict[str, float]:
        """Values that a pass has to move per pixel, by the kernel that moves them (DESIGN, "The floor …")."""
        k, n = sum(self.case.in_channels), self.case.out_channels
        again = n if self.case.residual else 0
        reads = {"inference_kernel": k + n, "stage_kernel": k + n, "tail_kernel": 2 * n + again}
        reads["reduce_kernel"] = 2 * n + again
        together = n * k * 4 <= _FUSED_BYTES
        if "dx_kernel" in kernels:
            # Where they should have been one pass, what they share is counted once.
            reads["dx_kernel"] = 2 * n + k + again
            reads["weight_kernel"] = (0 if together else 2 * n) + k
        else:
            reads["weight_kernel"] = (2 * n if together else 4 * n) + 2 * k + again
        return {name: float(reads[name]) for name in _OWN_FLOOR if name in kernels}

    def is_weight(self, t: Tensor) -> bool:
        """Whether a tensor is left out of the floor: the weight, its gradient and partial sums of it, vectors."""
        n, k = self.case.out_channels, sum(self.case.in_channels)
        return t.dim() <= 1 or tuple(t.shape) == (n, k, 1, 1) or (t.dim() == 2 and t.shape[1] == n * k)


def _tensors(root: Root, sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[list[Tensor], ...]:
    """Inputs and output map, weight, and four vectors in float32."""
    images, height, width = sizes
    layout = torch.channels_last if root.layout == "channels_last" else torch.contiguous_format
    n, k = root.case.out_channels, sum(root.case.in_channels)

    def ones(*shape: int, dtype: torch.dtype) -> Tensor:
        t = torch.empty(shape, dtype=dtype, device=device)
        return t if device == "meta" else t.uniform_(0.5, 1.5)

    maps = [ones(images, c, height, width, dtype=dtype).to(memory_format=layout) for c in (*root.case.in_channels, n)]
    return maps, [ones(n, k, 1, 1, dtype=dtype)], [ones(n, dtype=torch.float32) for _ in range(4)]


def real_launches(root: Root, mode: str) -> list[launch.Launch]:
    """The launches of a pass at the real size, recorded."""
    sizes = (root.batch, root.case.height, root.case.width)
    (*xs, y), (weight,), (gamma, beta, mean, var) = _tensors(root, sizes, root.dtype, "meta")
    residual = root.case.residual
    skip = xs[0] if residual else None
    with launch.record() as launches:
        if mode == "inference":
            aggregate.aggregate_inference(xs, weight, None, gamma, beta, mean, var, 1e-5, residual, "relu", 0.0)
        elif mode == "forward":
            z, *moments = aggregate.aggregate_stage(xs, weight, None, mean, var, 0.1, True)
            tail.tail(z, *moments, gamma, beta, skip, 1e-5, "relu", 0.0)
        else:
            norm = (mean, var, gamma, beta)
            sums = tail.tail_backward_reduce(y, y, *norm, skip, 1e-5, "relu", 0.0)
            needed = [True] * len(xs)
            aggregate_backward.aggregate_backward(
                y, xs, weight, y, *norm, *sums, float(root.pixels), 1e-5, residual, "relu", 0.0, needed, True
            )
    return list(launches)


def small_sizes(launches: list[launch.Launch]) -> tuple[int, int, int]:
    """Images, rows and columns that are two whole tiles of every launch, in two images."""
    tiles = math.lcm(*(one.config.block_m for one in launches if "BM" in one.constexprs))
    rows = 1 << (tiles.bit_length() - 1) // 2
    return 2, rows, tiles // rows


@contextlib.contextmanager
def _chosen_for(root: Root, small: int) -> Iterator[None]:
    """Choose tiles as for the real size, for a device as much smaller as the problem is."""
    choose, programs = config.choose, config.PROGRAMS

    def choose_real(kernel: str, m: int, k: int, n: int, dtype: torch.dtype, *rest: Any, **named: Any) -> Any:
        return choose(kernel, root.pixels if m == small else m, k, n, root.dtype, *rest, **named)

    choose_real.cache_clear = choose.cache_clear  # type: ignore[attr-defined]
    try:
        config.choose, config.PROGRAMS = choose_real, max(1, programs * small // root.pixels)  # type: ignore
        config.install({})
        yield
    finally:
        config.choose, config.PROGRAMS = choose, programs
        config.install({})


def counted_passes(root: Root, mode: str, sizes: tuple[int, int, int]) -> list[Pass]:
    """The launches of a pass over a few tiles, run through the public function and autograd, and counted."""
    dtype = torch.float16 if root.dtype == torch.bfloat16 else root.dtype
    (*xs, dy), (weight,), (gamma, beta, mean, var) = _tensors(root, sizes, dtype, "cpu")
    norm = (gamma, beta, mean, var)
    options: dict[str, Any] = {"residual": root.case.residual, "act": "relu"}
    with use_backend("triton"), _chosen_for(root, math.prod(sizes)):
        if mode == "inference":
            with torch.no_grad(), counting() as passes:
                functional.aggregate(xs, weight, *norm, training=False, **options)
            return passes
        wanted = [t.requires_grad_() for t in (*xs, weight, gamma, beta)]
        with counting() as passes:
            y = functional.aggregate(xs, weight, *norm, training=True, **options)
        if mode == "backward":
            with counting() as passes:
                torch.autograd.grad(y, wanted, dy)
    return passes


def measure(root: Root, mode: str) -> list[Row]:
    """Rows of a pass: one for each launch, and the pass as a whole, which is gated.

    Raises:
        RuntimeError: the interpreter ran other kernels than would be launched at the real size.
    """
    launches = real_launches(root, mode)
    passes = iter(counted_passes(root, mode, small_sizes(launches)))
    floors = root.floors([_name(one) for one in launches])
    label = f"{'+'.join(map(str, root.case.in_channels))} -> {root.case.out_channels}"
    label += f" @ {root.case.height}x{root.case.width}{' residual' if root.case.residual else ''}"
    rows: list[Row] = []
    counted = next(passes, None)
    for one in launches:
        name = _name(one)
        arguments = zip(one.kernel.arg_names, one.args, strict=False)
        given = dict(pair for n, a in arguments for pair in tensors_of(n, a))
        floor = floors.get(name)
        floor = None if floor is None else floor * root.pixels * root.dtype.itemsize
        if counted is not None and counted.kernel == name:
            rows.append(Row(label, f"{mode}: {name}", *_scaled(root, one, counted, given, floor)))
            counted = next(passes, None)
        elif all(root.is_weight(t) for t in given.values()):
            # Adding up the parts of dW, which a problem of a few tiles does not split.
            size = float(sum(t.nbytes for t in given.values()))
            rows.append(Row(label, f"{mode}: {name}", 0.0, floor, size, size))
        else:
            raise RuntimeError(f"{label}: {name} should have run in {mode}, not {counted and counted.kernel}")
    if counted is not None:
        raise RuntimeError(f"{label}: {counted.kernel} ran in {mode}, and would not at the real size")
    total = [sum(getattr(r, field) or 0.0 for r in rows) for field in ("moved", "floor", "weights", "issued")]
    return [*rows, Row(label, mode, *total, gated=True)]


def _scaled(
    root: Root, one: launch.Launch, counted: Pass, given: dict[str, Tensor], floor: float | None
) -> tuple[float, float | None, float, float]:
    """(moved, floor, weights, issued) of a launch at the real size."""
    moved = weights = issued = 0.0
    for operand in counted.operands:
        t = given[operand.names[0]]
        scale = t.nbytes / operand.nbytes
        if root.is_weight(t):
            weights += operand.moved * scale
            # Every program asks for its part of them again.
            issued += operand.issued * math.prod(one.grid) / counted.programs
        else:
            moved += operand.moved * scale
            issued += operand.issued * scale
    return moved, floor, weights, issued


def _name(one: launch.Launch) -> str:
    return str(one.kernel.fn.__name__)
