"""What is told about verl's keys: one line per reason, however many keys it holds for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.config.errors import show
from trainer.config.verl.rules import Kind, Verdict

MOST = 12
"""Keys that a line names where there are more than 20, as in a whole tree of verl's."""


@dataclass
class Report:
    """Collects verdicts. problems: lines of an error, `key=value: what is wrong; what to do`."""

    renamed: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any, verdict: Verdict) -> None:
        """Note what became of `key=value`."""
        if verdict.kind is Kind.REFUSED:
            self.problems.append(f"{key}={show(value)}: {verdict.why}; {verdict.remedy}")
        elif verdict.kind is Kind.IGNORED:
            self.ignored.setdefault(verdict.why, []).append(key)
        elif verdict.sets:
            self.renamed.setdefault(verdict.why, []).append(_translation(key, value, verdict))

    def notices(self) -> list[str]:
        """The lines for people."""
        lines = []
        for why, changes in self.renamed.items():
            remark = f" ({why})" if why else ""
            lines.append(f"translated from verl: {', '.join(changes)}{remark}")
        lines += [f"without effect, {why}: {', '.join(folded(keys))}" for why, keys in self.ignored.items()]
        return lines


def folded(keys: list[str]) -> list[str]:
    """Keys of one section as `section.{a, b}`."""
    shown = keys if len(keys) <= 20 else keys[:MOST]
    sections: dict[str, list[str]] = {}
    for key in shown:
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(name)
    lines = [
        f"{section}.{{{', '.join(names)}}}" if len(names) > 1 else f"{section}.{names[0]}".lstrip(".")
        for section, names in sections.items()
    ]
    return lines if shown is keys else [*lines, f"and {len(keys) - MOST} more"]


def _translation(key: str, value: Any, verdict: Verdict) -> str:
    """`old -> new`, with values where they changed."""
    if list(verdict.sets) == [key]:
        return f"{key}={show(value)} -> {show(verdict.sets[key])}"
    if list(verdict.sets.values()) == [value]:
        return f"{key} -> {next(iter(verdict.sets))}"
    new = ", ".join(f"{name}={show(changed)}" for name, changed in verdict.sets.items())
    return f"{key}={show(value)} -> {new}"
