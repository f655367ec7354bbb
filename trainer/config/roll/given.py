"""Overrides of our own beside a file of ROLL's: they win, and what is computed from ROLL's keys is computed from them.

`data.train_batch_size=32` says what `roll.rollout_batch_size=32` says, so the mini-batch made from it must follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from trainer.config.devices import parse_device_mapping
from trainer.config.errors import UserError
from trainer.config.keys import known_keys
from trainer.config.overrides import prepare_overrides
from trainer.config.roll.kinds import fits

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
SAME: Mapping[str, str] = {
    "data.train_batch_size": "rollout_batch_size",
    "data.max_prompt_length": "prompt_length",
    "data.max_response_length": "response_length",
    f"{_ROLLOUT}.n": "num_return_sequences_in_group",
    f"{_ROLLOUT}.device_mapping": "actor_infer.device_mapping",
    f"{_ACTOR}.device_mapping": "actor_train.device_mapping",
    "actor_rollout_ref.ref.device_mapping": "reference.device_mapping",
    "critic.device_mapping": "critic.device_mapping",
    "trainer.n_gpus_per_node": "num_gpus_per_node",
    f"{_ACTOR}.optim.lr": "actor_train.training_args.learning_rate",
    "critic.optim.lr": "critic.training_args.learning_rate",
    f"{_ACTOR}.clip_ratio": "pg_clip",
    f"{_ACTOR}.use_kl_loss": "use_kl_loss",
    "algorithm.use_kl_in_reward": "add_token_level_kl",
    "algorithm.gamma": "gamma",
    "algorithm.lam": "lambd",
}
"""Our key -> ROLL's of the same meaning, from which other keys of ours are computed."""


def given_keys(overrides: Sequence[str]) -> dict[str, Any]:
    """Our keys that a command line sets, with their values; spellings of verl's under our names.

    Raises UserError for overrides that `prepare_overrides` refuses.
    """
    parser, found = OverridesParser.create(), dict[str, Any]()
    for override in prepare_overrides(overrides)[0]:
        parsed = parser.parse_override(override)
        if not parsed.is_delete() and not parsed.is_sweep_override():
            found |= _leaves(parsed.key_or_group, parsed.value())
    return found


def take_over(nested: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """ROLL's tree with the values of our keys that say the same; interpolations and null leave it as it is."""
    tree = deepcopy(dict(nested))
    for key, path in SAME.items():
        value = given.get(key)
        if value is None or (isinstance(value, str) and "$" in value):
            continue
        if path.endswith("device_mapping"):
            value = _ranks(value)
        if path.startswith("critic.") and tree.get("critic") is None:
            continue  # a critic that the file lacks is none of ROLL's
        if value is not None and fits(path, value):
            _set(tree, path, value)
        if path == "response_length":  # which sequence_length would win over
            tree.pop("sequence_length", None)
    return tree


def _ranks(value: Any) -> list[int] | None:
    """What a mapping of ours names: ROLL has no `0` or `0,2`; None for what is none, which is told under our name."""
    try:
        return list(parse_device_mapping(value, ""))
    except (UserError, TypeError):
        return None


def _leaves(key: str, value: Any) -> dict[str, Any]:
    """A section given as a dictionary, key by key."""
    if key not in known_keys().sections or not isinstance(value, dict):
        return {key: value}
    return {full: leaf for name, below in value.items() for full, leaf in _leaves(f"{key}.{name}", below).items()}


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    node = tree
    for section in sections:
        below = node.get(section)
        if below is None:
            below = node[section] = {}
        if not isinstance(below, dict):  # a section that is none is told of elsewhere
            return
        node = below
    node[name] = value
