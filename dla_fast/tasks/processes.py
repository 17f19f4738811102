"""One process, or those that torchrun starts."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dla_fast.tasks.errors import TaskError


@dataclass(frozen=True)
class Processes:
    """Which of how many this is, and its device."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    def bar(self, total: int, what: str, done: int = 0) -> Any:
        """A progress bar; silent where standard error is no terminal, and in all processes but the first."""
        from tqdm import tqdm

        hidden = None if self.is_first else True
        return tqdm(desc=what, total=total, initial=done, disable=hidden, leave=False, file=sys.stderr)

    def through(self, items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        """The items, with such a bar."""
        with self.bar(total, what) as bar:
            for item in items:
                yield item
                bar.update()

    def gather(self, mine: list[Any]) -> list[Any]:
        """What all have, in the order of the processes."""
        if self.count == 1:
            return mine
        all_of_them: list[Any] = [None] * self.count
        distributed.all_gather_object(all_of_them, mine)
        return [item for part in all_of_them for item in part]

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.count > 1:
            value = value.clone()
            distributed.all_reduce(value)
            value /= self.count
        return value

    def any(self, mine: bool) -> bool:
        """Whether it holds in one of them."""
        return bool(self.mean(torch.tensor(float(mine), device=self.device))) if self.count > 1 else mine

    def share_buffers(self, module: nn.Module) -> None:
        """The first's running statistics for all: DistributedDataParallel shares them before a step, not after."""
        if self.count > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)

    def wait(self) -> None:
        """For all to be here."""
        if self.count > 1:
            distributed.barrier()


def device_of(name: str | None) -> torch.device:
    """The device asked for; by default a GPU where there is one.

    Raises:
        TaskError: it is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TaskError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise TaskError(f"--device {name}: expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TaskError("no CUDA device was found")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise TaskError(f"--device {name}: there is no such device, the last is {device.type}:{count - 1}")
    return device


@contextlib.contextmanager
def join(device: str | None) -> Iterator[Processes]:
    """This process alone, or with the others that torchrun started; left again at the end."""
    chosen, count = device_of(device), int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or distributed.is_initialized():
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        yield Processes(rank, distributed.get_world_size() if distributed.is_initialized() else 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(distributed.get_rank(), count, chosen)
    finally:
        distributed.destroy_process_group()
