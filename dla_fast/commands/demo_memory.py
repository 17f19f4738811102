"""Peak memory of a training step, measured in a process that does nothing else: ``python -m`` this module."""

from __future__ import annotations

import argparse
import gc
import json

import torch

import dla_fast
from dla_fast.commands.demo_setup import Task, make_inputs, make_model, training_step
from dla_fast.proof.measure import current_rss, peak_rss, reset_peak_rss


def arguments(task: Task, swapped: bool) -> list[str]:
    """The command line that makes :func:`main` measure ``task``."""
    line = ["--model", task.model, "--batch", str(task.batch), "--size", str(task.size), "--device", task.device]
    line += ["--channels-last"] if task.channels_last else []
    return line + (["--swap"] if swapped else [])


def main() -> None:
    """Two training steps; prints the peak and the growth they caused, in bytes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--swap", action="store_true")
    args = parser.parse_args()
    task = Task(args.model, args.batch, args.size, args.device, args.channels_last, pretrained=False)
    model = make_model(task)
    if args.swap:
        # Checking the swapped units would itself take memory, and the demo has done it.
        dla_fast.swap_(model, verify=False)
    step = training_step(model, *make_inputs(task))
    gc.collect()
    reset_peak_rss()
    on_gpu = torch.device(task.device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(task.device)
    start = torch.cuda.memory_allocated(task.device) if on_gpu else current_rss()
    for _ in range(2):
        step()
    peak = torch.cuda.max_memory_allocated(task.device) if on_gpu else peak_rss()
    print(json.dumps({"peak": peak, "step": peak - start}))


if __name__ == "__main__":
    main()
