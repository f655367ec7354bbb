"""Older spellings of keys: accepted, translated, and told to the user.

One row per key or section of `ALIASES`; a section translates everything below it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple


class Alias(NamedTuple):
    """Where a key went. remark: what else changed with the name, appended to the notice."""

    new: str
    remark: str = ""


_ACTOR = "actor_rollout_ref.actor"
_LOSS_PARAMS = ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef", "dro_beta")
"""Beside loss_mode in verl, for whichever loss is chosen."""

ALIASES: dict[str, Alias] = {
    "critic.model.fsdp_config": Alias("critic.fsdp"),
    "custom_reward_function": Alias("reward.custom_reward_function"),
    "actor_rollout_ref.actor.optim.warmup_style": Alias("actor_rollout_ref.actor.optim.lr_scheduler_type"),
    "critic.optim.warmup_style": Alias("critic.optim.lr_scheduler_type"),
    "actor_rollout_ref.actor.ppo_micro_batch_size": Alias(
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", "it counts the sequences of one device"
    ),
    "critic.ppo_micro_batch_size": Alias(
        "critic.ppo_micro_batch_size_per_gpu", "it counts the sequences of one device"
    ),
    "trainer.n_devices_per_node": Alias("trainer.n_gpus_per_node"),
    **{f"{_ACTOR}.{name}": Alias(f"{_ACTOR}.policy_loss.params.{name}") for name in ("tau_pos", "tau_neg")},
    **{f"{_ACTOR}.policy_loss.{name}": Alias(f"{_ACTOR}.policy_loss.params.{name}") for name in _LOSS_PARAMS},
}
"""Old key or section -> its place today."""


def translate_key(key: str) -> tuple[str, str] | None:
    """Return today's name of an older `key` and the notice to print; None where `key` is no older spelling."""
    for old, alias in ALIASES.items():
        if key == old or key.startswith(f"{old}."):
            new = alias.new + key[len(old) :]
            remark = f" ({alias.remark})" if alias.remark else ""
            return new, f"{key} is an older name of {new}: translated{remark}"
    return None


def translate_tree(tree: dict[str, Any], *, keep: Collection[str] = ()) -> list[str]:
    """Move older spellings in a nested dictionary to their place today, in place; return the notices.

    keep: keys of today that were set with higher precedence (on the command line) and must not be overwritten.
    """
    notices: list[str] = []
    for old in ALIASES:
        *parents, name = old.split(".")
        section = _descend(tree, parents)
        if section is None or name not in section:
            continue
        for key, value in _leaves(old, section.pop(name)):
            translated = translate_key(key)
            assert translated is not None, key
            new, notice = translated
            if new not in keep:
                _assign(tree, new.split("."), value)
            notices.append(notice)
    return notices


def _descend(tree: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    node: Any = tree
    for name in path:
        if not isinstance(node, dict) or name not in node:
            return None
        node = node[name]
    return node if isinstance(node, dict) else None


def _leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(key, value)]
    return [leaf for name, below in value.items() for leaf in _leaves(f"{key}.{name}", below)]


def _assign(tree: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        below = tree.setdefault(name, {})
        if not isinstance(below, dict):
            return  # a section overwritten by a value; the schema check names it
        tree = below
    tree[path[-1]] = value
