"""The names that the table gives, one by one: what a mistyped key of verl's was meant to be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from trainer.config.verl.tables import MOVED, RULES

_CHOICE = re.compile(r"\{([^{}]*)\}")


@cache
def verl_names() -> frozenset[str]:
    """Keys of the table and the older names of keys; none of patterns that take any name."""
    patterns = [rule.pattern for rule in RULES if "*" not in rule.pattern]
    return frozenset([*MOVED, *(name for pattern in patterns for name in _each(pattern))])


def _each(pattern: str) -> Iterator[str]:
    found = _CHOICE.search(pattern)
    if found is None:
        yield pattern
        return
    for part in found.group(1).split(","):
        yield from _each(pattern[: found.start()] + part + pattern[found.end() :])
