"""ROLL's YAML to keys of ours: what scripts/convert_roll.py and `--config-name roll` both use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.errors import raise_problems
from trainer.config.roll.algorithm import has_critic, translate_algorithm
from trainer.config.roll.batches import translate_batches
from trainer.config.roll.check import check_keys
from trainer.config.roll.data import (
    translate_data,
    translate_model,
    translate_optimizers,
    translate_run,
    translate_sampling,
)
from trainer.config.roll.engines import translate_roles
from trainer.config.roll.given import take_over
from trainer.config.roll.places import placed
from trainer.config.roll.read import RollFile, read_roll
from trainer.config.roll.rewards import translate_rewards
from trainer.config.roll.tree import RollTree, Translation


def translate_file(
    path: Path, changes: Mapping[str, Any] | None = None, *, given: Mapping[str, Any] | None = None
) -> Translation:
    """Translate a file of ROLL's; every key of ours in the result knows where it came from.

    changes: dotted key of ROLL's -> value in place of the file's. given: keys of ours that the command line sets, and
    their values.
    Raises UserError that lists everything that is wrong: mistyped keys with the nearest name, refused values.
    """
    file = read_roll(path, changes)
    with placed(file.places):
        done = translate_roll(file, given=given)
    done.places = file.places
    return done


def translate_roll(file: RollFile, *, given: Mapping[str, Any] | None = None) -> Translation:
    """As `translate_file`, of a file that has been read."""
    given = given or {}
    into = Translation(RollTree(take_over(file.nested, given)), given)
    check_keys(file, into)
    roles = _roles(into)
    _need_sections(into, roles)
    _say_absent(into, roles)
    translate_model(into, roles)
    translate_data(into)
    translate_batches(into, roles, translate_roles(into, roles))
    translate_sampling(into)
    translate_optimizers(into, roles)
    translate_algorithm(into)
    translate_rewards(into)
    translate_run(into)
    raise_problems(list(dict.fromkeys(into.problems)))
    return into


def _roles(into: Translation) -> list[str]:
    """The training roles that the file describes: the reference only where a KL needs it, the critic only for GAE.

    A critic that only the command line names follows our defaults, most of which are the actor's values.
    """
    roles, roll = ["actor_train"], into.roll
    if roll.value("use_kl_loss") or roll.value("add_token_level_kl"):
        roles.append("reference")
    named = any(key == "algorithm.adv_estimator" or key.startswith("critic.") for key in into.given)
    if has_critic(into) and (roll.has("critic") or not named):
        roles.append("critic")
    return roles


def _need_sections(into: Translation, roles: list[str]) -> None:
    """ROLL has no run without these sections, and defaults of theirs would be a guess."""
    why = {
        "actor_train": "nothing says what is trained; write the section",
        "actor_infer": "nothing says what generates; write the section",
        "reference": "a KL needs a reference; write the section, or set use_kl_loss and add_token_level_kl to false",
        "critic": "adv_estimator=gae, ROLL's default, needs a critic; write the section, or set that to grpo",
    }
    for role in (*roles, "actor_infer"):
        if not into.roll.has(role):
            into.problems.append(f"roll.{role}=null: {why[role]}")
        elif role.startswith("actor") and not into.roll.has(f"{role}.device_mapping"):
            remedy = "write the ranks, e.g. list(range(0,8))"
            into.problems.append(f"roll.{role}.device_mapping=null: names no device; {remedy}")


def _say_absent(into: Translation, roles: list[str]) -> None:
    why = {
        "reference": "no KL is used (use_kl_loss, add_token_level_kl), so there is no reference",
        "critic": "adv_estimator is not gae, so there is no critic",
    }
    for role, reason in why.items():
        if role not in roles and into.roll.has(role):
            into.notices.append(f"roll.config: no effect of {role}: {reason}")
