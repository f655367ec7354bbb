"""The estimators after ROLL against the same said in plain loops, and their corners."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
import torch

from trainer.algorithms.advantages import AdvantageInput, estimator
from trainer.algorithms.estimators import returns, roll

N = 4
LENGTHS = [3, 1, 4, 2, 4, 2, 3, 1]
REWARDS = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]


def batch(**more: Any) -> AdvantageInput:
    group = [i // N for i in range(len(LENGTHS))]
    return AdvantageInput(
        rewards=torch.tensor(more.pop("rewards", REWARDS)),
        group=torch.tensor(group),
        lengths=torch.tensor(LENGTHS),
        **more,
    )


def in_loops(params: dict[str, Any], penalty: list[float] | None = None) -> list[float]:
    """Advantages of every token, as docs/roll.md and ROLL's own steps have it."""
    groups = [REWARDS[i - i % N : i - i % N + N] for i in range(len(REWARDS))]
    shaped, kept = [], []
    for i, reward in enumerate(REWARDS):
        over = {"group": groups[i], "batch": REWARDS}
        r = reward - statistics.mean(over[params["norm_mean"]]) if "norm_mean" in params else reward
        r = r / (statistics.stdev(over[params["norm_std"]]) + 1e-6) if "norm_std" in params else r
        clip = params.get("reward_clip", math.inf)
        shaped.append(max(-clip, min(clip, r)))
        mean = statistics.mean(groups[i])
        kept.append(
            LENGTHS[i] < params.get("max_length", math.inf)
            and params.get("min_group_reward", -math.inf) < mean < params.get("max_group_reward", math.inf)
            and (reward == 1 or LENGTHS[i] < params.get("max_failed_length", math.inf))
        )
    rows, start = [], 0
    for i, length in enumerate(LENGTHS):
        row = [0.0] * length if penalty is None else penalty[start : start + length]
        start += length
        row[-1] += shaped[i]
        clip = params.get("reward_clip", math.inf)
        rows.append([max(-clip, min(clip, value)) for value in row])
    rows = [row if kept[i] else [0.0] * len(row) for i, row in enumerate(rows)]
    if params.get("whiten_rewards"):
        rows = whitened(rows, kept)
    come = []
    for row in rows:
        back, total = [], 0.0
        for value in reversed(row):
            total = value + params.get("gamma", 1.0) * total
            back.append(total)
        come.append(back[::-1])
    if params.get("whiten_advantages"):
        come = whitened(come, kept)
    clip = params.get("advantage_clip", math.inf)
    return [max(-clip, min(clip, v)) if kept[i] else 0.0 for i, row in enumerate(come) for v in row]


def whitened(rows: list[list[float]], kept: list[bool]) -> list[list[float]]:
    values = [v for row, keep in zip(rows, kept, strict=True) if keep for v in row]
    mean, variance = statistics.mean(values), statistics.variance(values)
    return [
        [(v - mean) / math.sqrt(variance + 1e-8) if keep else 0.0 for v in row]
        for row, keep in zip(rows, kept, strict=True)
    ]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"gamma": 0.9},
        {"norm_mean": "group", "norm_std": "group"},
        {"norm_mean": "batch", "norm_std": "batch", "reward_clip": 0.5},
        {"norm_mean": "batch", "norm_std": "group"},
        {"norm_std": "batch", "whiten_rewards": True},
        {"whiten_advantages": True, "advantage_clip": 0.8},
        {"whiten_advantages": True, "max_length": 4},
        {"whiten_advantages": True, "min_group_reward": 0.1, "max_group_reward": 0.7},
        {"whiten_advantages": True, "max_failed_length": 2},
        {"reward_clip": 10, "advantage_clip": 2.0, "whiten_advantages": True, "max_length": 4, "whiten_rewards": True},
    ],
)
@pytest.mark.parametrize("with_penalty", [False, True])
def test_as_in_loops(params: dict[str, Any], with_penalty: bool) -> None:
    generator = random.Random(3)
    penalty = [generator.uniform(-0.3, 0.0) for _ in range(sum(LENGTHS))] if with_penalty else None
    x = batch(token_rewards=None if penalty is None else torch.tensor(penalty))
    expected = torch.tensor(in_loops(params, penalty))
    torch.testing.assert_close(roll.reinforce(x, **params).advantages, expected, atol=1e-5, rtol=1e-5)


def test_plain_settings_are_the_built_in_estimators() -> None:
    x = batch(values=torch.linspace(-1, 1, sum(LENGTHS)))
    assert torch.equal(
        roll.reinforce(x, gamma=0.9, whiten_advantages=True).advantages,
        returns.reinforce_plus_plus(x, gamma=0.9).advantages,
    )
    ours, built_in = roll.gae(x, gamma=0.9, lam=0.8, whiten_advantages=True), returns.gae(x, gamma=0.9, lam=0.8)
    torch.testing.assert_close(ours.advantages, built_in.advantages)
    torch.testing.assert_close(ours.returns, built_in.returns)


def test_gae_clips_and_leaves_out() -> None:
    x = batch(values=torch.zeros(sum(LENGTHS)))
    result = roll.gae(x, lam=1.0, advantage_clip=0.5, max_length=4).advantages
    assert result.abs().max() == 0.5
    assert result[4:8].tolist() == [0.0] * 4


def test_nothing_kept_gives_zeros() -> None:
    result = roll.reinforce(batch(), whiten_rewards=True, whiten_advantages=True, max_length=1)
    assert torch.equal(result.advantages, torch.zeros(sum(LENGTHS)))


def test_tool_tokens_are_passed_over() -> None:
    mask = torch.ones(sum(LENGTHS), dtype=torch.bool)
    mask[2] = False
    result = roll.reinforce(batch(loss_mask=mask), max_length=3).advantages
    assert result[:3].tolist() == [1.0, 1.0, 0.0]


def test_it_is_found_by_its_path_and_starts_a_critic() -> None:
    chosen = estimator("trainer.algorithms.estimators.roll:gae", {"lam": 0.9, "advantage_clip": 2.0})
    assert chosen.needs_values
    with pytest.raises(ValueError, match="advantage_clp"):
        estimator("trainer.algorithms.estimators.roll:reinforce", {"advantage_clp": 2.0})
