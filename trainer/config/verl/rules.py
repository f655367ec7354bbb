"""The form of a rule about keys that are not ours, and what comes of applying one.

A rule names its keys by a pattern: a dotted key in which `{a,b}` are alternatives, `*` is any one name, `.**` at the
end is the key itself and everything below it, and `**.` at the start is any section.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any

from trainer.config.errors import show


class Kind(StrEnum):
    """The four classes of verl's keys."""

    LIVE = "lives here"
    ALIAS = "alias"
    IGNORED = "without effect"
    REFUSED = "refused"


Look = Callable[[str], Any]
"""The value that today's key has in the composed configuration; None where it has none."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a value of a key comes to.

    sets: today's keys and their values (ALIAS; also LIVE, where the value was changed). why: the reason, or the remark
    on an alias. remedy: what to do instead (REFUSED). forced: it also overrides what the command line says.
    """

    kind: Kind
    why: str = ""
    sets: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""
    forced: bool = False


Decide = Callable[[str, Any, Look], Verdict]
"""key as written, its value, and a look at the other keys."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table. kind: the class of its keys.

    why: the reason that is told. new: where an alias went. values: values that are called otherwise at `new`.
    remedy: for a refused key. harmless: values of a refused key that ask for nothing, besides null, false, 0 and empty.
    decide: for what takes other keys to know; it runs once everything is composed. rest: only for keys that no other
    row matches.
    """

    pattern: str
    kind: Kind
    why: str = ""
    new: str = ""
    values: Mapping[Any, Any] = field(default_factory=dict)
    remedy: str = ""
    harmless: tuple[Any, ...] = ()
    decide: Decide | None = None
    rest: bool = False

    def matches(self, key: str) -> bool:
        """Whether the pattern is one of this key."""
        return _compiled(self.pattern).match(key) is not None

    @property
    def minds_value(self) -> bool:
        """Whether the verdict depends on the value, so that an interpolation must be resolved first."""
        return self.kind is Kind.REFUSED or bool(self.values) or self.decide is not None

    def apply(self, key: str, value: Any) -> Verdict:
        """The verdict about a value of a key that this rule matches, without looking at other keys."""
        if self.kind is Kind.IGNORED:
            return Verdict(Kind.IGNORED, self.why)
        if self.kind is Kind.REFUSED:
            if not value or plain(value) in self.harmless:
                return Verdict(Kind.IGNORED, NOTHING)
            return Verdict(Kind.REFUSED, self.why, remedy=self.remedy)
        if value is None:
            return Verdict(Kind.IGNORED, NOTHING)
        return Verdict(Kind.ALIAS, self.why, {self.target(key): self.values.get(plain(value), value)})

    def target(self, key: str) -> str:
        """Where an alias went; `{section}` in `new` stands for what matched the braces that the pattern begins with."""
        return self.new.replace("{section}", section_of(self, key))


NOTHING = "these values ask for nothing"


def alias(pattern: str, new: str, why: str = "", values: Mapping[Any, Any] | None = None) -> Rule:
    """A key that is called otherwise here."""
    return Rule(pattern, Kind.ALIAS, why, new, values or {})


def ignored(why: str, *patterns: str) -> list[Rule]:
    """Keys without effect, for one reason."""
    return [Rule(pattern, Kind.IGNORED, why) for pattern in patterns]


def refused(pattern: str, why: str, remedy: str, *harmless: Any, rest: bool = False) -> Rule:
    """A key that asks for what is not here."""
    return Rule(pattern, Kind.REFUSED, why, remedy=remedy, harmless=harmless, rest=rest)


def decided(pattern: str, kind: Kind, decide: Decide, why: str, new: str = "") -> Rule:
    """A key whose meaning here depends on other keys. kind, why, new: of the usual case, for the docs."""
    return Rule(pattern, kind, why, new, decide=decide)


def plain(value: Any) -> Any:
    """The value as it can be looked up in a table: a list as a tuple, a number that equals a truth value as text."""
    if isinstance(value, list):
        return tuple(value)
    return show(value) if isinstance(value, (bool, dict)) else value


def section_of(rule: Rule, key: str) -> str:
    """What matched the braces that the rule's pattern begins with."""
    match = _compiled(rule.pattern).match(key)
    assert match is not None, key
    return match.groupdict().get("section") or ""


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(as_regex(pattern))


def as_regex(pattern: str) -> str:
    """The regular expression of a pattern."""
    above, below = pattern.startswith("**."), pattern.endswith(".**")
    text = re.escape(pattern.removeprefix("**.").removesuffix(".**"))
    if text.startswith(r"\{"):
        text = f"(?P<section>{text.removeprefix(chr(92) + '{')}"
    text = text.replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|").replace(r"\*", r"[^.]+")
    return f"^{'(?:.+[.])?' if above else ''}{text}{'(?:[.].+)?' if below else ''}$"
