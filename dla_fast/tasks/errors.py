"""What is wrong with data or a run, said in a line."""

from __future__ import annotations


class TaskError(Exception):
    """What a person is told in place of a traceback."""


class DataError(TaskError):
    """Of a folder, an image or an annotation: its path, what it was, what was expected."""
