"""What the processes of a run do: the cases of a block, or the compiling beforehand."""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import draw, warm
from benchmarks.gpu.blocks import BLOCKS, Block
from benchmarks.gpu.case import Setting
from benchmarks.gpu.process import LOST_DEVICE, die_with_parent
from dla_fast.ops import triton

# A case may take so many times what is expected of it, and never less than so many seconds, before it is ended.
PATIENCE, LEAST = 6.0, 25.0
Write = Callable[..., None]


@contextlib.contextmanager
def lines_to(path: Path) -> Iterator[Write]:
    """A function that writes its arguments as a line of JSON, from any thread."""
    lock = threading.Lock()
    with path.open("a", encoding="utf-8") as file:

        def write(**line: Any) -> None:
            text = json.dumps(line) + "\n"
            with lock:
                file.write(text)
                file.flush()

        yield write


def is_fatal(error: BaseException) -> bool:
    """Whether a process cannot use its device any more: after an illegal access every call fails."""
    text = str(error).lower()
    return any(words in text for words in ("illegal memory access", "misaligned address", "unspecified launch failure"))


def _counting(setting: Setting) -> contextlib.AbstractContextManager[list[str]]:
    counts = setting.on_gpu and triton.missing() is None
    return warm.counting() if counts else contextlib.nullcontext([])


def run_cases(block: Block, setting: Setting, args: argparse.Namespace, write: Write) -> int:
    """Do a share of a block's cases, and write a line before and after each; :data:`LOST_DEVICE` where it is."""
    done = set(json.loads(args.done.read_text(encoding="utf-8"))) if args.done else set()
    part, parts = args.part
    for index, case in enumerate(block.cases(setting)):
        if index % parts != part or index < args.skip or case.label in done:
            continue
        if time.time() > args.until:
            write(left_out=case.label)
            continue
        write(begun=index, label=case.label, limit=args.patience * max(PATIENCE * case.seconds, LEAST))
        start = time.time()
        fatal, compiled = False, list[str]()
        try:
            with _counting(setting) as compiled:
                found = case.run()
        except Exception as error:
            found = [{"check": case.label, "ok": False, "detail": f"{type(error).__name__}: {error}"[:600]}]
            fatal = is_fatal(error)
        for record in found:
            write(record=record, label=case.label)
        ok = all(record.get("ok", True) and not record.get("error") for record in found)
        taken = time.time() - start
        write(ended=index, label=case.label, ok=ok, seconds=taken, compiled=compiled, launches=case.launches)
        if fatal:
            return LOST_DEVICE
        if setting.on_gpu:
            torch.cuda.empty_cache()
    return 0


def prepare_cases(blocks: list[Block], setting: Setting, args: argparse.Namespace, write: Write) -> int:
    """Compile the peers of blocks that are timed later, so that they find them in the cache then."""
    part, parts = args.part
    work = [(b.name, case) for b in blocks for case in b.cases(setting) if case.prepare is not None]
    # The longest first, since they are dealt out.
    work.sort(key=lambda found: -found[1].seconds)
    for index, (name, case) in enumerate(work):
        if index % parts != part or index < args.skip or time.time() > args.until:
            continue
        write(begun=index, label=f"{name}: {case.label}", limit=args.patience * 120)
        start, error = time.time(), ""
        try:
            assert case.prepare is not None
            case.prepare()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"[:300]
        write(ended=index, prepared=case.label, seconds=time.time() - start, error=error)
        if setting.on_gpu:
            torch.cuda.empty_cache()
    return 0


def warm_up(blocks: list[Block], args: argparse.Namespace, write: Write) -> int:
    """Draw the launches of every block, in order, and compile them; a line when all of a block is there."""
    pool = warm.Pool(args.arch, args.jobs)
    waiting: dict[str, list[Future[warm.Made]]] = {}
    drawn_whole: set[str] = set()
    told: set[str] = set()

    def tell() -> None:
        for name in waiting:
            if name in drawn_whole and name not in told and all(f.done() for f in waiting[name]):
                told.add(name)
                write(warmed=name, kernels=len(set(map(id, waiting[name]))))

    try:
        for block in blocks:
            waiting[block.name] = []
            start = time.time()
            for label, jobs, error in draw.drawn(block.cases, args.arch, args.small):
                if error:
                    found = {"check": f"drawing {label}", "ok": False, "detail": error}
                    write(record=found, label=f"drawing {label}", of=block.name)
                waiting[block.name] += pool.submit(jobs, lambda made: write(made=asdict(made)))
                tell()
            drawn_whole.add(block.name)
            write(drawn=block.name, seconds=time.time() - start, kernels=len(set(map(id, waiting[block.name]))))
        while len(told) < len(blocks):
            tell()
            time.sleep(0.05)
    finally:
        pool.close()
    return 0


def main(args: argparse.Namespace) -> int:
    """Do what a process of the run was started for."""
    die_with_parent()
    setting = Setting(torch.device(args.device), args.small)
    blocks = [BLOCKS[name] for name in args.child_blocks]
    with lines_to(args.lines) as write:
        if args.child == "warm":
            return warm_up(blocks, args, write)
        if args.child == "prepare":
            return prepare_cases(blocks, setting, args, write)
        return run_cases(blocks[0], setting, args, write)
