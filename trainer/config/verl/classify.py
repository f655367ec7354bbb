"""Which rule decides a key: where it moved, its row of the table, its class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from trainer.config.keys import known_keys
from trainer.config.verl.rules import Kind, Rule
from trainer.config.verl.tables import MOVED, RULES


@dataclass(frozen=True, slots=True)
class Place:
    """What is known about a key. key: where the table has it, after moves. rule: its row; None: it lives there.

    kind: its class.
    """

    key: str
    rule: Rule | None
    kind: Kind


@cache
def place_of(key: str) -> Place | None:
    """The place of a key of verl's or of ours; None where it is unknown to both, or a section."""
    known = known_keys()
    if key in known.leaves:
        return Place(key, None, Kind.LIVE)
    moved = moved_key(key)
    for rule in matching_rules(key):
        return Place(moved, rule, rule.kind)
    if moved in known.leaves or known.is_free(moved):
        return Place(moved, None, Kind.LIVE if moved == key else Kind.ALIAS)
    return None


def moved_key(key: str) -> str:
    """Today's name of an older key, or the one under which the table has it."""
    for old, new in MOVED.items():
        if key == old or key.startswith(f"{old}."):
            return moved_key(new + key[len(old) :])
    return key


def matching_rules(key: str) -> list[Rule]:
    """The rows that match a key, after moves; a test holds that there is at most one."""
    moved = moved_key(key)
    rows = [rule for rule in RULES if rule.matches(moved)]
    return [rule for rule in rows if not rule.rest] or rows
