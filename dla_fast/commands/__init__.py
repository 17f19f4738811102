"""The subcommands of ``python -m dla_fast``: each module has ``add_arguments(parser)`` and ``run(args) -> int``."""

from __future__ import annotations

from collections.abc import Mapping

from dla_fast._extras import missing

__all__ = ["CommandError", "UsageError", "require"]


class CommandError(Exception):
    """What a person at the command line is told in one line, in place of a traceback.

    Attributes:
        status: the exit status.
    """

    status = 1


class UsageError(CommandError):
    """The same of options and files that cannot be meant; nothing was measured."""

    status = 2


def require(modules: Mapping[str, str], extra: str) -> None:
    """Check that optional packages are there.

    Args:
        modules: package name on the index, by the module it brings.
        extra: the extra of dla_fast that installs them all.

    Raises:
        CommandError: some are missing, with the command that installs them.
    """
    absent = missing(modules, extra)
    if absent is not None:
        raise CommandError(absent)
