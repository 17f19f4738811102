"""``python -m benchmarks.dense``: a dense-prediction network trains; its memory and time beside the one op by op.

Trains dla34up on synthetic scenes (rectangles of the class whose colour they have), then measures a step of it and of
the same network written op by op around timm's DLA-34, each in a process of its own: bytes saved for the backward
(distinct storages), peak resident memory of the first step over what stood before it, and seconds a step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dla_fast import models
from dla_fast._timm import import_timm
from dla_fast.bench.plain import PlainSeg
from dla_fast.proof import measure

IMPLS = ("dla_fast", "eager")


def scenes(count: int, side: int, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 3, side, side) of coloured rectangles, and the class of each pixel."""
    palette = torch.rand(classes, 3, generator=generator)
    labels = torch.zeros(count, side, side, dtype=torch.long)
    for image in labels:
        for _ in range(8):
            top, left, height, width = (int(v) for v in torch.randint(side // 8, side // 2, (4,), generator=generator))
            image[top : top + height, left : left + width] = int(torch.randint(classes, (1,), generator=generator))
    images = palette[labels].permute(0, 3, 1, 2) + 0.2 * torch.randn(count, 3, side, side, generator=generator)
    return images, labels


def build(impl: str, args: argparse.Namespace) -> nn.Module:
    """The network, with the same weights for either implementation."""
    torch.manual_seed(0)
    mine = models.create_model(args.model, num_classes=args.classes, down_ratio=args.down_ratio)
    network: nn.Module = mine
    if impl == "eager":
        name = args.model.removesuffix("up")
        base = import_timm().create_model(name, num_classes=0)
        channels = models.create_model(name, features_only=True, device="meta").feature_info.channels()
        network = PlainSeg(base, channels, args.classes, args.down_ratio)
        network.load_state_dict(mine.state_dict(), strict=True)
    layout = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format
    return network.to(memory_format=layout).train()


def step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One training step; the loss before it."""
    optimizer.zero_grad()
    loss = F.nll_loss(network(images)[0], labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def prepare(impl: str, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    """Network, optimizer, and one batch."""
    network = build(impl, args)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=args.lr, momentum=0.9)
    images, labels = scenes(args.batch, args.size, args.classes, torch.Generator().manual_seed(1))
    return network, optimizer, images, labels


def measured(impl: str, args: argparse.Namespace) -> dict[str, float]:
    """What a step of one implementation takes, in this process."""
    network, optimizer, images, labels = prepare(impl, args)
    # The first step of all: later ones find memory that the allocator has kept.
    gc.collect()
    before = measure.current_rss()
    measure.reset_peak_rss()
    step(network, optimizer, images, labels)
    peak = measure.peak_rss() - before
    seconds = []
    for _ in range(args.timed):
        start = time.perf_counter()
        step(network, optimizer, images, labels)
        seconds.append(time.perf_counter() - start)
    known = [*network.parameters(), *network.buffers(), images]
    saved = measure.saved_bytes(lambda: network(images)[0], exclude=known)
    return {"saved_bytes": saved, "peak_bytes": peak, "seconds": statistics.median(seconds)}


def train(args: argparse.Namespace) -> list[float]:
    """Losses of a few steps on the same scenes."""
    from tqdm import trange

    network, optimizer, images, labels = prepare("dla_fast", args)
    losses: list[float] = []
    bar = trange(args.steps, unit="step", disable=not sys.stderr.isatty())
    for _ in bar:
        losses.append(step(network, optimizer, images, labels))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.dense", description=__doc__.split("\n")[0])
    p.add_argument("--model", default="dla34up", choices=models.list_models(dense=True))
    p.add_argument("--size", type=int, default=512, help="input side in pixels (default: %(default)s)")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--classes", type=int, default=19)
    p.add_argument("--down-ratio", type=int, default=4)
    p.add_argument("--layout", default="channels_last", choices=["channels_last", "contiguous"])
    p.add_argument("--steps", type=int, default=20, help="training steps (default: %(default)s)")
    p.add_argument("--timed", type=int, default=3, help="timed steps of each implementation (default: %(default)s)")
    p.add_argument("--lr", type=float, default=0.01)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    p.add_argument("--measure", choices=IMPLS, help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    """Train, measure, report; 1 when the loss does not fall."""
    given = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(given)
    if args.measure is not None:
        print(json.dumps(measured(args.measure, args)))
        return 0
    try:
        losses = train(args)
    except KeyboardInterrupt:
        print("dense: interrupted", file=sys.stderr)
        return 130
    print(f"{args.model} at {args.size}x{args.size}, batch {args.batch}, float32, {args.layout}")
    print(f"loss over {args.steps} steps: {losses[0]:.4f} -> {losses[-1]:.4f}")
    figures = {i: measure.in_fresh_process("benchmarks.dense", [*given, "--measure", i], timeout_s=1800) for i in IMPLS}
    mine, eager = figures["dla_fast"], figures["eager"]
    for name, unit, scale in (("saved_bytes", "MB", 1e6), ("peak_bytes", "MB", 1e6), ("seconds", "s", 1.0)):
        ratio = mine[name] / eager[name]
        text = {"saved_bytes": "saved for backward", "peak_bytes": "peak of a step", "seconds": "a step"}[name]
        print(f"{text:20} {mine[name] / scale:9.2f} {unit}   eager {eager[name] / scale:9.2f} {unit}   {ratio:.2f}x")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"losses": losses, **figures}, indent=1) + "\n")
    return 0 if losses[-1] < losses[0] else 1


if __name__ == "__main__":
    sys.exit(main())
