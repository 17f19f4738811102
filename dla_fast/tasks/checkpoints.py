"""Checkpoints of a run: written at one stroke, the last few kept, a damaged one noticed and the one before it taken."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dla_fast.bench import files
from dla_fast.tasks.errors import TaskError

_NAME = re.compile(r"step-(\d{8})\.pth")


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's contents: tensors and plain containers, on the CPU.

    Raises:
        TaskError: it is damaged, or something else.
    """
    try:
        # Every tensor's checksum; torch.load alone does not look at them.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not fit its checksum")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise TaskError(f"{path}: a damaged checkpoint: {str(error).splitlines()[0]}") from error
    return state


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: where they lie; it is made when the first is saved.
        keep: how many of them stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep

    def paths(self) -> list[Path]:
        """The checkpoints that are there, the newest first."""
        return sorted((p for p in self._folder.glob("step-*.pth") if _NAME.fullmatch(p.name)), reverse=True)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write one; those that are too many go when it is there."""
        path = self._folder / f"step-{step:08d}.pth"
        with files.writing(path) as beside:
            torch.save(state, beside)
        for old in self.paths()[self._keep :]:
            old.unlink(missing_ok=True)
        return path

    def newest(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest that is whole; None where there is none at all.

        Args:
            say: is told of each that is damaged.

        Raises:
            TaskError: all of them are damaged.
        """
        paths = self.paths()
        for path in paths:
            try:
                return read(path)
            except TaskError as error:
                say(f"{error}; taking the one before it")
        if paths:
            raise TaskError(f"{self._folder}: all {len(paths)} checkpoints are damaged")
        return None

    def forget_after(self, step: int) -> None:
        """Remove those past a step: what is taken up there writes them again."""
        for path in self.paths():
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) > step:
                path.unlink(missing_ok=True)
        for left in self._folder.glob(".step-*"):
            left.unlink(missing_ok=True)
