"""Memory of a training step, in a process that does nothing else: ``python -m`` this module prints it."""

from __future__ import annotations

import argparse
import gc
import json
import os

import torch

from dla_fast import backend
from dla_fast.bench import networks, peers
from dla_fast.bench.cases import DTYPES, LAYOUTS
from dla_fast.bench.networks import Network
from dla_fast.bench.timing import Outcome, Settings, complete, one_line
from dla_fast.proof import measure
from dla_fast.proof.measure import NO_FRAGMENTATION

# Compiled networks are left out: their compilation runs in the process and would be its peak.
IMPLEMENTATIONS = (peers.FUSED, peers.SWAPPED, peers.LOW, "eager")


def arguments(network: Network, impl: str, settings: Settings) -> list[str]:
    """The command line that makes :func:`main` measure a network."""
    line = ["--model", network.name, "--size", str(network.size), "--batch", str(network.batch), "--impl", impl]
    line += ["--device", str(settings.device), "--dtype", settings.dtype, "--layout", settings.layout]
    return [*line, "--threads", str(torch.get_num_threads())]


def measure_network(network: Network, settings: Settings) -> Outcome:
    """Peak of a training step, and what it keeps for the backward pass, with dla_fast's variants and in eager PyTorch.

    The peak is what the step adds: allocated memory on a GPU, resident memory on a CPU, where freed blocks are given
    back at once (glibc's ``MALLOC_MMAP_THRESHOLD_``) so that it is that of the tensors.
    """
    records, skipped = [], []
    for impl in IMPLEMENTATIONS:
        try:
            found = measure.in_fresh_process(__name__, arguments(network, impl, settings), env=NO_FRAGMENTATION)
        except (RuntimeError, OSError) as error:
            skipped.append({"case": network.name, "mode": "training", "impl": impl, "reason": one_line(error)})
            continue
        record = {
            "suite": "memory",
            "case": network.name,
            "op": "model",
            "mode": "training",
            "impl": impl,
            "network": found["network"],
            "device": settings.device.type,
            "dtype": settings.dtype,
            "layout": settings.layout,
            "batch": network.batch,
            "threads": torch.get_num_threads(),
            "shape": f"3 @ {network.size}x{network.size}",
            "side": network.size,
            "peak_bytes": found["peak"],
            "saved_bytes": found["saved"],
        }
        records.append(complete(record))
    return Outcome(records, skipped)


def main() -> None:
    """Count what one forward pass saves, then run two training steps; prints both, in bytes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--impl", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", choices=list(DTYPES), required=True)
    parser.add_argument("--layout", choices=list(LAYOUTS), required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    model, source = networks.make(args.model, args.impl)
    model = model.to(device=device, dtype=dtype).to(memory_format=LAYOUTS[args.layout]).train()  # type: ignore[call-overload]
    images = torch.randn(args.batch, 3, args.size, args.size).to(
        device=device, dtype=dtype, memory_format=LAYOUTS[args.layout]
    )
    forced = networks.backend_for(args.impl) if args.impl.startswith(peers.FUSED) else "reference"
    call = networks.step(model, images, "training", networks.trained(model), forced)
    with backend.use_backend(forced):
        known = [*model.parameters(), *model.buffers(), images]
        saved = measure.saved_bytes(lambda: networks.tensors_of(model(images)), exclude=known)
    del known
    gc.collect()
    measure.reset_peak_rss()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device) if on_gpu else measure.current_rss()
    for _ in range(2):
        call()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else measure.peak_rss()
    print(json.dumps({"peak": peak - start, "saved": saved, "network": source}))


if __name__ == "__main__":
    main()
