"""``python -m benchmarks.merges``: iterative deep aggregation beside the conventional merges of the same levels.

Levels as a DLA network gives them go through DLAUp and through an FCN-, an FPN- and a U-Net-style merge, with as many
channels in the result. Shown side by side: parameters, flops and time of a forward pass, and the output's size. What
they are worth for a task is another question, which the paper answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dla_fast import models
from dla_fast.nn import DLAUp, FCNMerge, FPNMerge, UNetMerge
from dla_fast.proof import measure

MERGES: dict[str, Callable[[list[int]], nn.Module]] = {
    "IDA (DLAUp)": DLAUp,
    "U-Net": lambda channels: UNetMerge(channels, channels[0]),
    "FPN": lambda channels: FPNMerge(channels, channels[0]),
    "FCN": lambda channels: FCNMerge(channels, channels[0]),
}


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merges", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="dla34", choices=models.list_models(dense=False))
    parser.add_argument("--size", type=int, default=512, help="input side in pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--first-level", type=int, default=2, choices=range(5), help="finest level (default: 2)")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    if args.size < 32 or args.size % 32:
        parser.error(f"--size: expected a multiple of 32, got {args.size}")
    info = models.create_model(args.model, features_only=True, device="meta").feature_info
    channels = info.channels()[args.first_level :]
    layers = [
        torch.randn(args.batch, c, args.size // s, args.size // s).to(memory_format=torch.channels_last)
        for c, s in zip(channels, info.reduction()[args.first_level :], strict=True)
    ]
    modules = {name: make(channels).eval().to(memory_format=torch.channels_last) for name, make in MERGES.items()}
    rows, flops = {}, {}
    with torch.no_grad():
        for name, module in modules.items():
            with FlopCounterMode(display=False) as counter:
                rows[name] = tuple(module(layers).shape)
            flops[name] = counter.get_total_flops()
        runs = {name: (lambda m=module: m(layers)) for name, module in modules.items()}
        times = measure.interleave(runs, rounds=args.rounds)
    print(f"levels {args.first_level} to 5 of {args.model} at {args.size}x{args.size}, batch {args.batch}, float32")
    print(f"{'merge':12} {'parameters':>12} {'GFLOP':>8} {'ms':>9}  output")
    for name, module in modules.items():
        count = sum(p.numel() for p in module.parameters())
        size = "x".join(map(str, rows[name]))
        print(f"{name:12} {count:12,} {flops[name] / 1e9:8.2f} {times[name].median_ms:9.2f}  {size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
