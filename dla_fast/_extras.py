"""Packages that only some commands need, and what to say where they are missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping


def missing(modules: Mapping[str, str], extra: str) -> str | None:
    """One line that says what is not installed and how to get it; None where everything is there.

    Args:
        modules: package name on the index, by the module it brings.
        extra: the extra of dla_fast that installs them all.
    """
    absent = []
    for module, package in modules.items():
        try:
            if importlib.util.find_spec(module) is None:
                absent.append(package)
        except (ImportError, ValueError):
            absent.append(package)
    if not absent:
        return None
    return (
        f"{', '.join(absent)} not installed: pip install {' '.join(absent)} "
        f'(or install dla_fast with its {extra} extra: pip install --no-build-isolation ".[{extra}]")'
    )
