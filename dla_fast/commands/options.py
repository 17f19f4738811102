"""Kinds of values that options take: each is checked while the command line is read, before anything is measured."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from dla_fast.bench import files
from dla_fast.commands import CommandError, UsageError
from dla_fast.tasks.errors import TaskError
from dla_fast.tasks.processes import device_of


def whole(least: int = 1, most: int = 2**20) -> Callable[[str], int]:
    """A whole number within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        if value > most:
            raise argparse.ArgumentTypeError(f"expected at most {most}, got {text}")
        return value

    return parse


def number(*, above: float | None = None, least: float | None = None) -> Callable[[str], float]:
    """A finite number: more than ``above``, or ``least`` or more."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"expected more than {above:g}, got {text}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least:g}, got {text}")
        return value

    return parse


def writable(text: str) -> Path:
    """A file that can be written."""
    path = Path(text)
    reason = files.why_not(path) if text else "it is a folder"
    if reason is not None:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {reason}")
    return path


def check_size(option: str, size: int, *, dense: bool = False) -> None:
    """Whether images of this size can go through every network of dla_fast, or of timm.

    Raises:
        UsageError: they cannot.
    """
    # Classification takes one pixel less as well: its first halving rounds up.
    if size % 32 and (dense or (size + 1) % 32):
        near = max(32, (size + 16) // 32 * 32)
        raise UsageError(
            f"{option} {size}: expected a multiple of 32, the stride of the last level; the nearest is {near}"
        )


def check_device(name: str) -> torch.device:
    """The CPU or a GPU that is there.

    Raises:
        UsageError: another device.
        CommandError: there is no GPU.
    """
    try:
        return device_of(name)
    except TaskError as error:
        raise reported(error) from error


def reported(error: TaskError) -> CommandError:
    """What went wrong, as the command line says it: an option's fault is one of usage."""
    return (UsageError if str(error).startswith("--") else CommandError)(str(error))
