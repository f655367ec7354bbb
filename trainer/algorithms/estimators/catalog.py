"""The advantage estimators by name: where each function is, and what it needs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trainer.algorithms import custom

if TYPE_CHECKING:
    from trainer.config.schema import AlgorithmConfig

KEY = "algorithm.adv_estimator"
PARAMS_KEY = "algorithm.adv_params"

NEEDS = frozenset({"values", "baseline", "parts", "logprobs", "sum_pi_squared", "groups"})
"""What an estimator may ask for: fields of `AdvantageInput`, and "groups": several responses to each prompt."""

Settings = Mapping[str, Callable[["AlgorithmConfig"], Any]]
"""Arguments of an estimator that are keys of their own in the section `algorithm`, and not in `adv_params`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an estimator's function is, what it needs, and which of its arguments are settings."""

    path: str
    needs: frozenset[str] = frozenset()
    settings: Settings = field(default_factory=dict)


def _returns(name: str, needs: Collection[str] = (), settings: Settings | None = None) -> Entry:
    return Entry(f"trainer.algorithms.estimators.returns:{name}", frozenset(needs), settings or {})


def _group(name: str, needs: Collection[str] = (), settings: Settings | None = None) -> Entry:
    return Entry(f"trainer.algorithms.estimators.group:{name}", frozenset({"groups", *needs}), settings or {})


_GAMMA: Settings = {"gamma": lambda algorithm: algorithm.gamma}
_LAM: Settings = {"lam": lambda algorithm: algorithm.lam}
_STD: Settings = {"norm_by_std": lambda algorithm: algorithm.norm_adv_by_std_in_grpo}


ESTIMATORS: Mapping[str, Entry] = MappingProxyType(
    {
        "gae": _returns("gae", {"values"}, {**_GAMMA, **_LAM}),
        "grpo": _group("grpo", settings=_STD),
        "dr_grpo": _group("dr_grpo"),
        "rloo": _group("rloo"),
        "reinforce_plus_plus": _returns("reinforce_plus_plus", settings=_GAMMA),
        "reinforce_plus_plus_baseline": _group("reinforce_plus_plus_baseline"),
        "remax": _returns("remax", {"baseline"}),
        "opo": _group("opo"),
        "grpo_passk": _group("grpo_passk", settings=_STD),
        "gpg": _group("gpg"),
        "gdpo": _group("gdpo", {"parts"}, _STD),
        "optimal_token_baseline": Entry(
            "trainer.algorithms.estimators.token_baseline:optimal_token_baseline",
            frozenset({"groups", "logprobs", "sum_pi_squared"}),
        ),
        "max_rl": _group("max_rl"),
    }
)


def entry(name: str) -> Entry:
    """The estimator of that name, or one's own by import path.

    One's own says what it needs in an attribute of the function, e.g. `advantage.needs = {"values"}`; without it gets
    rewards, groups, lengths, token rewards and the loss mask. Raises ValueError for an unknown name or a wrong path.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    if not custom.is_path(name):
        raise ValueError(
            f"{KEY}={name!r} is unknown; choose one of {', '.join(sorted(ESTIMATORS))}, or give your own function as "
            f"{custom.FORMS}"
        )
    return Entry(name, _own_needs(name, getattr(custom.load(name, KEY), "needs", ())))


def needs(name: str) -> frozenset[str]:
    """What the estimator of that name needs, out of NEEDS; nothing if there is no such estimator."""
    try:
        return entry(name).needs
    except ValueError:
        return frozenset()  # whoever validates the configuration reports it


def _own_needs(name: str, wanted: Any) -> frozenset[str]:
    if not isinstance(wanted, str | Collection):
        raise ValueError(f"{KEY}={name}: its attribute `needs` is {wanted!r}; give a set of {', '.join(sorted(NEEDS))}")
    found = frozenset([wanted] if isinstance(wanted, str) else wanted)
    if found - NEEDS:
        raise ValueError(
            f"{KEY}={name}: its attribute `needs` names {', '.join(sorted(map(str, found - NEEDS)))}; it may name "
            f"{', '.join(sorted(NEEDS))}"
        )
    return found
