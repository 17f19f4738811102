"""Swap a CenterNet-style detector, and see that it predicts, trains and is timed as before, only faster.

    python examples/detector.py [--size 512] [--quick]

The detector is that of networks.py: DLA-34, ladders that add, learned upsampling, plain 3x3 convolutions. Two copies,
one of them swapped, train on the same made-up scenes. Losses and decoding are those of Objects as Points (Zhou et al.,
2019): the penalty-reduced focal loss on heatmaps of Gaussians, L1 on sizes and offsets, peaks of a 3x3 maximum.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from common import CLASSES, arguments, difference, parsed, scenes, side_by_side, time_both, train
from networks import Detector
from torch import Tensor

import dla_fast

STRIDE = 4


def targets(objects: Tensor, side: int) -> dict[str, Tensor]:
    """Maps (N, C, side, side) for objects (N, K, 5): heatmap, size, offset, and a mask of where there are objects."""
    count = len(objects)
    maps = {"heatmap": torch.zeros(count, len(CLASSES), side, side)}
    maps |= {name: torch.zeros(count, 2, side, side) for name in ("size", "offset")}
    maps["mask"] = torch.zeros(count, 1, side, side)
    at = torch.arange(side)
    for n in range(count):
        for kind, *box in objects[n].tolist():
            x, y, width, height = (v / STRIDE for v in box)
            column, row = int(x), int(y)
            # The paper derives the radius from the overlap that a shifted box keeps; a share of the box is close.
            sx, sy = max(width / 8, 0.7), max(height / 8, 0.7)
            splat = torch.exp(-((at - column) ** 2) / (2 * sx**2) - ((at - row) ** 2)[:, None] / (2 * sy**2))
            maps["heatmap"][n, int(kind)] = torch.maximum(maps["heatmap"][n, int(kind)], splat)
            maps["size"][n, :, row, column] = torch.tensor([width, height])
            maps["offset"][n, :, row, column] = torch.tensor([x - column, y - row])
            maps["mask"][n, 0, row, column] = 1
    return maps


def loss(outputs: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Focal loss of the heatmap, plus L1 of sizes (weighed by 0.1) and offsets at the objects' middles."""
    logits, heat = outputs["heatmap"], wanted["heatmap"]
    p = logits.sigmoid()
    found = heat.eq(1) * (1 - p) ** 2 * F.logsigmoid(logits)
    empty = (1 - heat) ** 4 * p**2 * F.logsigmoid(-logits)
    objects = wanted["mask"].sum().clamp(min=1)
    total = -(found + empty).sum() / objects
    for name, weight in (("size", 0.1), ("offset", 1.0)):
        total = total + weight * (wanted["mask"] * (outputs[name] - wanted[name]).abs()).sum() / objects
    return total


def decode(outputs: dict[str, Tensor], best: int = 20) -> Tensor:
    """The best peaks of each image: (N, best, 6) as score, class, middle x, middle y, width, height in pixels."""
    heat = outputs["heatmap"].sigmoid()
    heat = heat * (heat == F.max_pool2d(heat, 3, 1, 1))
    height, width = heat.shape[2:]
    scores, index = heat.flatten(1).topk(best)
    kind, cell = index // (height * width), index % (height * width)
    size, offset = (outputs[n].flatten(2).gather(2, cell[:, None].expand(-1, 2, -1)) for n in ("size", "offset"))
    middle = torch.stack([cell % width, cell // width], 1) + offset
    boxes = STRIDE * torch.cat([middle, size], 1)
    return torch.cat([scores[..., None], kind[..., None], boxes.transpose(1, 2)], 2)


def recall(outputs: dict[str, Tensor], objects: Tensor) -> float:
    """The share of objects whose class has a peak within two cells of their middle, of as many peaks as objects."""
    peaks = decode(outputs, objects.shape[1])
    near = (peaks[:, None, :, 2:4] - objects[:, :, None, 1:3]).abs().amax(-1) <= 2 * STRIDE
    return (near & (peaks[:, None, :, 1] == objects[:, :, None, 0])).any(2).float().mean().item()


def main() -> None:
    """Build, swap, compare, train, time."""
    args = parsed(arguments(__doc__.split("\n")[0]))
    device = torch.device(args.device)

    torch.manual_seed(0)
    before = Detector(len(CLASSES)).to(device).eval()
    after = copy.deepcopy(before)
    report = dla_fast.swap_(after)  # all that it takes
    print(report)

    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(min(args.steps, 8)):
        images, _, objects = scenes(args.batch, args.size, generator)
        wanted = {name: t.to(device) for name, t in targets(objects, args.size // STRIDE).items()}
        batches.append((images.to(device), wanted, objects.to(device)))
    images = batches[0][0]
    with torch.inference_mode():
        results = [model(images) for model in (before, after)]
    apart = max(difference(results[1][name], t) for name, t in results[0].items())
    print(f"\nlargest difference of an output, evaluation, relative: {apart:.1e}")

    def step(model: Detector, i: int) -> Tensor:
        images, wanted, _ = batches[i % len(batches)]
        return loss(model(images), wanted)

    curves, steps = [], []
    for label, model in (("training, before", before), ("training, after", after)):
        losses, once = train(model, partial(step, model), args.steps, 1e-3, label)
        curves.append(losses)
        steps.append(once)
    # The same curve at first; then rounding, which differs from any implementation to another, leads elsewhere.
    print("\n" + side_by_side(*curves))

    with torch.inference_mode():
        # The statistics of batch norm follow slowly: after so few steps those of the batch itself are the better.
        found = [recall(model.train()(images), batches[0][2]) for model in (before, after)]
    print(f"objects of the first batch found: {found[0]:.0%} before, {found[1]:.0%} after\n")

    def infer(model: Detector) -> None:
        with torch.inference_mode():
            decode(model.eval()(images))

    calls = [partial(infer, model) for model in (before, after)]
    inference, training = time_both(calls, steps, args)
    print(
        f"detector: {len(report.swapped)} units swapped, max difference {apart:.1e}, "
        f"inference {inference:.2f}x, training step {training:.2f}x"
    )


if __name__ == "__main__":
    main()
