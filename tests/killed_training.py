"""A training that is killed with -9 at a step, and the rest of it: processes of their own, forked from this one.

``python killed_training.py DATA RUNS``: for each step of a training and for each moment of saving, a run that is killed
there and goes on; exits 1 where its losses are not those of the run that nothing disturbed.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from task_helpers import curve, train

from dla_fast.bench import files
from dla_fast.tasks import engine

STEPS = 6


def in_a_process(call: Callable[[], Any]) -> int:
    """How a process ends that does this: its exit status, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            call()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(step: int, data: Path, run: Path, **given: Any) -> None:
    """Train, and end suddenly before a step."""
    original = engine.Trainer._step

    def stepping(self: Any, items: Any) -> Any:
        if self.step == step:
            kill()
        return original(self, items)

    engine.Trainer._step = stepping
    train(data, run, **given)


def killed_while_saving(number: int, data: Path, run: Path) -> None:
    """Train, and end suddenly when a checkpoint is written beside the last and not in its place yet."""
    original, seen = os.fsync, 0

    def syncing(descriptor: int) -> None:
        nonlocal seen
        seen += Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(".step-")
        if seen == number:
            kill()
        original(descriptor)

    files.os.fsync = syncing  # type: ignore[attr-defined]
    train(data, run)


def main() -> int:
    data, runs = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    # Here, so that what it imports is there for all that are forked.
    train(data, runs / "whole")
    expected = curve(runs / "whole")
    assert len(expected) == STEPS, expected
    cases: dict[str, Callable[[Path], None]] = {
        f"step {step}": functools.partial(killed_at, step, data) for step in range(STEPS)
    }
    cases |= {f"saving {number}": functools.partial(killed_while_saving, number, data) for number in (1, 2)}
    wrong = []
    for name, call in cases.items():
        run = runs / name
        assert in_a_process(functools.partial(call, run)) == -signal.SIGKILL, name
        # With worker processes now, which changes nothing.
        workers = 1 if name == "step 4" else 0
        assert in_a_process(functools.partial(train, data, run, resume=True, workers=workers)) == 0, name
        if curve(run) != expected:
            wrong.append((name, curve(run)))
        if (run / "model.safetensors").read_bytes() != (runs / "whole" / "model.safetensors").read_bytes():
            wrong.append((name, "other weights"))
    print(expected, *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
