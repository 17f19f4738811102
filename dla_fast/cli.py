"""The command line: ``python -m dla_fast doctor | verify | demo | bench | tune | train | evaluate | predict``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from dla_fast import _starting
from dla_fast._version import __version__
from dla_fast.commands import CommandError

COMMANDS = {
    "doctor": "what is installed and built here, and which backend serves which op",
    "verify": "check every op on this machine against PyTorch",
    "demo": "swap a timm DLA to fused nodes on real photographs and compare",
    "bench": "time the ops against PyTorch",
    "tune": "measure tile configurations of the Triton kernels on this GPU and write them to a table",
    "train": "train a DLA network on one of the paper's four tasks",
    "evaluate": "judge a trained network",
    "predict": "what a trained network sees in images",
}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults beside each option, but for those that its own text explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """A value that an option does not take is one line; what else is wrong comes with the usage."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument ") and not message.startswith("argument command"):
            self.exit(2, f"{self.prog}: {message}\n")
        super().error(message)


def _module(command: str) -> ModuleType:
    """A command's module, imported only when it is asked for: the others may need extras that are not installed."""
    return importlib.import_module(f"dla_fast.commands.{command}")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of ``command`` alone filled in."""
    parser = _Parser(prog="dla_fast", description="Fused kernels for Deep Layer Aggregation networks in PyTorch.")
    parser.add_argument("--version", action="version", version=f"dla_fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary, formatter_class=_Formatter)
        if name == command:
            _module(name).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    _starting.started()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        args = _parser(command).parse_args(arguments)
        status: int = _module(args.command).run(args)
        sys.stdout.flush()
        return status
    except CommandError as error:
        print(f"dla_fast {command}: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("\n" + " ".join(filter(None, ["dla_fast", command])) + ": interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone, as in `dla_fast doctor | head`; the interpreter must not flush into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
