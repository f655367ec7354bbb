"""Applies the table: to one setting of a command line, and to a composed tree."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.keys import known_keys
from trainer.config.verl.classify import Place, moved_key, place_of
from trainer.config.verl.report import Report
from trainer.config.verl.rules import NOTHING, Kind, Verdict, plain
from trainer.config.verl.tables import RULES
from trainer.config.verl.values import DECISIONS, VALUES

Tree = dict[str, Any]


def verdict_now(key: str, value: Any) -> Verdict | None:
    """What a setting of the command line comes to.

    None: only the composed configuration can tell (other keys count, or the value is an interpolation), or it is no
    key of verl's.
    """
    place = place_of(key)
    if place is None:
        return None
    if place.rule is not None:
        waits = place.rule.decide is not None or (place.rule.minds_value and _interpolated(value))
        return None if waits else place.rule.apply(place.key, value)
    return _renamed_value(place, key, value)


def waits(key: str, value: Any) -> bool:
    """Whether a setting must be decided once everything is composed."""
    place = place_of(key)
    if place is None or place.rule is None:
        return False
    return verdict_now(key, value) is None


def translate_nested(tree: Tree, *, keep: Collection[str] = ()) -> Report:
    """Replace what is verl's in a nested dictionary by what it is here, in place; says what was done.

    keep: today's keys that were set on the command line, over which an older name in the YAML has no power.
    """
    return _Walk(tree, frozenset(keep)).run()


def _renamed_value(place: Place, key: str, value: Any) -> Verdict:
    if place.kind is Kind.ALIAS and value in (None, {}):
        return Verdict(Kind.IGNORED, NOTHING)
    known = VALUES.get(place.key, {}).get(plain(value))
    if known is not None:
        return Verdict(place.kind, known.why, {place.key: known.new})
    return Verdict(place.kind, "", {place.key: value} if place.key != key else {})


def _interpolated(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


@dataclass
class _Walk:
    """One pass over a tree: first what each key decides alone, then what takes other keys to decide."""

    tree: Tree
    keep: frozenset[str]
    report: Report = field(default_factory=Report)
    given: DictConfig = field(init=False)
    now: DictConfig | None = field(init=False, default=None)

    def run(self) -> Report:
        self.given = OmegaConf.create(self.tree)
        found = []
        for key in _foreign(self.tree):
            place = place_of(key)
            if place is not None:
                found.append((key, place))
            elif moved_key(key) != key:  # unknown under today's name
                _move(self.tree, key, moved_key(key))
        later = [(key, place) for key, place in found if _decides(place) is not None]
        for key, place in found:
            if _decides(place) is None:
                self._alone(key, place)
        for key, place in sorted(later, key=_order):
            self._together(key, place)
        return self.report

    def _alone(self, key: str, place: Place) -> None:
        value = self._value(key)
        resolved = self._resolved(key) if _interpolated(value) else value
        if place.rule is None and _interpolated(value):
            verdict = _renamed_value(place, key, resolved)
            if plain(resolved) not in VALUES.get(place.key, {}):
                verdict = Verdict(place.kind, "", {place.key: value} if place.key != key else {})
        elif place.rule is not None and not place.rule.minds_value:
            verdict = place.rule.apply(place.key, value)
        else:
            verdict = place.rule.apply(place.key, resolved) if place.rule else _renamed_value(place, key, value)
        self._settle(key, value, verdict)

    def _together(self, key: str, place: Place) -> None:
        decide = _decides(place)
        assert decide is not None
        self._settle(key, self._value(key), decide(place.key, self._resolved(key), self._look))

    def _settle(self, key: str, value: Any, verdict: Verdict) -> None:
        if key not in verdict.sets and verdict.kind is not Kind.LIVE:
            remove(self.tree, key)
        if verdict.sets:
            self.now = None
        for new, changed in verdict.sets.items():
            if verdict.forced or verdict.kind is Kind.LIVE or new not in self.keep:
                assign(self.tree, new, changed)
        self.report.add(key, value, verdict)

    def _value(self, key: str) -> Any:
        node: Any = self.tree
        for name in key.split("."):
            node = node[name]
        return node

    def _resolved(self, key: str) -> Any:
        """The value with interpolations followed; as it stands where they lead nowhere."""
        try:
            value = OmegaConf.select(self.given, key)
        except OmegaConfBaseException:
            return self._value(key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    def _look(self, key: str) -> Any:
        if self.now is None:
            self.now = OmegaConf.create(self.tree)
        try:
            return OmegaConf.select(self.now, key)
        except OmegaConfBaseException:
            return None


def _decides(place: Place) -> Any:
    return DECISIONS.get(place.key) if place.rule is None else place.rule.decide


def _order(item: tuple[str, Place]) -> int:
    """Rows are applied from top to bottom of the table."""
    rule = item[1].rule
    return -1 if rule is None else RULES.index(rule)


def _foreign(tree: Tree) -> list[str]:
    """Keys of the tree that the tables have something to say about."""
    known = known_keys()
    found: list[str] = []
    for key in _leaves(tree, ""):
        place = place_of(key)
        plain_live = place is not None and place.rule is None and place.key == key
        if not plain_live or key in VALUES or key in DECISIONS:
            found.append(key)
    return [key for key in found if key not in known.sections]


def _leaves(tree: Tree, prefix: str) -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def assign(tree: Tree, key: str, value: Any) -> None:
    """Set a key of a nested dictionary, making the sections that it lacks."""
    *parents, name = key.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            return  # a section overwritten by a value; the schema check names it
        tree = below
    tree[name] = value


def _move(tree: Tree, key: str, new: str) -> None:
    node: Any = tree
    for name in key.split("."):
        node = node[name]
    remove(tree, key)
    assign(tree, new, node)


def remove(tree: Tree, key: str) -> None:
    """Take a key out, and with it the sections that are not ours and have nothing left."""
    section, _, name = key.rpartition(".")
    node: Any = tree
    for parent in filter(None, section.split(".")):
        node = node[parent]
    del node[name]
    known = known_keys()
    if section and not node and section not in known.sections | known.free_form:
        remove(tree, section)
