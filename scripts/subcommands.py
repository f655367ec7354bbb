"""Programs of several subcommands: each is a module with a `COMMAND`, and the program a list of them."""

from __future__ import annotations

import argparse
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand. run: returns the exit status."""

    name: str
    help: str
    add_options: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, Console], int]


def run_one(
    commands: Sequence[Command],
    arguments: Sequence[str] | None,
    *,
    description: str | None,
    error: type[Exception],
    status: int,
) -> int:
    """Runs the subcommand that a command line names; returns its exit status.

    error: what is one message on standard error instead of a traceback; the exit status is then `status`.
    """
    parser = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True, metavar="|".join(command.name for command in commands))
    for command in commands:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_options(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options, Console(highlight=False)))
    except error as problem:
        print(f"error: {problem}", file=sys.stderr)
        return status
