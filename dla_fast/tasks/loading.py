"""Images in batches: which, in what order, drawn how. All of it follows from a seed, an epoch and a place in it.

What a sample draws depends on nothing else, so that a training that goes on in the middle of an epoch, with another
number of worker processes, sees what it would have seen.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dla_fast.tasks.errors import DataError

_SHOWN = 5


class Key(NamedTuple):
    """A sample by its place, and the seed of what is drawn for it."""

    place: int
    seed: int


class Loaded(NamedTuple):
    """A batch, and what could not be read: a line each."""

    items: Any
    failures: list[str]


def open_image(path: os.PathLike[str] | str) -> Image.Image:
    """An image in RGB.

    Raises:
        DataError: it is missing, or broken.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    # Decoders raise whatever they like on broken files.
    except Exception as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else f"no readable image: {error}"
        raise DataError(f"{os.fspath(path)}: {' '.join(why.split())}") from error


def seeded(*parts: int) -> int:
    """A seed made of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Samples(Dataset[tuple[Any, list[str]]]):
    """Samples by key; a failure is an answer, since an exception from a worker process loses its message.

    Args:
        count: how many there are.
        load: gives a sample by its index, and raises DataError.
        replace: the next that can be read stands in for one that cannot, so that a batch stays whole.
    """

    def __init__(self, count: int, load: Callable[[int], Any], *, replace: bool = False) -> None:
        self._count, self._load, self._replace = count, load, replace

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: Key) -> tuple[Any, list[str]]:
        failures: list[str] = []
        for ahead in range(self._count if self._replace else 1):
            random.seed(key.seed)
            np.random.seed(key.seed)
            torch.manual_seed(key.seed)
            try:
                return self._load((key.place + ahead) % self._count), failures
            except DataError as error:
                failures.append(str(error))
        return None, failures


class Batches(Sampler[list[Key]]):
    """The keys of an epoch's batches, for one process of several.

    Args:
        count: samples.
        batch: samples in a batch.
        rank: of this process.
        processes: how many there are.
        seed: of the order; None keeps it, and then the last batch may be short and no sample is seen twice.
    """

    def __init__(self, count: int, batch: int, *, rank: int = 0, processes: int = 1, seed: int | None = None) -> None:
        self._count, self._batch, self._rank, self._processes, self._seed = count, batch, rank, processes, seed
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        if self._seed is None:
            return -(-len(range(self._rank, self._count, self._processes)) // self._batch)
        return self._count // (self._batch * self._processes)

    def __iter__(self) -> Iterator[list[Key]]:
        if self._seed is None:
            mine = [Key(i, seeded(i)) for i in range(self._rank, self._count, self._processes)]
            yield from (mine[i : i + self._batch] for i in range(0, len(mine), self._batch))
            return
        order = np.random.default_rng([self._seed, self.epoch]).permutation(self._count)
        for step in range(self.first, len(self)):
            start = (step * self._processes + self._rank) * self._batch
            yield [Key(int(i), seeded(self._seed, self.epoch, int(i))) for i in order[start : start + self._batch]]


def _stacked(samples: list[tuple[Any, list[str]]]) -> Loaded:
    loaded = _listed(samples)
    return Loaded(default_collate(loaded.items) if loaded.items else None, loaded.failures)


def _listed(samples: list[tuple[Any, list[str]]]) -> Loaded:
    return Loaded(
        [item for item, _ in samples if item is not None], [line for _, failures in samples for line in failures]
    )


def ignore_interrupts(*_: Any) -> None:
    """Start a worker process: an interrupt is the main process's to handle, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def workers_of(asked: int | None) -> int:
    """Worker processes: those asked for, or half the cores."""
    return min(8, max(1, len(os.sched_getaffinity(0)) // 2)) if asked is None else asked


def loader(samples: Samples, batches: Batches, *, workers: int, pin: bool = False, stack: bool) -> DataLoader[Loaded]:
    """Batches of samples, as tensors stacked or as a list of samples."""
    dataset: Any = samples
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_stacked if stack else _listed,
        worker_init_fn=ignore_interrupts,
        pin_memory=pin and stack,
    )


def warn(line: str) -> None:
    """Say something of a run that is no result."""
    print(line, file=sys.stderr)


class Failures:
    """What could not be read: an error, or named once each.

    Args:
        skip: they are skipped.
        say: where a line goes; standard error.
    """

    def __init__(self, *, skip: bool, say: Callable[[str], None] = warn) -> None:
        self._skip, self._say, self._known = skip, say, set[str]()

    def see(self, failures: list[str]) -> None:
        """Take note of some.

        Raises:
            DataError: the first, where they are errors.
        """
        for line in failures:
            if not self._skip:
                raise DataError(f"{line} (--broken skip goes on without it)")
            if line not in self._known:
                self._known.add(line)
                self._say(f"skipped: {line}")

    def __len__(self) -> int:
        return len(self._known)
