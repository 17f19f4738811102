"""What is timed: the ops with the shapes they have inside real networks, and the least time each could take.

A :class:`Case` is one definition for time, memory and correctness: it becomes a problem of
:mod:`dla_fast.proof.parity`, which every peer then runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast import functional, models
from dla_fast.nn import AggregationNode
from dla_fast.proof import measure, parity

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# forward: with training statistics and everything kept for a backward; training: forward and backward.
MODES = ("inference", "forward", "training")


@dataclass(frozen=True)
class Rates:
    """What the machine does at best, measured in the same run."""

    bytes_per_s: float
    flops_per_s: float

    def floor_ms(self, bytes_: float, flops: float) -> float:
        """The least time, in milliseconds, to move ``bytes_`` and to compute ``flops``."""
        return 1e3 * max(bytes_ / self.bytes_per_s, flops / self.flops_per_s)

    def describe(self) -> str:
        """The rates in words."""
        gigabytes, gigaflops = self.bytes_per_s / 1e9, self.flops_per_s / 1e9
        return f"floor from {gigabytes:.1f} GB/s copied and {gigaflops:.0f} GFLOP/s of the best product"


@dataclass(frozen=True)
class Case:
    """One op: where it stands, and its shapes at batch 1.

    Attributes:
        name: unique within a suite.
        in_channels: channels of each input; for ``upsample``, ``upsample_add`` and ``batch_norm_act`` the one count.
        out_channels: channels of the output.
        height: rows of the output; every map has them but one that is upsampled on the way.
        width: columns of the output.
        residual: something is added before the activation: the first input (``aggregate``), or a map of its own
            (``batch_norm_act``, ``conv_norm_act``).
        op: one of :data:`dla_fast.backend.OPS`.
        kernel: side of the convolution's kernel, for ``merge`` and ``conv_norm_act``.
        factor: how often the last input of ``merge``, or the input of ``upsample``, is smaller than the output.
        axis: what a scaling case varies, and
        value: to what.
        stride: of the convolution, for ``conv_norm_act``, as what follows.
        dilation: of the convolution.
        groups: of the convolution.
        act: the activation; "identity" for none.
    """

    name: str
    in_channels: tuple[int, ...]
    out_channels: int
    height: int
    width: int
    residual: bool = False
    op: str = "aggregate"
    kernel: int = 1
    factor: int = 2
    axis: str | None = None
    value: int | None = None
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    act: str = "relu"

    def low(self) -> tuple[int, int]:
        """Height and width of the map that is upsampled, or of a convolution's input; else the output's.

        Raises:
            ValueError: no map is upsampled to the output's size by this factor.
        """
        if self.op not in ("merge", "upsample", "upsample_add"):
            return self.height * self.stride, self.width * self.stride
        f = self.factor
        sides = [divmod(side + 2 * (f // 2) - f, f) for side in (self.height, self.width)]
        if any(rest for _, rest in sides):
            raise ValueError(f"{self.name}: {self.height}x{self.width} is no size upsampled by {f}")
        return sides[0][0], sides[1][0]

    def spec(self, batch: int, dtype: torch.dtype, layout: str, training: bool) -> parity.Spec:
        """The case as a point of the parity matrix."""
        height, width = self.low()
        return parity.Spec(
            dtype=dtype,
            layout=layout,
            channels=self.in_channels,
            out_channels=self.out_channels,
            batch=batch,
            height=height,
            width=width,
            residual=self.residual,
            training=training,
            kernel=self.kernel,
            factor=self.factor,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            act=self.act,
        )

    def describe(self) -> str:
        """The shapes in a few characters: inputs -> output @ size."""
        inputs = "+".join(map(str, self.in_channels))
        size = f"{self.height}x{self.width}"
        if self.op in ("upsample", "upsample_add"):
            return f"{inputs} @ {size}, f={self.factor}"
        if self.op == "batch_norm_act":
            return f"{inputs} @ {size}"
        text = f"{inputs} -> {self.out_channels} @ {size}"
        if self.op != "conv_norm_act":
            return text
        options = {"s": self.stride, "d": self.dilation, "g": self.groups}
        parts = [f"{self.kernel}x{self.kernel}", *(f"{name}={value}" for name, value in options.items() if value > 1)]
        parts += ["+ residual"] if self.residual else []
        return f"{text}, {' '.join([*parts, *([] if self.act == 'relu' else [self.act])])}"

    def work(self, mode: str, batch: int) -> tuple[float, float]:
        """Values that have to be moved and flops that have to be done, in one pass of ``mode``.

        Per output pixel with K input and N output channels: inference moves K + N and does 2k²KN flops; a training
        forward moves 2N more for the tail; the backward moves 4N + 2K, 6N + 2K where the kernel is larger than one
        pixel, and does 4k²KN flops. A residual is read once more in the tail and costs 2N in the backward. A map that
        is upsampled on the way counts with its own size, and so does a strided convolution's input; the weight of a
        ``conv_norm_act``, which deep inside a network is most of what is read, counts too. Upsampling reads its input
        once, writes the output, and does 8f² flops per input value; its backward moves 2 + f² and does 16f².
        """
        low_height, low_width = self.low()
        pixels, low = batch * self.height * self.width, batch * low_height * low_width
        n = self.out_channels
        if self.op == "batch_norm_act":
            values = {"inference": 2, "forward": 3, "training": 8}[mode]
            added = {"inference": 1, "forward": 1, "training": 3}[mode] if self.residual else 0
            # Two flops a value to normalise, three to measure, about ten in the backward: memory decides.
            flops = {"inference": 2, "forward": 5, "training": 15}[mode]
            return float((values + added) * n * pixels), float(flops * n * pixels)
        if self.op in ("upsample", "upsample_add"):
            adding = self.op == "upsample_add"
            moved, flops = low + pixels * (2 if adding else 1), 8 * self.factor**2 * low + (pixels if adding else 0)
            if mode == "training":
                moved, flops = moved + 2 * low + pixels, flops + 16 * self.factor**2 * low
            return float(n * moved), float(n * flops)
        k, square = sum(self.in_channels), self.kernel**2
        read = (k - self.in_channels[-1]) * pixels + self.in_channels[-1] * low
        if self.op == "conv_norm_act":
            read += square * k * n // self.groups
        written = n * pixels
        residual = written if self.residual else 0
        product = 2 * square * k * n * pixels // self.groups
        extra = 8 * self.factor**2 * self.in_channels[-1] * low if self.op == "merge" else 0
        if mode == "inference":
            return float(read + written + residual), float(product + extra)
        moved = read + 3 * written + residual
        if mode == "forward":
            return float(moved), float(product + extra)
        backward = 2 * read + (4 if self.kernel == 1 else 6) * written + 2 * residual
        return float(moved + backward), float(3 * (product + extra))

    def floor_ms(self, mode: str, batch: int, itemsize: int, rates: Rates) -> float:
        """The least time the machine could take, in milliseconds: see :meth:`work`."""
        values, flops = self.work(mode, batch)
        return rates.floor_ms(values * itemsize, flops)


def image_size(name: str, size: int | None) -> int:
    """Pixels on a side: what was asked for, else what a classifier or a dense-prediction network is used with."""
    return size or (512 if name.endswith("up") else 224)


def network_cases(name: str, size: int | None = None) -> list[Case]:
    """The aggregation nodes of a network at an input size, in the order they run, alike ones once.

    Args:
        name: one of :func:`dla_fast.models.list_models`.
        size: side of the images in pixels; by default 224, and 512 for dense prediction.
    """
    size = image_size(name, size)
    model = models.create_model(name, device="meta").eval()
    found: dict[tuple[Any, ...], Case] = {}

    def record(label: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(module, AggregationNode)
            xs = args if isinstance(args[0], Tensor) else args[0]
            channels = tuple(x.shape[1] for x in xs)
            height, width = xs[0].shape[2:]
            case = Case(f"{name}.{label}", channels, module.conv.out_channels, height, width, module.residual)
            found.setdefault((channels, height, width, module.residual), case)

        return hook

    for label, module in model.named_modules():
        if isinstance(module, AggregationNode):
            module.register_forward_pre_hook(record(label))
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return list(found.values())


def ida_cases(
    channels: Sequence[int] = (64, 128, 256, 512),
    strides: Sequence[int] = (4, 8, 16, 32),
    size: int = 512,
    name: str = "dla34up",
) -> list[Case]:
    """The steps of a dense-prediction ladder, alike ones once: projections, upsamplings, nodes and their norms.

    Deep Layer Aggregation (CVPR 2018), section 4.2: each IDA module brings the levels below its own to its channels
    (1x1 projection) and size (upsampling), and merges them one by one; the next module takes what came out. The
    add-merging family upsamples and adds instead.

    Args:
        channels: of the levels, highest resolution first.
        strides: of the levels against the image.
        size: side of the images in pixels.
        name: of the network, for the cases' names.
    """
    width, stride = list(channels), list(strides)
    found: dict[tuple[Any, ...], Case] = {}

    def add(case: Case) -> None:
        found.setdefault(dataclasses.astuple(case)[1:], case)

    for step in range(len(channels) - 1):
        first = len(channels) - 2 - step
        out, high = width[first], size // stride[first]
        for i in range(first + 1, len(channels)):
            label, low, f = f"{name}.ida_{step}", size // stride[i], stride[i] // stride[first]
            if width[i] != out:
                add(Case(f"{label}.proj_{i - first}", (width[i],), out, low, low))
            up = Case(f"{label}.up_{i - first}", (out,), out, high, high, op="upsample", factor=f)
            add(up)
            add(dataclasses.replace(up, name=f"{label}.add_{i - first}", op="upsample_add"))
            add(Case(f"{label}.node_{i - first}", (out, out), out, high, high, op="merge", kernel=3, factor=f))
            add(Case(f"{label}.norm_{i - first}", (out,), out, high, high, op="batch_norm_act"))
            width[i], stride[i] = out, stride[first]
    order = ("aggregate", "merge", "upsample", "upsample_add", "batch_norm_act")
    return sorted(found.values(), key=lambda case: order.index(case.op))


def op_cases() -> list[Case]:
    """One high and one low resolution for each of the five ops, as they occur in dla34 and dla34up."""
    nodes, steps = network_cases("dla34"), ida_cases()
    chosen = [nodes[0], nodes[-1]]
    for op in ("merge", "upsample", "upsample_add", "batch_norm_act"):
        alike = [case for case in steps if case.op == op]
        chosen += [alike[-1], alike[0]]
    # The last ladder of detectors upsamples by 4 and 8 as well.
    wider = Case("detector.up_2", (64,), 64, 128, 128, op="upsample", factor=4)
    residual = Case("dla34.level2.tree1.bn2", (64,), 64, 56, 56, residual=True, op="batch_norm_act")
    return [*chosen, wider, residual]


def launch_cases() -> list[Case]:
    """The five ops on maps so small that a call costs what it takes to start it."""
    return [
        Case("launch.aggregate", (8, 8), 8, 2, 2),
        Case("launch.merge", (8, 8), 8, 2, 2, op="merge", kernel=3),
        Case("launch.upsample", (8,), 8, 2, 2, op="upsample"),
        Case("launch.upsample_add", (8,), 8, 2, 2, op="upsample_add"),
        Case("launch.batch_norm_act", (8,), 8, 2, 2, op="batch_norm_act"),
    ]


def small_cases() -> list[Case]:
    """A node and convolution units on maps of 8x8, where what is around a kernel takes as long as the kernel."""
    return [
        Case("small.node", (64, 64), 64, 8, 8),
        Case("small.conv1x1", (64,), 64, 8, 8, op="conv_norm_act"),
        Case("small.conv3x3", (64,), 64, 8, 8, op="conv_norm_act", kernel=3),
        Case("small.residual", (64,), 64, 8, 8, op="conv_norm_act", kernel=3, residual=True),
    ]


AXES = {
    "batch": (1, 2, 4, 8, 16),
    "resolution": (7, 14, 28, 56, 112),
    "inputs": (1, 2, 3, 4, 6, 8),
    "channels": (16, 32, 64, 128, 256),
}


def scaling_cases(axes: Iterable[str] = AXES, threads: Sequence[int] = ()) -> list[Case]:
    """A node of two inputs of 64 channels at 28x28, with one thing varied at a time.

    Args:
        axes: of :data:`AXES`. The batch is the driver's to set, from ``value``.
        threads: thread counts to add as another axis.
    """
    cases = []
    for axis, values in [*((axis, AXES[axis]) for axis in axes), *([("threads", tuple(threads))] if threads else [])]:
        for value in values:
            channels = value if axis == "channels" else 64
            side = value if axis == "resolution" else 28
            inputs = (channels,) * (value if axis == "inputs" else 2)
            cases.append(Case(f"scaling.{axis}={value}", inputs, channels, side, side, axis=axis, value=value))
    return cases


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Copy bandwidth over tensors past the cache, and the rate of the best product: the library's or, on a CPU, ours.

    The library's are a matmul and a convolution; those of bfloat16 count for a sixth in float32, since six of them make
    a float product (Henry, Tang and Heinecke 2019): a floor without them would be none where the processor has
    instructions for them.
    """
    source = torch.zeros(64 * 2**20 if device.type == "cpu" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # A GPU needs more work than a CPU to show its rate.
    (side, images), channels = (1024, 8) if device.type == "cpu" else (8192, 256), 512
    calls: dict[str, Callable[[], Tensor]] = {"copy": lambda: target.copy_(source)}
    flops = {}

    def add(kind: torch.dtype, share: float) -> None:
        a, b = torch.randn(2, side, side, device=device).to(kind)
        x = torch.randn(images, channels, 14, 14, device=device).to(dtype=kind, memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 1, 1, device=device).to(dtype=kind, memory_format=torch.channels_last)
        pixels = x.numel() // channels
        calls[f"{kind} matmul"], flops[f"{kind} matmul"] = lambda: a @ b, share * 2 * side**3
        calls[f"{kind} convolution"] = lambda: F.conv2d(x, w)
        flops[f"{kind} convolution"] = share * 2 * pixels * channels**2
        if kind == dtype and device.type == "cpu":
            one = torch.ones(channels, dtype=dtype)
            calls["ours"] = lambda: functional.aggregate([x], w, one, one, one, one, training=False)
            flops["ours"] = flops[f"{kind} convolution"]

    add(dtype, 1)
    if device.type == "cpu" and dtype == torch.float32:
        add(torch.bfloat16, 1 / 6)
    with torch.no_grad():
        timings = measure.interleave(calls, rounds=25, device=device)
    # The floor is a bound, so it takes the machine's good moments.
    best = max(count / timings[name].p20_ms for name, count in flops.items())
    return Rates(2e3 * source.numel() / timings["copy"].p20_ms, 1e3 * best)
