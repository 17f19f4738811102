"""Blocks that go wrong, in the place of those of benchmarks.gpu: what test_gpu_benchmark.py runs as its processes.

DYING_BLOCKS=mended lets the same cases go well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.gpu import __main__, blocks
from benchmarks.gpu.case import Case, passed

MENDED = os.environ.get("DYING_BLOCKS") == "mended"


def fine(label):
    return Case(label, lambda: passed(label, True))


def _raise(text):
    raise RuntimeError(text)


def _hang():
    # Its own child holds on for longer than anybody waits.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    time.sleep(600)


def _measure():
    record = {"suite": "gpu", "case": "root", "op": "aggregate", "mode": "inference", "dtype": "float32", "batch": 2}
    record |= {"layout": "channels_last", "threads": 1, "device": "cpu", "side": 8, "shape": "64 @ 8x8"}
    times = {"dla_fast": 1.0, "eager": 2.0}
    return [
        {**record, "impl": impl, "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "floor_ms": 0.5, "bytes": 10.0}
        for impl, ms in times.items()
    ]


WRONG = {
    "roots": ("raises", lambda: _raise("a case that raises")),
    "checks": ("dies", lambda: os._exit(11)),
    "nodes": ("loses the device", lambda: _raise("CUDA error: an illegal memory access was encountered")),
    "networks": ("hangs", _hang),
}


def cases(name):
    def listed(setting):
        yield fine(f"{name} first")
        if name in WRONG:
            label, run = WRONG[name]
            yield fine(label) if MENDED else Case(label, run, seconds=0.2)
        yield fine(f"{name} last")
        if name == "bandwidth":
            yield Case("measured", _measure)

    return listed


for block_name, block in list(blocks.BLOCKS.items()):
    blocks.BLOCKS[block_name] = blocks.Block(block_name, block.title, block.seconds, 1, cases(block_name))
if __name__ == "__main__":
    sys.exit(__main__.main())
