"""Files that commands write: whether they can be, asked before anything is measured, and written at one stroke."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def why_not(path: Path) -> str | None:
    """Why a file cannot be written there, in a few words; None where it can. Nothing is left behind.

    Only what is not there yet or is an ordinary file is written: another is replaced when it is written, and a device
    or a pipe is not to be.
    """
    try:
        if path.is_dir():
            return "it is a folder"
        if path.exists():
            if not path.is_file():
                return "it is no ordinary file, and no other is written"
            if any(_is_open_as(path, number) for number in (1, 2)):
                return "what is printed goes there"
            if not os.access(path, os.W_OK):
                return "it may not be written"
        folder = path.resolve().parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            return f"{folder} is no folder"
        with tempfile.TemporaryFile(dir=folder):
            pass
        if len(os.fsencode(path.name)) > 200:
            return "its name is too long"
    except (OSError, ValueError) as error:
        return (getattr(error, "strerror", None) or str(error)).lower()
    return None


def _is_open_as(path: Path, number: int) -> bool:
    """Whether a file is the one that standard output or error goes to, as /dev/stdout is."""
    try:
        return os.path.samestat(path.stat(), os.fstat(number))
    except OSError:
        return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file beside the one that is meant, which takes its place at the end, at one stroke.

    An interruption leaves the last whole one. The folder is made if need be.

    Raises:
        OSError: it cannot be written.
    """
    # What a link points at is replaced, not the link.
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise FileExistsError(17, "it is no ordinary file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write(path: Path, content: str | bytes) -> None:
    """Write a file at one stroke, see :func:`writing`."""
    with writing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
