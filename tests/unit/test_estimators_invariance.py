"""What must not change an advantage, and how one follows from another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from estimator_formulas import EVERY, WHITENED, batches, make_batch, run, take, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.algorithms.advantages import AdvantageInput

CLOSE = {"rtol": 1e-4, "atol": 2e-5}
LOCAL = tuple(name for name in EVERY if name not in (*WHITENED, "gpg"))
"""A group's advantages do not depend on other groups."""
SHIFT = ("grpo", "dr_grpo", "rloo", "opo", "grpo_passk", "reinforce_plus_plus_baseline")
"""Nor on a constant added to the rewards of the group."""
LINEAR = ("dr_grpo", "rloo", "opo", "gpg", "optimal_token_baseline")
FREE_OF_SCALE = ("grpo", "grpo_passk", "max_rl", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
EXAMPLES = settings(deadline=None, max_examples=30)


def with_masked_token(x: AdvantageInput, at: int, sequence: int) -> AdvantageInput:
    """A token that the model did not choose, before token `at` of the batch, in the given sequence; full of NaN."""

    def grown(column: torch.Tensor | None, value: float) -> torch.Tensor | None:
        if column is None:
            return None
        return torch.cat([column[:at], torch.tensor([value]).to(column.dtype), column[at:]])

    total, nan = int(x.lengths.sum()), float("nan")
    mask = torch.ones(total, dtype=torch.bool) if x.loss_mask is None else x.loss_mask
    lengths = x.lengths.clone()
    lengths[sequence] += 1
    return replace(
        x,
        lengths=lengths,
        loss_mask=grown(mask, 0.0),
        token_rewards=grown(x.token_rewards, nan),
        values=grown(x.values, nan),
        logprobs=grown(x.logprobs, nan),
        sum_pi_squared=grown(x.sum_pi_squared, nan),
    )


@pytest.mark.parametrize("name", EVERY)
@EXAMPLES
@given(x=batches(), order=st.randoms(use_true_random=False))
def test_order_of_the_sequences(name: str, x: AdvantageInput, order: st.DataObject) -> None:
    rows = list(range(len(x.rewards)))
    order.shuffle(rows)  # type: ignore[attr-defined]
    moved = take(replace(x, group=1000 - x.group), rows)  # the numbers of the groups mean nothing either
    original = run(name, x).advantages
    index = torch.cat([tokens_of(x)[row] for row in rows])
    torch.testing.assert_close(run(name, moved).advantages, original[index], **CLOSE)


@pytest.mark.parametrize("name", EVERY)
@EXAMPLES
@given(x=batches(), place=st.integers(0, 1000), sequence=st.integers(0, 1000))
def test_a_masked_token_changes_nothing(name: str, x: AdvantageInput, place: int, sequence: int) -> None:
    sequence %= len(x.rewards)
    at = int(x.lengths[:sequence].sum()) + place % (int(x.lengths[sequence]) + 1)
    result = run(name, with_masked_token(x, at, sequence)).advantages
    assert result[at] == 0.0
    torch.testing.assert_close(torch.cat([result[:at], result[at + 1 :]]), run(name, x).advantages, **CLOSE)


@pytest.mark.parametrize("name", LOCAL)
@EXAMPLES
@given(x=batches())
def test_other_groups_change_nothing(name: str, x: AdvantageInput) -> None:
    rows = torch.nonzero(x.group == x.group[0]).flatten().tolist()
    index = torch.cat([tokens_of(x)[row] for row in rows])
    torch.testing.assert_close(run(name, take(x, rows)).advantages, run(name, x).advantages[index], **CLOSE)


@pytest.mark.parametrize("name", SHIFT)
@EXAMPLES
@given(x=batches())
def test_a_constant_added_to_a_group_changes_nothing(name: str, x: AdvantageInput) -> None:
    moved = replace(x, rewards=x.rewards + 2.0 * x.group)
    torch.testing.assert_close(run(name, moved).advantages, run(name, x).advantages, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", (*LINEAR, "remax", *FREE_OF_SCALE))
@EXAMPLES
@given(x=batches())
def test_scale(name: str, x: AdvantageInput) -> None:
    x = replace(x, token_rewards=None)
    assert x.baseline is not None
    scaled = run(name, replace(x, rewards=4.0 * x.rewards, baseline=4.0 * x.baseline)).advantages
    factor = 4.0 if name in (*LINEAR, "remax") else 1.0
    torch.testing.assert_close(scaled, factor * run(name, x).advantages, rtol=1e-3, atol=1e-4)


@EXAMPLES
@given(x=batches())
def test_whitened_advantages_have_mean_0_and_variance_1(x: AdvantageInput) -> None:
    mask = torch.ones(int(x.lengths.sum()), dtype=torch.bool) if x.loss_mask is None else x.loss_mask
    for name in ("gae", "reinforce_plus_plus"):
        chosen = run(name, x).advantages[mask].double()
        if len(chosen) > 1:
            assert float(chosen.mean()) == pytest.approx(0.0, abs=1e-5)
            spread = float(run("gae", x, {"whiten": False}).advantages[mask].double().var()) if name == "gae" else 1.0
            assert float(chosen.var()) == pytest.approx(spread / (spread + 1e-8), abs=1e-3) or not chosen.any()


@EXAMPLES
@given(x=batches())
def test_one_from_another(x: AdvantageInput) -> None:
    n = torch.stack([(x.group == g).sum() for g in x.group]).float()
    per_token = torch.repeat_interleave(n / (n - 1.0).clamp(min=1.0), x.lengths)
    torch.testing.assert_close(run("rloo", x).advantages, per_token * run("dr_grpo", x).advantages, **CLOSE)
    assert x.values is not None and x.baseline is not None
    zero = replace(x, values=torch.zeros_like(x.values), baseline=torch.zeros_like(x.baseline))
    plain = run("gae", zero, {"whiten": False}, lam=1.0, gamma=1.0).advantages
    torch.testing.assert_close(run("remax", zero).advantages, plain, **CLOSE)
    torch.testing.assert_close(
        run("reinforce_plus_plus", zero).advantages, run("gae", zero, lam=1.0).advantages, **CLOSE
    )


@EXAMPLES
@given(seed=st.integers(0, 2**31 - 1), length=st.integers(1, 5))
def test_with_equal_lengths_the_weighted_baselines_are_the_mean(seed: int, length: int) -> None:
    """opo weighs by length, optimal_token_baseline by uncertainty: both are the mean where all have as much of it."""
    x = make_batch(seed, [3, 2], masked=False, paid=False, binary=False)
    total = length * len(x.rewards)
    x = replace(
        x,
        lengths=torch.full((len(x.rewards),), length),
        values=None,
        logprobs=torch.full((total,), 0.5).log(),
        sum_pi_squared=torch.full((total,), 0.375),
    )
    mean = run("dr_grpo", x).advantages
    torch.testing.assert_close(run("opo", x).advantages, mean, **CLOSE)
    torch.testing.assert_close(run("optimal_token_baseline", x).advantages, mean, **CLOSE)
