"""The commands that would repair what was found; and, told so twice, the running of those that are safe.

Safe are pip's of this environment. Nothing of the shell can be run for the user, and nothing of the machine should be.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

from trainer.diagnosis.check_python import END, OLDEST
from trainer.diagnosis.facts import Facts
from trainer.diagnosis.items import MACHINE, OK, PIP, SHELL, Item

TITLES = {PIP: "in this environment", SHELL: "in this shell", MACHINE: "on this machine, by its owner"}
_PLAIN = "python -m pip install "

Runner = Callable[[Sequence[str], str], int]
"""Runs a command in a directory and returns its exit status."""


def commands(items: Iterable[Item]) -> dict[str, list[str]]:
    """Kind -> what to type, each once. Plain installations become one, for pip to find versions that fit together."""
    found: dict[str, list[str]] = {}
    for item in items:
        for command in item.commands if item.verdict != OK else ():
            lines = found.setdefault(command.kind, [])
            if command.text not in lines:
                lines.append(command.text)
    if PIP in found:
        found[PIP] = _together(found[PIP])
    return {kind: found[kind] for kind in TITLES if kind in found}


def _together(lines: list[str]) -> list[str]:
    plain = [line for line in lines if _is_plain(line)]
    if len(plain) < 2:
        return lines
    wanted = list(dict.fromkeys(word for line in plain for word in shlex.split(line)[4:]))
    merged = _PLAIN + " ".join(shlex.quote(word) if set(word) & set("<>=!*[]") else word for word in wanted)
    first = lines.index(plain[0])
    return [*lines[:first], merged, *(line for line in lines[first:] if line not in plain)]


def _is_plain(line: str) -> bool:
    return line.startswith(_PLAIN) and " -" not in line[len(_PLAIN) - 1 :]


def refusal(facts: Facts) -> str:
    """Why pip is not run here; empty if it may be."""
    if facts.managed:
        return "this Python is the system's, and its package manager forbids pip to write; use bash scripts/install.sh"
    if not OLDEST <= facts.python[:2] < END:
        return (
            f"Python {facts.python_version} is not one that Tandem runs on; PYTHON=python3.12 bash scripts/install.sh"
        )
    return ""


def run_pip(lines: Sequence[str], facts: Facts, runner: Runner | None = None) -> list[tuple[str, int]]:
    """Run pip commands with this interpreter, in Tandem's directory, until one fails. Returns (command, status)."""
    ran: list[tuple[str, int]] = []
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "pip"], line
        status = (runner or _run)([sys.executable, *words[1:]], facts.root)
        ran.append((line, status))
        if status:
            break
    return ran


def _run(command: Sequence[str], directory: str) -> int:
    """pip's own output goes to standard error: standard output is for the report."""
    return subprocess.run(command, cwd=directory, stdout=sys.stderr, check=False).returncode
