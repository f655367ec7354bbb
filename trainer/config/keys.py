"""Which keys exist, and which existing key a mistyped one is nearest to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from types import MappingProxyType
from typing import get_origin

from pydantic import BaseModel

from trainer.config.schema import Config

_LIST_ALL = "`python -m trainer.main --cfg job` lists every key"
_USUALLY_MEANT = (
    "path",
    "train_files",
    "n",
    "loss_mode",
    "adv_estimator",
    "enable",
    "model.path",
    "custom_reward_function.path",
    "name",
    "type",
    "strategy",
    "lr",
    "address",
)
"""The key of a section that its name alone is most likely to stand for, e.g. `actor_rollout_ref.model=org/model`."""


_FOREIGN = 0.06
"""By so much another name has to be nearer than one of ours."""


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """All keys of the configuration, in full dotted form.

    leaves: keys with a value, e.g. `data.seed`; sections: keys with keys below, e.g. `data`;
    free_form: the leaves that are dictionaries of the user's own, below which anything goes.
    """

    leaves: frozenset[str]
    sections: frozenset[str]
    free_form: frozenset[str]

    def is_free(self, key: str) -> bool:
        """Whether `key` lies below a free-form dictionary."""
        return any(key.startswith(f"{parent}.") for parent in self.free_form)

    def nearest(self, key: str, *, limit: int = 3, also: Mapping[str, float] = MappingProxyType({})) -> tuple[str, ...]:
        """Return the existing keys that `key` probably meant, best first; none where nothing is close.

        also: other names that are understood, each with the least likeness.
        """
        ours = [(_likeness(key, known), known) for known in self.leaves | self.sections]
        others = [(_likeness(key, name), name) for name in also.keys() - self.leaves - self.sections]
        worth = [(likeness - _FOREIGN, name) for likeness, name in others if likeness >= also[name]]
        scored = sorted([*ours, *worth], reverse=True)
        best = scored[0][0]
        return tuple(known for score, known in scored[:limit] if score >= max(0.7, best - 0.05))


@cache
def known_keys() -> KnownKeys:
    """Return the keys of `Config`."""
    leaves: set[str] = set()
    sections: set[str] = set()
    free_form: set[str] = set()
    _collect(Config, "", leaves, sections, free_form)
    return KnownKeys(frozenset(leaves), frozenset(sections), frozenset(free_form))


def unknown_key(key: str, value: str, known: KnownKeys, also: Mapping[str, float]) -> str:
    """Word the complaint about a key that does not exist. also: as in `nearest`."""
    above = next((leaf for leaf in known.leaves if key.startswith(f"{leaf}.")), None)
    if above is not None:
        return f"{key}={value}: {above} is a value, not a section; set {above}=..."
    nearest = known.nearest(key, also=also)
    remedy = f"did you mean {' or '.join(nearest)}?" if nearest else _LIST_ALL
    return f"{key}={value}: unknown key; {remedy}"


def replaced_section(key: str, value: str, known: KnownKeys) -> str:
    """Word the complaint about a section that was given a value."""
    below = sorted(name for name in known.leaves | known.sections if name.startswith(f"{key}."))
    meant = next((f"{key}.{name}" for name in _USUALLY_MEANT if f"{key}.{name}" in known.leaves), None)
    given = value not in ("", "null") and not value.startswith(("[", "{"))
    remedy = f"{meant}={value}" if meant and given else meant or below[0]
    return f"{key}={value}: {key} is a section, not a value; set a key below it, such as {remedy}"


def _collect(model: type[BaseModel], prefix: str, leaves: set[str], sections: set[str], free_form: set[str]) -> None:
    for name, field in model.model_fields.items():
        key, kind = f"{prefix}{name}", field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            sections.add(key)
            _collect(kind, f"{key}.", leaves, sections, free_form)
            continue
        leaves.add(key)
        if get_origin(kind) is dict:
            free_form.add(key)


def _likeness(key: str, known: str) -> float:
    """Score in 0..1: 1 for a key written without its first sections, else by the last name and the whole key."""
    if known.endswith(f".{key}"):
        return 1.0
    last, known_last = key.rpartition(".")[2], known.rpartition(".")[2]
    if len(last) > 3 and known_last.startswith(f"{last}_") and key.rpartition(".")[0] == known.rpartition(".")[0]:
        return 0.9
    return (_ratio(last, known_last) + max(_ratio(key, known), _ratio(key, _tail(known, key)))) / 2


def _tail(known: str, key: str) -> str:
    """The end of `known` with as many components as `key` has."""
    return ".".join(known.split(".")[-len(key.split(".")) :])


def _ratio(left: str, right: str) -> float:
    return SequenceMatcher(None, left, right, autojunk=False).ratio()
