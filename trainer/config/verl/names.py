"""The names that the table gives, one by one: what a mistyped key of verl's was meant to be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache

from trainer.config.verl.rules import Kind
from trainer.config.verl.tables import MOVED, RULES

_CHOICE = re.compile(r"\{([^{}]*)\}")
_TYPO = 0.96
"""Likeness of a name with a letter or two wrong. Less like it, a key that does nothing here is no advice."""


@cache
def verl_names() -> Mapping[str, float]:
    """Keys of the table and the older names of keys, each with the likeness from which it is worth telling; none of
    patterns that take any name."""
    rules = [rule for rule in RULES if "*" not in rule.pattern]
    of_table = {name: 0.0 if rule.kind is Kind.ALIAS else _TYPO for rule in rules for name in _each(rule.pattern)}
    return dict.fromkeys(MOVED, 0.0) | of_table


def _each(pattern: str) -> Iterator[str]:
    found = _CHOICE.search(pattern)
    if found is None:
        yield pattern
        return
    for part in found.group(1).split(","):
        yield from _each(pattern[: found.start()] + part + pattern[found.end() :])
