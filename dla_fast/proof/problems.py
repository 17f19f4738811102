"""What an op is proved and timed on: a point of the parity matrix, and the values that are drawn for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dla_fast import checks, reference
from dla_fast.backend import selected
from dla_fast.ops import triton
from dla_fast.ops.precision import tf32_products
from dla_fast.proof import tf32

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# The ops that multiply matrices, for which float32's switch means something.
PRODUCTS = ("aggregate", "merge", "conv_norm_act")
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
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    residual_input: int | None = None
    seed: int = 0

    @property
    def norm_dtype(self) -> torch.dtype:
        if self.dtype in (torch.float16, torch.bfloat16) and not self.half_norm:
            return torch.float32
        return self.dtype

    def __str__(self) -> str:
        flags = [name for name in ("residual", "conv_bias", "half_norm") if getattr(self, name)]
        flags += [] if self.affine else ["no affine"]
        geometry = {"kernel": self.kernel, "stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        flags += [f"{name} {value}" for name, value in geometry.items() if value > 1]
        flags += [] if self.residual_input is None else [f"residual xs[{self.residual_input}]"]
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


class Draw:
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


def _drawn(op: str, spec: Spec, device: torch.device | str | None, factors: Sequence[int]) -> tuple[Draw, list[Any]]:
    """The tensors of a convolution with a norm, and per input None or its up-weight's name and factor."""
    draw, k, depth = Draw(spec.seed, device), spec.kernel, sum(spec.channels)
    factor = max(factors)
    full = tuple(checks.upsampled(s, factor) if factor > 1 else s for s in (spec.height, spec.width))
    ups: list[Any] = []
    for i, (c, f) in enumerate(zip(spec.channels, factors, strict=True)):
        low = factor > 1 and f > 1
        draw.add(f"x{i}", (spec.batch, c, *((spec.height, spec.width) if low else full)), spec.dtype)
        ups.append(("up_weight", f) if low else None)
        if low:
            draw.add("up_weight", (c, 1, 2 * f, 2 * f), spec.dtype)
    fan_in = max(depth // spec.groups * k * k, 1)
    shape = (spec.out_channels, depth // spec.groups, k, k)
    draw.add("weight", shape, spec.dtype, scale=1 / math.sqrt(fan_in))
    if spec.conv_bias:
        draw.add("conv_bias", (spec.out_channels,), spec.dtype)
    if op == "conv_norm_act" and spec.residual:
        sides = (checks.convolved(side, k, spec.stride, spec.dilation) for side in full)
        draw.add("residual", (spec.batch, spec.out_channels, *sides), spec.dtype)
    draw.norm(spec, spec.out_channels)
    return draw, ups


def _node_problem(op: str, spec: Spec, device: torch.device | str | None, factors: Sequence[int]) -> Problem:
    draw, ups = _drawn(op, spec, device, factors)

    def call(module: Any, t: Mapping[str, Tensor], act: str | None) -> Tensor:
        options: dict[str, Any] = {}
        if op == "aggregate":
            options["residual"] = spec.residual
        if op == "merge":
            options["upsample"] = [None if up is None else (t[up[0]], up[1]) for up in ups]
        if op == "conv_norm_act":
            options |= {"stride": spec.stride, "dilation": spec.dilation, "groups": spec.groups}
            options["residual"] = t.get("residual", spec.residual_input)
        y: Tensor = getattr(module, op)(
            [t[f"x{i}"] for i in range(len(spec.channels))],
            t["weight"],
            *_norm_arguments(t),
            training=spec.training,
            conv_bias=t.get("conv_bias"),
            act=act or spec.act,
            **options,
        )
        return y

    return Problem(draw.tensors, draw.dtypes, call, _BUFFERS, spec, draw.device, op)


def aggregate(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """An aggregation node."""
    return _node_problem("aggregate", spec, device, [1] * len(spec.channels))


def merge(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """An IDA node whose last input is upsampled."""
    return _node_problem("merge", spec, device, [1] * (len(spec.channels) - 1) + [spec.factor])


def conv_norm_act(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """The general node, without upsampling; its residual is a tensor, or the input that the spec names."""
    return _node_problem("conv_norm_act", spec, device, [1] * len(spec.channels))


def batch_norm_act(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """Batch norm, residual, activation."""
    draw = Draw(spec.seed, device)
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


def upsample(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """The learned upsampling."""
    draw, c, f = Draw(spec.seed, device), spec.out_channels, spec.factor
    draw.add("x", (spec.batch, c, spec.height, spec.width), spec.dtype)
    draw.add("weight", (c, 1, 2 * f, 2 * f), spec.dtype)

    def call(module: Any, t: Mapping[str, Tensor], act: str | None) -> Tensor:
        return module.upsample(t["x"], t["weight"], f)

    return Problem(draw.tensors, draw.dtypes, call, (), spec, draw.device, "upsample")


def upsample_add(spec: Spec, device: torch.device | str | None = None) -> Problem:
    """The add-merging step of IDA."""
    draw, c, f = Draw(spec.seed, device), spec.out_channels, spec.factor
    sides = tuple(checks.upsampled(side, f) for side in (spec.height, spec.width))
    draw.add("x", (spec.batch, c, spec.height, spec.width), spec.dtype)
    draw.add("skip", (spec.batch, c, *sides), spec.dtype)
    draw.add("weight", (c, 1, 2 * f, 2 * f), spec.dtype)

    def call(module: Any, t: Mapping[str, Tensor], act: str | None) -> Tensor:
        return module.upsample_add(t["x"], t["skip"], t["weight"], f)

    return Problem(draw.tensors, draw.dtypes, call, (), spec, draw.device, "upsample_add")


PROBLEMS = {
    "aggregate": aggregate,
    "merge": merge,
    "conv_norm_act": conv_norm_act,
    "batch_norm_act": batch_norm_act,
    "upsample": upsample,
    "upsample_add": upsample_add,
}


def rounds_products(op: str, backend: str, device: str) -> bool:
    """Whether an op of float32 follows the switch: on a GPU, or in Triton's interpreter, which does as a GPU would."""
    return op in PRODUCTS and (device == "cuda" or (device == triton.DEVICE and backend == "triton"))


def safe_gradient(problem: Problem, device: torch.device) -> Tensor:
    """A random dy, zero wherever rounding could put the pre-activation on the other side of a kink."""
    tensors = problem.materialise(torch.float64, device)
    with torch.no_grad():
        u = problem.call(reference, tensors, "identity")
    dy = Draw(problem.spec.seed + 1, problem.device).value(u.shape, problem.spec.dtype).to(device)
    if u.numel() == 0 or not problem.buffers:
        return dy
    # A tensor, so that nothing waits for a device, and meta tensors do.
    eps = tf32.EPS if problem.in_tf32(device) else torch.finfo(problem.spec.dtype).eps
    margin = 8 * eps * u.abs().max()
    for kink in KINKS.get(problem.spec.act, ()):
        dy = torch.where((u - kink).abs() < margin, 0.0, dy)
    return dy
