"""What the tests of ``bench compare`` share: runs that are drawn, and what was found in a comparison."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import bench_helpers

OPS = ("aggregate", "merge", "upsample", "upsample_add", "batch_norm_act")
MODES = ("inference", "training")
TIMES = ("median_ms", "p20_ms", "p80_ms")


def record(**changes):
    return bench_helpers.record(**{"p20_ms": 0.99, "p80_ms": 1.01, "rounds": 9, "peak_bytes": None, **changes})


def drawn(seed, *, within=0.03, between=0.03, peers=("eager",), each=6, machine=1.0, ops=OPS):
    """A run of ``each`` cases of every op and mode; noise within it and from run to run, as standard deviations."""
    rng = random.Random(seed)
    rows = []
    for op in ops:
        for mode in MODES:
            for i in range(each):
                # Some cases are three times as noisy as others.
                noisy = 3 ** (i / max(each - 1, 1)) / 2
                for impl in ("dla_fast", *peers):
                    level = machine * (1 + i) * math.exp(rng.gauss(0, noisy * between))
                    samples = sorted(level * math.exp(rng.gauss(0, noisy * within)) for _ in range(9))
                    times = {"median_ms": samples[4], "p20_ms": samples[2], "p80_ms": samples[6]}
                    rows.append(record(case=f"{op}.{i}", op=op, mode=mode, impl=impl, **times))
    return {"machine": {"threads": 2}, "versions": {"torch": "2"}, "records": rows}


def slowed(run, factor, **which):
    """A run in which the times of dla_fast are ``factor`` times as long wherever the fields are ``which``."""
    run = copy.deepcopy(run)
    for r in run["records"]:
        if all(r[name] == value for name, value in {"impl": "dla_fast", **which}.items()):
            r.update({name: factor * r[name] for name in TIMES if r.get(name)})
    return run


def alarms(result):
    """What makes the exit status 1, by op and mode."""
    ops = [(op.op, op.mode) for op in result.ops if op.changed and op.ratio > 1]
    return ops, [(c.record["op"], c.record["mode"]) for c in result.changes if c.ratio > 1]


def found(result):
    return {f"{op} {mode}" for op, mode in alarms(result)[0]}


def written(path: Path, run: dict) -> str:
    path.write_text(json.dumps(run))
    return str(path)
