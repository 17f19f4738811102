"""Options of the paper's tasks on the command line, from the classes that declare them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dla_fast import tasks
from dla_fast.commands import require
from dla_fast.commands.options import number, whole
from dla_fast.tasks import options


def add_tasks(parser: argparse.ArgumentParser, add: Callable[[argparse.ArgumentParser, Any], None]) -> None:
    """A subcommand for each task, with what ``add`` gives it."""
    require(tasks.EXTRAS, "tasks")
    subparsers = parser.add_subparsers(dest="task", metavar="task", required=True)
    for name in tasks.NAMES:
        task = tasks.get(name)
        doc = str(type(task).__doc__).splitlines()[0]
        sub = subparsers.add_parser(name, help=doc, description=doc, formatter_class=argparse.HelpFormatter)
        add(sub, task)


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Every option of a class; what is not given is None, and gets its value later."""
    for each in options.of(kind):
        default = each.default
        text = each.help.replace("%", "%%")
        if "(default" not in text and default not in (None, "") and each.name != "data":
            shown = " ".join(map(str, default)) if each.many else default
            text += f" (default: {shown})"
        flag = f"--{each.name.replace('_', '-')}"
        if each.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(
                flag,
                type=_parser(each),
                choices=each.choices,
                nargs="+" if each.many else None,
                metavar=None if each.choices else {int: "N", float: "X", str: "TEXT"}[each.kind],
                help=text,
            )


def _parser(each: options.Option) -> Callable[[str], Any]:
    if each.kind is int:
        return whole(least=int(each.least or 0), most=2**31)
    if each.kind is float:
        return number(least=each.least, above=each.above)
    return str


def given(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """The options that were given."""
    return {each.name: getattr(args, each.name) for each in options.of(kind)}
