"""A run as data: the JSON file, what identifies a record, and the ratios that tables and pictures show."""

from __future__ import annotations

import datetime
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dla_fast._version import __version__
from dla_fast.bench import files, peers
from dla_fast.bench.cases import Rates
from dla_fast.proof import machine

Record = dict[str, Any]
# What tells two records of a run apart.
IDENTITY = ("suite", "case", "op", "mode", "impl", "device", "dtype", "layout", "batch", "threads")
# The same without who computed it: one comparison.
_GROUP = ("suite", "case", "op", "mode", "device", "dtype", "batch", "threads")


class NotARun(Exception):
    """A file that holds no run; the message is one line, for whoever named the file."""


def machine_facts(device: torch.device, rates: dict[str, Rates]) -> dict[str, Any]:
    """The machine, with the rates measured by dtype; the first of them also as ``bytes_per_s`` and ``flops_per_s``."""
    name = machine.cpu_name()
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "cpu": name,
        # torch's, by which runs are told to be of one machine; what the kernels used beside it.
        "isa": torch.backends.cpu.get_cpu_capability(),
        "kernel_isa": machine.instruction_set(),
        "threads": torch.get_num_threads(),
        "rates": {
            key: {"bytes_per_s": rate.bytes_per_s, "flops_per_s": rate.flops_per_s} for key, rate in rates.items()
        },
    }
    if rates:
        first = next(iter(rates.values()))
        facts |= {"bytes_per_s": first.bytes_per_s, "flops_per_s": first.flops_per_s}
    return facts


def instruction_set(facts: dict[str, Any]) -> str | None:
    """The instruction set to show for a run; runs kept before the kernels' own was recorded have torch's alone.

    Args:
        facts: the run's ``machine``.
    """
    shown: str | None = facts.get("kernel_isa")
    return machine.of_torch(facts["isa"]) if shown is None and facts.get("isa") else shown


def commit() -> str | None:
    """The commit this package is at, with ``+changes`` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """The versions that decide what is measured."""
    found = {"dla_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        if torch.backends.cudnn.is_available():
            found["cudnn"] = str(torch.backends.cudnn.version())
    return found


class Run:
    """A run that grows, and is on disk after every step where it has a file.

    Args:
        device: where it runs.
        path: the JSON file, or None to keep the run in memory.
        command: the command line, to be kept with the run.
    """

    def __init__(self, device: torch.device, path: Path | None = None, command: Sequence[str] = ()) -> None:
        self.device = device
        self.path = path
        self.records: list[Record] = []
        self.skipped: list[dict[str, str]] = []
        self.rates: dict[str, Rates] = {}
        self.left_out: list[str] = []
        self.complete = False
        self._fixed = {
            "versions": versions(),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": list(command),
        }

    def add(self, records: Iterable[Record], skipped: Iterable[dict[str, str]] = ()) -> None:
        """Keep what a case gave, and write it down."""
        self.records += records
        self.skipped += skipped
        self.save()

    def to_dict(self) -> dict[str, Any]:
        """The run as the JSON file has it."""
        return {
            "machine": machine_facts(self.device, self.rates),
            **self._fixed,
            "complete": self.complete,
            "left_out": self.left_out,
            "skipped": self.skipped,
            "records": self.records,
        }

    def save(self) -> None:
        """Write the file at one stroke, so that an interruption leaves the last whole one.

        Raises:
            OSError: it cannot be written.
        """
        if self.path is None:
            return
        files.write(self.path, json.dumps(self.to_dict(), indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Read a run.

    Raises:
        NotARun: no such file, or not a run.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotARun(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise NotARun(f"{path}: not JSON: {error}") from error
    if not isinstance(run, dict) or not isinstance(run.get("records"), list):
        raise NotARun(f'{path}: expected an object with a list under "records"')
    if not all(isinstance(record, dict) and isinstance(record.get("impl"), str) for record in run["records"]):
        raise NotARun(f'{path}: expected records, objects with an "impl"')
    return run


def identity(record: Record) -> tuple[Any, ...]:
    """What a record is compared by, between runs."""
    return tuple(record.get(name) for name in IDENTITY)


def is_timed(record: Record) -> bool:
    """Whether a record has a time, rather than an error or memory alone."""
    return record.get("median_ms") is not None and not record.get("error")


class Comparison:
    """dla_fast and its peers on one case."""

    def __init__(self, by_impl: dict[str, Record]) -> None:
        self.by_impl = by_impl
        self.mine = by_impl[peers.FUSED]
        self.rivals = {
            impl: record
            for impl, record in by_impl.items()
            if not impl.startswith(peers.FUSED) and impl not in peers.YARDSTICKS
        }

    @property
    def best(self) -> Record:
        """The fastest peer."""
        return min(self.rivals.values(), key=lambda record: record["median_ms"])

    @property
    def speedup(self) -> float:
        """Time of the fastest peer over dla_fast's."""
        return float(self.best["median_ms"] / self.mine["median_ms"])

    def speedup_of(self, impl: str) -> float:
        """Time of the fastest peer over that of another way of dla_fast, which must be there."""
        return float(self.best["median_ms"] / self.by_impl[impl]["median_ms"])

    @property
    def share_of_floor(self) -> float | None:
        """Floor over dla_fast's time: 1 is the machine's limit. None where there is no floor."""
        floor = self.mine.get("floor_ms")
        return float(floor / self.mine["median_ms"]) if floor else None


def comparisons(records: Iterable[Record]) -> list[Comparison]:
    """The cases that have both dla_fast and a peer, worst speedup first."""
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        if is_timed(record):
            groups.setdefault(tuple(record.get(name) for name in _GROUP), {})[record["impl"]] = record
    found = [Comparison(by) for by in groups.values() if peers.FUSED in by]
    return sorted((c for c in found if c.rivals), key=lambda c: c.speedup)


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def side_of(record: Record) -> int | None:
    """Rows of the case's output; also of runs kept in the first form, which had the shape as a list."""
    if "side" in record:
        side: int = record["side"]
        return side
    shape = record.get("shape")
    return int(shape[2]) if isinstance(shape, list) else None
