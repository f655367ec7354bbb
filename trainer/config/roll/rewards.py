"""ROLL's `rewards` by domain: a reward function of one's own in their place, or a built-in scorer where it fits."""

from __future__ import annotations

import math
from typing import Any

from trainer.config.errors import show
from trainer.config.roll.tree import Options, Translation
from workers.reward.scorers import SCORERS

FUNCTION = "reward.custom_reward_function.path"
"""The key that names the function; it must come from the command line, as ROLL's YAML has nothing like it."""

_KINDS = ("no_filter", "mean_filter", "std_filter")
_FILTER = "algorithm.filter_groups.enable"
_WORKERS = {
    "MathRuleRewardWorker": "ROLL compares formulas with math_verify",
    "CodeSandboxRewardWorker": "there is no sandbox to run code in",
    "LLMJudgeRewardWorker": "there are no reward models and no judges",
    "CrossThinkQARuleRewardWorker": "ROLL looks for the letter of a choice",
    "MultipleChoiceBoxedRuleRewardWorker": "ROLL looks for the letter of a choice",
    "GeneralRuleRewardWorker": "ROLL checks instructions (IFEval)",
    "GeneralValRuleRewardWorker": "ROLL checks instructions and answers by data set",
    "DetectionRewardWorker": "models read text here",
}


def translate_rewards(into: Translation) -> None:
    """Translate the domains: each needs a scorer for its tags, or the command line names one function for all.

    A row's tag (`data.reward_fn_key`) is the `data_source` that the function gets, so it can tell domains apart.
    """
    domains: dict[str, Any] = into.roll.value("rewards") or {}
    without = [name for name, block in domains.items() if not _has_scorer(block or {})]
    if not domains and into.roll.has("reward"):
        into.refuse("reward", "the sections of RLVR's domains stand in rewards", "rename it")
    if into.given.get(FUNCTION):
        if domains:
            into.notices.append(
                f"roll.rewards: {FUNCTION} scores every row, of {', '.join(domains)} and of tags that no domain has; a "
                "row's tag is its data_source"
            )
    elif without:
        into.problems.append(_no_scorer({name: domains[name] for name in without}))
    elif not domains:
        into.notices.append("roll.rewards: none; the built-in scorers are chosen by each row's tag")
    else:
        into.notices.append("roll.rewards: a row whose tag no domain has is scored too, 1 for exactly its ground truth")
    workers = [Options(block or {}).either("world_size", 0) for block in domains.values()]
    if any(workers):
        into.put("reward.num_workers", max(workers), *(f"rewards.{name}.world_size" for name in domains))
    _filters(into, domains)


def _has_scorer(block: dict[str, Any]) -> bool:
    tags = Options(block).either("tag_included", [])
    return bool(tags) and all(tag in SCORERS for tag in tags)


def _no_scorer(domains: dict[str, Any]) -> str:
    reasons = []
    for name, block in domains.items():
        worker = str(Options(block or {}).either("worker_cls", "null")).rpartition(".")[2]
        reason = _WORKERS.get(worker, "a worker class is not a reward function")
        reasons.append(f"{name} ({worker}: {reason})")
    return (
        f"roll.rewards=[{', '.join(domains)}]: no scorer here for {', '.join(reasons)}; built in are those of "
        f"{', '.join(SCORERS)} and exact matches; give {FUNCTION}=file.py, one function that scores each row by its "
        "tag (docs/roll.md shows one), or take the domains and their data out"
    )


def _filters(into: Translation, domains: dict[str, Any]) -> None:
    """A filter of groups that are all right or all wrong is DAPO's; others are not there."""
    n, dynamic = into.roll.value("num_return_sequences_in_group"), []
    for name, block in domains.items():
        filtered = Options(Options(block or {}).either("query_filter_config", {}))
        kind, bounds = filtered.either("type", "no_filter"), Options(filtered.either("filter_args", {}))
        if kind == "no_filter":
            continue
        path = f"rewards.{name}.query_filter_config.type"
        if kind not in _KINDS:
            into.refuse(path, "no such filter", f"choose one of {', '.join(_KINDS)}")
            continue
        down, up = bounds.either("threshold_down", -1), bounds.either("threshold_up", math.inf)
        if kind == "mean_filter" and down < 0 and up > 1:
            continue  # nothing is left out
        std = kind == "std_filter" and bounds.either("std_threshold", -1) == 0
        if std or (kind == "mean_filter" and 0 <= down < 1 / n and 1 - 1 / n < up <= 1):
            dynamic.append(path)
        else:
            into.refuse(
                path,
                f"{show(bounds.given)} leaves out other groups than those whose responses are equally good",
                "use std_filter with std_threshold: 0, or no_filter",
                _FILTER,
            )
    if dynamic:
        into.put(_FILTER, True, *dynamic)
        text = "groups whose responses are equally good are replaced (algorithm.filter_groups), in all domains"
        into.tell(f"roll.{dynamic[0]}: {text}", _FILTER)
