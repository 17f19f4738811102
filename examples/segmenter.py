"""Swap a segmentation network, and train it on made-up scenes beside the one op by op.

    python examples/segmenter.py [--amp] [--size 512] [--quick]

The network is that of networks.py: DLA-34 with ladders that concatenate and merge by 3x3 convolutions. With ``--amp``
both run under autocast to bfloat16, which asks for no change in the swapped model either.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from common import CLASSES, arguments, difference, parsed, scenes, side_by_side, time_both, train
from networks import Segmenter
from torch import Tensor

import dla_fast


def mean_iou(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Intersection over union, averaged over the classes that occur."""
    pairs = torch.bincount((labels * classes + predicted).flatten(), minlength=classes**2).view(classes, classes)
    both, either = pairs.diag(), pairs.sum(0) + pairs.sum(1) - pairs.diag()
    return (both[either > 0] / either[either > 0]).mean().item()


def main() -> None:
    """Build, swap, compare, train, time."""
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    args = parsed(parser)
    device = torch.device(args.device)
    classes = len(CLASSES) + 1  # and the background

    torch.manual_seed(0)
    before = Segmenter(classes).to(device).eval()
    after = copy.deepcopy(before)
    report = dla_fast.swap_(after)  # all that it takes
    print(report)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=args.amp)

    generator = torch.Generator().manual_seed(0)
    batches = [[t.to(device) for t in scenes(args.batch, args.size, generator)[:2]] for _ in range(8)]
    images, labels = batches[0]
    with torch.inference_mode(), autocast():
        results = [model(images).float() for model in (before, after)]
    apart = difference(results[1], results[0])
    rounding = ", both in bfloat16" if args.amp else ""
    print(f"\nlargest difference of a logit, evaluation, relative{rounding}: {apart:.1e}")

    def step(model: Segmenter, i: int) -> Tensor:
        images, labels = batches[i % len(batches)]
        with autocast():
            logits = model(images)
        return F.cross_entropy(logits.float(), labels)

    curves, steps = [], []
    for label, model in (("training, before", before), ("training, after", after)):
        losses, once = train(model, partial(step, model), args.steps, 1e-3, label)
        curves.append(losses)
        steps.append(once)
    # The same curve at first; then rounding, which differs from any implementation to another, leads elsewhere.
    print("\n" + side_by_side(*curves))

    with torch.inference_mode(), autocast():
        # The statistics of batch norm follow slowly: after so few steps those of the batch itself are the better.
        ious = [mean_iou(model.train()(images).argmax(1), labels, classes) for model in (before, after)]
    print(f"mIoU on the first batch: {ious[0]:.2f} before, {ious[1]:.2f} after\n")

    def infer(model: Segmenter) -> None:
        with torch.inference_mode(), autocast():
            model.eval()(images).argmax(1)

    calls = [partial(infer, model) for model in (before, after)]
    inference, training = time_both(calls, steps, args)
    print(
        f"segmenter: {len(report.swapped)} units swapped, max difference {apart:.1e}, mIoU {ious[1]:.2f}, "
        f"inference {inference:.2f}x, training step {training:.2f}x"
    )


if __name__ == "__main__":
    main()
