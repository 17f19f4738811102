"""What the examples share: made-up scenes, and how two models are compared and timed."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import trange

CLASSES = ("rectangle", "disc", "triangle")


def scenes(count: int, side: int, generator: torch.Generator, objects: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images of coloured shapes, later ones in front.

    Returns:
        Images (count, 3, side, side); the class of each pixel (count, side, side), 0 for the background; objects
        (count, objects, 5) as class, middle x, middle y, width, height in pixels.
    """
    images = 0.3 * torch.randn(count, 3, side, side, generator=generator)
    labels = torch.zeros(count, side, side, dtype=torch.long)
    kinds = torch.randint(len(CLASSES), (count, objects), generator=generator)
    sizes = torch.rand(count, objects, 2, generator=generator) * side / 4 + side / 8
    middles = sizes / 2 + torch.rand(count, objects, 2, generator=generator) * (side - sizes)
    colors = 2 * torch.rand(count, objects, 3, generator=generator) - 1
    at = torch.arange(side) + 0.5
    for n in range(count):
        for kind, (w, h), (x, y), color in zip(kinds[n], sizes[n], middles[n], colors[n], strict=True):
            u, v = ((at - x) / w)[None, :], ((at - y) / h)[:, None]  # -0.5 to 0.5 within the object
            inside = (u.abs() < 0.5) & (v.abs() < 0.5)
            if kind == 1:
                inside = u.square() + v.square() < 0.25
            elif kind == 2:
                inside &= 2 * u.abs() < v + 0.5
            # One hue to a class, so that a few steps learn something.
            images[n, :, inside] += 0.5 * color[:, None]
            images[n, kind, inside] += 1.5
            labels[n, inside] = kind + 1
    return images, labels, torch.cat([kinds[..., None].float(), middles, sizes], -1)


def difference(after: Tensor, before: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((after - before).abs().max() / before.abs().max()).item()


def train(
    model: nn.Module, step: Callable[[int], Tensor], steps: int, rate: float, label: str
) -> tuple[list[float], Callable[[], float]]:
    """Train by Adam; ``step(i)`` gives the loss of the i-th batch. Returns the losses, and one more step to time."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    losses = []

    def once(i: int) -> float:
        optimizer.zero_grad()
        loss = step(i)
        loss.backward()
        optimizer.step()
        return loss.item()

    model.train()
    for i in (bar := trange(steps, desc=label, disable=None)):
        losses.append(once(i))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, lambda: once(0)


def side_by_side(before: list[float], after: list[float]) -> str:
    """Losses of two trainings as a table, of ten steps at most."""
    at = sorted({round(i * (len(before) - 1) / 9) for i in range(10)})
    rows = (("step", at), ("loss before", [before[i] for i in at]), ("loss after", [after[i] for i in at]))
    return "\n".join(
        f"{name:12}" + "".join(f"{v:9d}" if isinstance(v, int) else f"{v:9.4f}" for v in values)
        for name, values in rows
    )


def median_times(calls: list[Callable[[], object]], rounds: int, label: str, device: torch.device) -> list[float]:
    """Median milliseconds of each call, in turn, so that a slow moment of the machine hits all of them."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in trange(rounds, desc=label, disable=None):
        for call, sample in zip(calls, samples, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            sample.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(sample) for sample in samples]


def time_both(
    infer: list[Callable[[], object]], train: list[Callable[[], object]], args: argparse.Namespace
) -> tuple[float, float]:
    """Print the times of inference and of a training step, before and after; gives how many times as fast each is."""
    device, ratios = torch.device(args.device), []
    print(f"milliseconds at {args.size}x{args.size}, batch {args.batch}    before     after")
    for name, calls in (("training step", train), ("inference", infer)):
        before, after = median_times(calls, args.rounds, f"timing: {name}", device)
        print(f"  {name:31} {before:9.1f} {after:9.1f}")
        ratios.append(before / after)
    return ratios[1], ratios[0]


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that the examples share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels, a multiple of 32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="training steps of each model")
    parser.add_argument("--rounds", type=int, default=7, help="samples that each time is the median of")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; ``--quick`` wins over sizes."""
    args = parser.parse_args()
    if args.quick:
        args.size, args.batch, args.steps, args.rounds = 64, 2, 5, 2
    return args
