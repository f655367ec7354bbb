"""What a check says: a verdict, the reason, and what to type. And what follows for the whole. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARNING, BROKEN = "ok", "warning", "broken"
"""Verdicts, in the order of their weight. Broken: training could not start, or would start wrong."""

PIP, SHELL, MACHINE = "pip", "shell", "machine"
"""Kinds of commands: of this Python environment, of this shell (lost with it), of the machine (needs its owner)."""

_WEIGHT = {OK: 0, WARNING: 1, BROKEN: 2}


@dataclass(frozen=True)
class Command:
    """One line to type. kind: what it changes."""

    kind: str
    text: str


@dataclass(frozen=True)
class Item:
    """One line of the report.

    reason: what was found, and where it is not ok, why that hurts. remedy: what to do, in words, where the commands
    alone do not say it. commands: what to type.
    """

    name: str
    verdict: str
    reason: str
    remedy: str = ""
    commands: tuple[Command, ...] = ()

    def told(self) -> str:
        """The remedy as one line: words, then commands; empty when all is well."""
        typed = "; ".join(command.text for command in self.commands)
        return ": ".join(part for part in (self.remedy, typed) if part)


def ok(name: str, reason: str) -> Item:
    """All is well."""
    return Item(name, OK, reason)


def warning(name: str, reason: str, remedy: str = "", *commands: Command) -> Item:
    """Training starts, and will be slower, larger or stranger than it could be."""
    return Item(name, WARNING, reason, remedy, commands)


def broken(name: str, reason: str, remedy: str = "", *commands: Command) -> Item:
    """Training could not start, or would compute something wrong."""
    return Item(name, BROKEN, reason, remedy, commands)


def pip(*arguments: str) -> Command:
    """A pip command of this environment; arguments that a shell would read otherwise are quoted."""
    return Command(PIP, " ".join(["python -m pip", *map(_quoted, arguments)]))


def unset(*variables: str) -> Command:
    """Forget environment variables."""
    return Command(SHELL, "unset " + " ".join(variables))


def worst(items: Iterable[Item]) -> str:
    """The heaviest verdict; ok for no items."""
    return max((item.verdict for item in items), key=_WEIGHT.__getitem__, default=OK)


def _quoted(argument: str) -> str:
    return f'"{argument}"' if any(c in argument for c in "<>=!*[]() ") else argument
