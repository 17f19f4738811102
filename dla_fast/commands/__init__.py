"""The subcommands of ``python -m dla_fast``: each module has ``add_arguments(parser)`` and ``run(args) -> int``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

__all__ = ["CommandError", "require"]


class CommandError(Exception):
    """What a person at the command line is told in one line, in place of a traceback."""


def require(modules: Mapping[str, str], extra: str) -> None:
    """Check that optional packages are there.

    Args:
        modules: package name on the index, by the module it brings.
        extra: the extra of dla_fast that installs them all.

    Raises:
        CommandError: some are missing, with the command that installs them.
    """
    missing = []
    for module, package in modules.items():
        try:
            if importlib.util.find_spec(module) is None:
                missing.append(package)
        except (ImportError, ValueError):
            missing.append(package)
    if missing:
        raise CommandError(
            f"{', '.join(missing)} not installed: pip install {' '.join(missing)} "
            f'(or install dla_fast with its {extra} extra: pip install --no-build-isolation ".[{extra}]")'
        )
