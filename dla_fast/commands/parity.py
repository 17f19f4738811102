"""The numerical contract, as code: what ``verify`` and the tests hold every backend to.

The error of a result is measured against the same op in float64 torch ops, and may be at most twice that of PyTorch's
own unfused ops in the same dtype and layout, plus half a unit in the last place of the largest value: the rounding of
the stored result, which no implementation can go below. Outputs, every gradient and the running statistics are held
to it, in the maximum and in the root-mean-square norm. Errors are pooled over the cases of one shape: the largest of a
few rounding errors is a matter of luck (two equally good orders of summation differ threefold in it), while over many
cases it is not; a wrong result is wrong by orders of magnitude and shows in any pool. For float64 itself there is
nothing more exact to compare with, and the bound is a fixed 1e-10 of the largest value.

Where products of float32 may be TF32 (``torch.backends.cudnn.conv.fp32_precision``), PyTorch's error is that of its ops
with operands rounded to TF32, or its own if that is larger: cuDNN picks a kernel without TF32 for one shape and one
with it for the next, while ours rounds always. Operands that are cut off instead miss the bound. Ops without products
are held to float32's own error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dla_fast import functional, reference
from dla_fast.backend import selected
from dla_fast.commands import tf32
from dla_fast.ops import triton
from dla_fast.ops.precision import fp32_precision, tf32_products

__all__ = [
    "KINKS",
    "LAYOUTS",
    "PROBLEMS",
    "PRODUCTS",
    "Errors",
    "Pool",
    "Problem",
    "Spec",
    "execute",
    "fp32_precision",
    "gradient_function",
    "infer",
    "rounds_products",
    "safe_gradient",
]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# The ops that multiply matrices, for which float32's switch means something.
PRODUCTS = ("aggregate", "merge")
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}


@dataclass(frozen=True)
class Spec:
    """One point of the parity matrix."""

    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"
    channels: tuple[int, ...] = (24, 5)
    out_channels: int = 24
    batch: int = 2
    height: int = 7
    width: int = 5
    act: str = "relu"
    residual: bool = False
    training: bool = True
    conv_bias: bool = False
    affine: bool = True
    half_norm: bool = False
    kernel: int = 1
    factor: int = 2
    seed: int = 0

    @property
    def norm_dtype(self) -> torch.dtype:
        if self.dtype in (torch.float16, torch.bfloat16) and not self.half_norm:
            return torch.float32
        return self.dtype

    def __str__(self) -> str:
        flags = [name for name in ("residual", "conv_bias", "half_norm") if getattr(self, name)]
        flags += [] if self.affine else ["no affine"]
        mode = "training" if self.training else "frozen"
        shape = f"{'+'.join(map(str, self.channels))}->{self.out_channels} {self.batch}x{self.height}x{self.width}"
        return " ".join([str(self.dtype).removeprefix("torch."), self.layout, shape, self.act, mode, *flags])


@dataclass
class Problem:
    """An op applied to drawn values: tensors that the dtypes of the spec represent exactly.

    Without a device they are float64 on the CPU. With one they were drawn there, and lie there in float32 where that
    holds them: a batch of a network's size takes minutes to draw on a CPU, and half the memory counts.
    """

    tensors: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    call: Callable[[Any, Mapping[str, Tensor], str | None], Tensor]
    buffers: tuple[str, ...] = ()
    spec: Spec = field(default_factory=Spec)
    device: torch.device | None = None
    op: str = ""

    @property
    def differentiable(self) -> list[str]:
        return [name for name in self.tensors if name not in self.buffers]

    def materialise(self, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        """The tensors in their own dtypes, or all in one, in the layout of the spec."""
        out = {}
        for name, value in self.tensors.items():
            t = value.to(device=device, dtype=dtype or self.dtypes[name])
            layout = LAYOUTS[self.spec.layout] if t.dim() == 4 else torch.contiguous_format
            t = t.to(memory_format=layout, copy=True) if t.dim() == 4 else t.clone()
            out[name] = t.requires_grad_(name not in self.buffers)
        return out

    def in_tf32(self, device: torch.device) -> bool:
        """Whether products are TF32 there, on the backend in force."""
        may = rounds_products(self.op, selected(), device.type)
        return may and self.spec.dtype == torch.float32 and tf32_products()


class _Draw:
    """Draws values that a dtype represents exactly: in float64 on the CPU, or on a device, see :class:`Problem`."""

    def __init__(self, seed: int, device: torch.device | str | None) -> None:
        self.device = None if device is None else torch.device(device)
        at = self.device or torch.device("cpu")
        # Meta tensors have no values, and refuse a generator.
        self.generator = None if at.type == "meta" else torch.Generator(at).manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def value(self, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0, low: float = 0.0) -> Tensor:
        wide = torch.float64 if self.device is None or dtype.itemsize > 4 else torch.float32
        options: dict[str, Any] = {"generator": self.generator, "dtype": wide, "device": self.device or "cpu"}
        value = torch.rand(shape, **options).add_(low) if low else torch.randn(shape, **options).mul_(scale)
        return value.to(dtype).to(wide)

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, low: float = 0.0) -> None:
        self.tensors[name] = self.value(shape, dtype, scale, low)
        self.dtypes[name] = dtype

    def norm(self, spec: Spec, channels: int) -> None:
        if spec.affine:
            self.add("bn_weight", (channels,), spec.norm_dtype)
            self.add("bn_bias", (channels,), spec.norm_dtype)
        self.add("running_mean", (channels,), spec.norm_dtype)
        self.add("running_var", (channels,), spec.norm_dtype, low=0.5)


_BUFFERS = ("running_mean", "running_var")


def _norm_arguments(t: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    return t.get("bn_weight"), t.get("bn_bias"), t["running_mean"], t["running_var"]


def aggregate(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """An aggregation node."""
    draw = _Draw(spec.seed, device)
    for i, c in enumerate(spec.channels):
        draw.add(f"x{i}", (spec.batch, c, spec.height, spec.width), spec.dtype)
    depth = sum(spec.channels)
    draw.add("weight", (spec.out_channels, depth, 1, 1), spec.dtype, scale=1 / math.sqrt(max(depth, 1)))
    if spec.conv_bias:
        draw.add("conv_bias", (spec.out_channels,), spec.dtype)
    draw.norm(spec, spec.out_channels)

    def call(module: Any, t: Mapping[str, Tensor], act: str | None) -> Tensor:
        return module.aggregate(
            [t[f"x{i}"] for i in range(len(spec.channels))],
            t["weight"],
            *_norm_arguments(t),
            training=spec.training,
            conv_bias=t.get("conv_bias"),
            residual=spec.residual,
            act=act or spec.act,
        )

    return Problem(draw.tensors, draw.dtypes, call, _BUFFERS, spec, draw.device, "aggregate")


def batch_norm_act(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """Batch norm, residual, activation."""
    draw = _Draw(spec.seed, device)
    shape = (spec.batch, spec.out_channels, spec.height, spec.width)
    draw.add("x", shape, spec.dtype)
    if spec.residual:
        draw.add("residual", shape, spec.dtype)
    draw.norm(spec, spec.out_channels)

    def call(module: Any, t: Mapping[str, Tensor], act: str | None) -> Tensor:
        return module.batch_norm_act(
            t["x"],
            *_norm_arguments(t),
            training=spec.training,
            residual=t.get("residual"),
            act=act or spec.act,
        )

    return Problem(draw.tensors, draw.dtypes, call, _BUFFERS, spec, draw.device, "batch_norm_act")


def merge(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """An IDA node whose last input is upsampled."""
    draw = _Draw(spec.seed, device)
    f = spec.factor
    large = tuple((side - 1) * f - 2 * (f // 2) + 2 * f for side in (spec.height, spec.width))
    for i, c in enumerate(spec.channels):
        small = i == len(spec.channels) - 1
        draw.add(f"x{i}", (spec.batch, c, *((spec.height, spec.width) if small else large)), spec.dtype)
    k, depth = spec.kernel, sum(spec.channels)
    draw.add("up_weight", (spec.channels[-1], 1, 2 * f, 2 * f), spec.dtype)
    draw.add("weight", (spec.out_channels, depth, k, k), spec.dtype, scale=1 / math.sqrt(depth * k * k))
    if spec.conv_bias:
        draw.add("conv_bias", (spec.out_channels,), spec.dtype)
    draw.norm(spec, spec.out_channels)

    def call(module: Any, t: Mapping[str, Tensor], act: str | None) -> Tensor:
        return module.merge(
            [t[f"x{i}"] for i in range(len(spec.channels))],
            t["weight"],
            *_norm_arguments(t),
            training=spec.training,
            conv_bias=t.get("conv_bias"),
            upsample=[None] * (len(spec.channels) - 1) + [(t["up_weight"], f)],
            act=act or spec.act,
        )

    return Problem(draw.tensors, draw.dtypes, call, _BUFFERS, spec, draw.device, "merge")


def upsample(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """The learned upsampling."""
    draw, c, f = _Draw(spec.seed, device), spec.out_channels, spec.factor
    draw.add("x", (spec.batch, c, spec.height, spec.width), spec.dtype)
    draw.add("weight", (c, 1, 2 * f, 2 * f), spec.dtype)

    def call(module: Any, t: Mapping[str, Tensor], act: str | None) -> Tensor:
        return module.upsample(t["x"], t["weight"], f)

    return Problem(draw.tensors, draw.dtypes, call, (), spec, draw.device, "upsample")


def upsample_add(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """The add-merging step of IDA."""
    draw, c, f = _Draw(spec.seed, device), spec.out_channels, spec.factor
    sides = tuple((side - 1) * f - 2 * (f // 2) + 2 * f for side in (spec.height, spec.width))
    draw.add("x", (spec.batch, c, spec.height, spec.width), spec.dtype)
    draw.add("skip", (spec.batch, c, *sides), spec.dtype)
    draw.add("weight", (c, 1, 2 * f, 2 * f), spec.dtype)

    def call(module: Any, t: Mapping[str, Tensor], act: str | None) -> Tensor:
        return module.upsample_add(t["x"], t["skip"], t["weight"], f)

    return Problem(draw.tensors, draw.dtypes, call, (), spec, draw.device, "upsample_add")


PROBLEMS = {
    "aggregate": aggregate,
    "merge": merge,
    "batch_norm_act": batch_norm_act,
    "upsample": upsample,
    "upsample_add": upsample_add,
}


def rounds_products(op: str, backend: str, device: str) -> bool:
    """Whether an op of float32 follows the switch: on a GPU, or in Triton's interpreter, which does as a GPU would."""
    return op in PRODUCTS and (device == "cuda" or (device == triton.DEVICE and backend == "triton"))


@dataclass
class Errors:
    """Errors of one tensor over a pool of cases: dla_fast's and PyTorch's own, and the largest value there is."""

    eps: float
    largest: float = 0.0
    peer_largest: float = 0.0
    squares: float = 0.0
    peer_squares: float = 0.0
    values: int = 0
    scale: float = 0.0
    worst_case: str = ""

    def add(self, mine: Tensor, peer: Tensor, scale: float, case: str) -> None:
        """Add the errors of a case, elementwise."""
        if mine.numel() == 0:
            return
        largest = mine.abs().max().item()
        # Written so that NaN counts as the largest there is.
        if not largest <= self.largest:
            self.largest, self.worst_case = largest, case
        self.peer_largest = max(self.peer_largest, peer.abs().max().item())
        self.squares += mine.square().sum().item()
        self.peer_squares += peer.square().sum().item()
        self.values += mine.numel()
        self.scale = max(self.scale, scale)

    def rows(self) -> list[tuple[str, float, float, float]]:
        """(norm, error, PyTorch's error, bound) in both norms, in units of the largest value."""
        unit, n = self.scale or 1.0, max(self.values, 1)
        out = []
        for norm, error, peer in (
            ("max", self.largest / unit, self.peer_largest / unit),
            ("rms", math.sqrt(self.squares / n) / unit, math.sqrt(self.peer_squares / n) / unit),
        ):
            double = self.eps == torch.finfo(torch.float64).eps
            out.append((norm, error, peer, 1e-10 if double else 2 * peer + self.eps / 2))
        return out


class Pool:
    """Compares ``dla_fast.functional`` with the contract over many cases."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.errors: dict[str, Errors] = {}
        self.cases = 0

    def add(self, problem: Problem) -> None:
        """Run one problem, forward and backward, on the backend in force, and keep its errors."""
        dy = safe_gradient(problem, self.device)
        self._add(problem, dy, lambda module, dtype: execute(problem, module, dy, dtype))

    def add_inference(self, problem: Problem) -> None:
        """Run one problem without gradients, which other kernels serve, and keep the errors of its output."""
        name = "y of inference"
        self._add(problem, None, lambda module, dtype: {name: infer(problem, module, dtype, self.device)})

    def _add(
        self, problem: Problem, dy: Tensor | None, run: Callable[[Any, torch.dtype | None], dict[str, Tensor]]
    ) -> None:
        self.cases += 1
        exact = run(reference, torch.float64)
        mine = run(functional, None)
        # cuDNN's transposed convolutions use TF32 too; an op that is nothing else uses none here.
        with contextlib.nullcontext() if problem.op in PRODUCTS else fp32_precision("ieee"):
            peer = run(reference, None)
        rounding = {}
        if problem.in_tf32(self.device):
            with fp32_precision("ieee"), tf32.RoundedProducts():
                rounding = run(reference, None)
        for name, value in exact.items():
            dtype = problem.dtypes.get(name.removeprefix("d "), problem.spec.dtype)
            scale = value.abs().max().item() if value.numel() else 0.0
            if problem.spec.training and name == "d conv_bias" and dy is not None:
                # Truly zero: measured against the size of the terms that cancel.
                scale = math.sqrt(dy[:, 0].numel())
            if value.isfinite().all() and not peer[name].isfinite().all():
                # PyTorch itself fails: its bfloat16 convolutions on processors with matrix units now and then multiply
                # memory that nobody wrote by zero. The yardstick is then the exact result, rounded.
                peer[name] = value.to(dtype).double()
            if rounding and (rounding[name] - value).norm() > (peer[name] - value).norm():
                peer[name] = rounding[name]
            errors = self.errors.setdefault(name, Errors(torch.finfo(dtype).eps))
            errors.add(mine[name] - value, peer[name] - value, scale, str(problem.spec))

    def worst(self) -> float:
        """The largest ratio of an error to its bound."""
        return max((error / bound for e in self.errors.values() for _, error, _, bound in e.rows()), default=0.0)

    def failures(self) -> str:
        """What misses its bound, a line each; empty when all holds."""
        return "\n".join(
            f"{name} ({norm}): error {error:.2e} over bound {bound:.2e} (PyTorch {peer:.2e}); largest in {e.worst_case}"
            for name, e in self.errors.items()
            for norm, error, peer, bound in e.rows()
            if not error <= bound
        )


def safe_gradient(problem: Problem, device: torch.device) -> Tensor:
    """A random dy, zero wherever rounding could put the pre-activation on the other side of a kink."""
    tensors = problem.materialise(torch.float64, device)
    with torch.no_grad():
        u = problem.call(reference, tensors, "identity")
    dy = _Draw(problem.spec.seed + 1, problem.device).value(u.shape, problem.spec.dtype).to(device)
    if u.numel() == 0 or not problem.buffers:
        return dy
    # A tensor, so that nothing waits for a device, and meta tensors do.
    eps = tf32.EPS if problem.in_tf32(device) else torch.finfo(problem.spec.dtype).eps
    margin = 8 * eps * u.abs().max()
    for kink in KINKS.get(problem.spec.act, ()):
        dy = torch.where((u - kink).abs() < margin, 0.0, dy)
    return dy


def execute(problem: Problem, module: Any, dy: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Output, gradients and buffers of the op on ``module`` (functional or reference), as float64 tensors."""
    tensors = problem.materialise(dtype, dy.device)
    y = problem.call(module, tensors, None)
    layout = LAYOUTS[problem.spec.layout]
    y.backward(dy.to(dtype=y.dtype, memory_format=layout))
    out = {"y": y.detach().double()}
    for name, t in tensors.items():
        if name in problem.buffers:
            out[name] = t.double()
        else:
            assert t.grad is not None, f"no gradient for {name}"
            assert t.grad.dtype == t.dtype
            assert t.grad.shape == t.shape
            out[f"d {name}"] = t.grad.double()
    return out


def infer(problem: Problem, module: Any, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Output of the op on ``module`` without gradients, as float64."""
    tensors = problem.materialise(dtype, device)
    with torch.no_grad():
        return problem.call(module, tensors, None).double()


def gradient_function(
    problem: Problem, device: torch.device | str = "cpu"
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The op as gradcheck wants it: a function of its differentiable tensors in float64, and those tensors."""
    tensors = problem.materialise(torch.float64, torch.device(device))
    names = problem.differentiable

    def run(*values: Tensor) -> Tensor:
        # Fresh buffers: gradcheck calls many times, and a call must not see what another wrote.
        fresh = {name: tensors[name].clone() for name in problem.buffers}
        return problem.call(functional, {**fresh, **dict(zip(names, values, strict=True))}, None)

    return run, [tensors[name] for name in names]
