"""Shows the tables to people:  python -m trainer.config.verl.document  rewrites its part of docs/verl.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.config.errors import show
from trainer.config.keys import known_keys
from trainer.config.verl.rules import Kind
from trainer.config.verl.tables import MOVED, RULES
from trainer.config.verl.values import VALUES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "verl.md"
BEGIN, END = "<!-- generated from trainer/config/verl -->\n", "<!-- end of what is generated -->\n"


def tables() -> str:
    """The four classes in Markdown."""
    lines = [
        *_section("Lives here, with values of another name", ("key", "verl's value", "here"), _values()),
        *_section("Alias", ("verl's key", "here", "remark"), _aliases()),
        *_section("Accepted without effect", ("why", "keys"), _ignored()),
        *_section("Refused", ("verl's key", "why", "what to do", "accepted all the same"), _refused()),
    ]
    return "\n".join(lines) + "\n"


def with_tables(page: str) -> str:
    """The page with its generated part made anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


def _section(title: str, columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    head = [f"## {title}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [*head, *(f"| {' | '.join(cell.replace('|', ' or ') for cell in row)} |" for row in rows), ""]


def _values() -> Iterator[tuple[str, ...]]:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for key, values in VALUES.items():
        for old, value in values.items():
            rows.setdefault((show(old), show(value.new), value.why), []).append(_code(key))
    for (old, new, why), keys in rows.items():
        yield ", ".join(keys), _code(old), _code(new) + (f": {why}" if why else "")


def _aliases() -> Iterator[tuple[str, ...]]:
    for old, new in MOVED.items():
        known = known_keys()
        further = "" if new in known.leaves | known.sections else "and then as the tables say of that"
        yield _code(old), _code(new), further
    for rule in RULES:
        if rule.kind is Kind.ALIAS:
            is_key = "." in rule.new and " " not in rule.new
            values = ", ".join(f"{show(old)} is {show(new)}" for old, new in rule.values.items())
            remarks = "; ".join(filter(None, (rule.why, values)))
            yield _keys(rule.pattern), _code(rule.new) if is_key else rule.new, remarks


def _ignored() -> Iterator[tuple[str, ...]]:
    reasons: dict[str, list[str]] = {}
    for rule in RULES:
        if rule.kind is Kind.IGNORED:
            reasons.setdefault(rule.why, []).append(_keys(rule.pattern))
    for why, keys in reasons.items():
        yield why, ", ".join(keys)


def _refused() -> Iterator[tuple[str, ...]]:
    for rule in RULES:
        if rule.kind is Kind.REFUSED:
            yield _keys(rule.pattern), rule.why, rule.remedy, ", ".join(_code(show(value)) for value in rule.harmless)


def _keys(pattern: str) -> str:
    return _code(pattern.replace(",", ", "))


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
