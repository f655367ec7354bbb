"""The report, as text for people and as one JSON object for programs. docs/diagnose.md describes the object."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from trainer._version import __version__
from trainer.diagnosis.adaptation import Combination
from trainer.diagnosis.checks import can_start
from trainer.diagnosis.fix import TITLES
from trainer.diagnosis.items import BROKEN, OK, WARNING, Item, worst

SCHEMA = 1
WIDTH = 110
_COLOURS = {OK: "\033[32m", WARNING: "\033[33m", BROKEN: "\033[31m"}


@dataclass(frozen=True)
class Report:
    """What a diagnosis found. adaptation, faults: with --check-vllm-compatibility. fixes: kind -> commands, with --fix.

    ran: (pip command, exit status), with --fix --yes.
    """

    device: str
    items: Sequence[Item]
    nearest: Combination | None
    seconds: float
    adaptation: Sequence[tuple[str, str]] = ()
    faults: Sequence[tuple[str, str, str]] = ()
    fixes: dict[str, list[str]] | None = None
    ran: Sequence[tuple[str, int]] = field(default_factory=tuple)

    @property
    def status(self) -> int:
        """Exit status: 0 if training could start, 1 if not."""
        return 0 if can_start(self.items) else 1


def as_json(report: Report) -> dict[str, Any]:
    """The object that --json prints."""
    near = report.nearest
    tree: dict[str, Any] = {
        "schema": SCHEMA,
        "tandem": __version__,
        "device": report.device,
        "verdict": worst(report.items),
        "can_start": can_start(report.items),
        "seconds": round(report.seconds, 3),
        "items": [_item_as_json(item) for item in report.items],
        "nearest": near and {"parts": near.parts, "proven": near.proven, "installed": near.installed},
    }
    if report.adaptation or report.faults:
        tree["adaptation"] = [{"what": what, "how": how} for what, how in report.adaptation]
        tree["faults"] = [{"id": name, "what": what, "remedy": remedy} for name, what, remedy in report.faults]
    if report.fixes is not None:
        tree["fixes"] = report.fixes
        tree["ran"] = [{"command": command, "status": status} for command, status in report.ran]
    return tree


def _item_as_json(item: Item) -> dict[str, Any]:
    return {
        "name": item.name,
        "verdict": item.verdict,
        "reason": item.reason,
        "remedy": item.remedy,
        "commands": [{"kind": command.kind, "text": command.text} for command in item.commands],
    }


def as_text(report: Report, *, colour: bool) -> str:
    """The report for people: one line per item where all is well, the remedy below where it is not."""
    lines = [f"Tandem {__version__}: what stands for and against training on this machine ({report.device})", ""]
    column = max((len(item.name) for item in report.items), default=0)
    for item in report.items:
        lines += _item_lines(item, column, colour=colour)
    lines += _listed("With this vLLM, Tandem uses", [f"{what}: {how}" for what, how in report.adaptation])
    lines += _listed("Known faults of this vLLM", [f"{n}: {what}. {remedy}" for n, what, remedy in report.faults])
    if report.fixes is not None:
        lines += _fix_lines(report.fixes)
    lines += ["", *_nearest_lines(report.nearest), _verdict(report)]
    return "\n".join(lines)


def wants_colour(stream: TextIO) -> bool:
    """Colour on a terminal only, and not where the user says no."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _item_lines(item: Item, column: int, *, colour: bool) -> list[str]:
    """column: width of the names."""
    verdict = f"{item.verdict:<8}"
    shown = f"{_COLOURS[item.verdict]}{verdict}\033[0m" if colour else verdict
    indent = " " * (12 + column)
    body = _wrapped(item.reason, "", "", WIDTH - len(indent)) or [""]
    lines = [f"  {shown} {item.name:<{column}} {body[0]}", *(indent + line for line in body[1:])]
    return lines if item.verdict == OK else lines + _remedy_lines(item, indent)


def _remedy_lines(item: Item, indent: str) -> list[str]:
    """In one line where it fits; else the words, and below them each command as it can be copied."""
    later = indent + "   "
    if len(indent + item.told()) + 3 <= WIDTH or not item.commands:
        return _wrapped("-> " + item.told(), indent, later) if item.told() else []
    words = _wrapped(f"-> {item.remedy}:", indent, later) if item.remedy else []
    typed = [line for command in item.commands for line in _typed(command.text, later)]
    if not words:
        typed[0] = indent + "-> " + typed[0][len(later) :]
    return words + typed


def _typed(command: str, indent: str) -> list[str]:
    """A command over several lines, as a shell takes it."""
    lines = _wrapped(command, indent, indent + "  ", WIDTH - 2)
    return [line + " \\" for line in lines[:-1]] + lines[-1:]


def _wrapped(text: str, first: str, later: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def _listed(title: str, rows: Sequence[str]) -> list[str]:
    return ["", f"{title}:", *(line for row in rows for line in _wrapped(row, "  ", "    "))] if rows else []


def _fix_lines(fixes: dict[str, list[str]]) -> list[str]:
    if not fixes:
        return ["", "Nothing to fix."]
    lines = ["", "To repair it, type:"]
    for kind, commands in fixes.items():
        lines += [f"  {TITLES[kind]}", *(line for command in commands for line in _typed(command, "    "))]
    return lines


def _nearest_lines(near: Combination | None) -> list[str]:
    if near is None:
        return []
    title = "Known to work, and installed: " if near.installed else "Nearest combination known to work: "
    return _wrapped(title + near.told(), "", "  ")


def _verdict(report: Report) -> str:
    counts = {v: sum(item.verdict == v for item in report.items) for v in (BROKEN, WARNING)}
    words = ", ".join(
        f"{count} {word}{'s' * (count > 1 and word == WARNING)}" for word, count in counts.items() if count
    )
    start = "Training can start" if report.status == 0 else "Training cannot start"
    more = "" if report.fixes is not None or not (counts[BROKEN] or counts[WARNING]) else "; --fix prints the commands"
    return f"{start}{': ' + words if words else ''}{more}. ({report.seconds:.1f} s)"
