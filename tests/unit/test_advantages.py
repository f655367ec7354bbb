"""Advantage estimators against formulas written out with Python loops, and against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.algorithms.advantages import AdvantageInput, estimator, explained_variance, sequence_ids
from trainer.algorithms.estimators.group import grpo
from trainer.algorithms.estimators.returns import gae
from trainer.config.schema import AlgorithmConfig


def make_input(seed: int, lengths: list[int], *, masked: bool = False, **columns: bool) -> AdvantageInput:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def column(wanted: bool) -> Tensor | None:
        return torch.randn(total, generator=generator) if wanted else None

    return AdvantageInput(
        rewards=torch.randn(len(lengths), generator=generator),
        group=torch.randint(0, max(len(lengths) // 2, 1), (len(lengths),), generator=generator),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        token_rewards=column(columns.get("token_rewards", False)),
        values=column(columns.get("values", False)),
        loss_mask=torch.rand(total, generator=generator) > 0.4 if masked else None,
    )


def as_lists(x: AdvantageInput, flat: Tensor | None, default: Any) -> list[list[Any]]:
    """A flat column as one list per sequence."""
    rows: list[list[Any]] = []
    start = 0
    for length in x.lengths.tolist():
        rows.append([default] * length if flat is None else flat[start : start + length].tolist())
        start += length
    return rows


def naive_grpo(x: AdvantageInput, norm_by_std: bool) -> list[float]:
    masks = as_lists(x, x.loss_mask, True)
    paid = as_lists(x, x.token_rewards, 0.0)
    outcome = []
    for s, reward in enumerate(x.rewards.tolist()):
        outcome.append(reward + sum(p for p, m in zip(paid[s], masks[s], strict=True) if m))
    result: list[float] = []
    for s, group in enumerate(x.group.tolist()):
        peers = [outcome[i] for i, g in enumerate(x.group.tolist()) if g == group]
        mean = sum(peers) / len(peers)
        advantage = outcome[s] - mean
        if norm_by_std and len(peers) > 1:
            advantage /= math.sqrt(sum((p - mean) ** 2 for p in peers) / (len(peers) - 1)) + 1e-6
        result += [advantage if m else 0.0 for m in masks[s]]
    return result


def naive_gae(x: AdvantageInput, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Backward over every token; tokens outside the mask hand the next value and the running sum on unchanged."""
    masks = as_lists(x, x.loss_mask, True)
    values = as_lists(x, x.values, 0.0)
    paid = as_lists(x, x.token_rewards, 0.0)
    advantages: list[float] = []
    returns: list[float] = []
    for s, outcome in enumerate(x.rewards.tolist()):
        own: list[tuple[float, float]] = []
        next_value, running, outcome_left = 0.0, 0.0, outcome
        for t in reversed(range(len(masks[s]))):
            if not masks[s][t]:
                own.append((0.0, 0.0))
                continue
            reward = paid[s][t] + outcome_left
            outcome_left = 0.0
            running = reward + gamma * next_value - values[s][t] + gamma * lam * running
            next_value = values[s][t]
            own.append((running, running + values[s][t]))
        advantages += [a for a, _ in reversed(own)]
        returns += [r for _, r in reversed(own)]
    return advantages, returns


def naive_whiten(values: list[float], masks: list[bool]) -> list[float]:
    kept = [v for v, m in zip(values, masks, strict=True) if m]
    if len(kept) < 2:
        return [0.0] * len(values)
    mean = sum(kept) / len(kept)
    variance = sum((v - mean) ** 2 for v in kept) / (len(kept) - 1)
    return [(v - mean) / math.sqrt(variance + 1e-8) if m else 0.0 for v, m in zip(values, masks, strict=True)]


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**31)


def test_grpo_by_hand() -> None:
    x = AdvantageInput(
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 5.0]),
        group=torch.tensor([7, 7, 7, 3, 3, 9]),
        lengths=torch.tensor([2, 1, 1, 1, 1, 2]),
    )
    # group 7: mean 1/3, unbiased variance 1/3; group 3: no spread; group 9: nothing to compare with
    high, low = (2 / 3) / (math.sqrt(1 / 3) + 1e-6), (-1 / 3) / (math.sqrt(1 / 3) + 1e-6)
    expected = torch.tensor([high, high, low, low, 0.0, 0.0, 0.0, 0.0])
    result = grpo(x, norm_by_std=True)
    torch.testing.assert_close(result.advantages, expected)
    assert result.returns is None
    plain = grpo(x, norm_by_std=False).advantages
    torch.testing.assert_close(plain, torch.tensor([2 / 3, 2 / 3, -1 / 3, -1 / 3, 0.0, 0.0, 0.0, 0.0]))


def test_equal_rewards_give_exactly_no_advantage() -> None:
    x = AdvantageInput(
        rewards=torch.full((7,), 0.1), group=torch.zeros(7, dtype=torch.int64), lengths=torch.ones(7, dtype=torch.int64)
    )
    assert grpo(x, norm_by_std=True).advantages.eq(0.0).all()


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, lengths=LENGTHS, masked=st.booleans(), paid=st.booleans(), norm_by_std=st.booleans())
def test_grpo_is_the_formula(seed: int, lengths: list[int], masked: bool, paid: bool, norm_by_std: bool) -> None:
    x = make_input(seed, lengths, masked=masked, token_rewards=paid)
    result = grpo(x, norm_by_std=norm_by_std).advantages
    expected = torch.tensor(naive_grpo(x, norm_by_std), dtype=torch.float32)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_gae_by_hand() -> None:
    x = AdvantageInput(
        rewards=torch.tensor([1.0, -1.0]),
        group=torch.tensor([0, 1]),
        lengths=torch.tensor([3, 1]),
        values=torch.tensor([0.5, 0.25, 0.75, 0.5]),
    )
    # gamma 0.5, lam 0.5. Sequence 0: deltas -0.375, 0.125, 0.25; sums 0.25, 0.1875, -0.328125. Sequence 1: -1.5.
    result = gae(x, gamma=0.5, lam=0.5, whiten=False)
    torch.testing.assert_close(result.advantages, torch.tensor([-0.328125, 0.1875, 0.25, -1.5]))
    torch.testing.assert_close(result.returns, torch.tensor([0.171875, 0.4375, 1.0, -1.0]))


def test_gae_passes_over_observations() -> None:
    """A tool's tokens in the middle or at the end change nothing for the tokens that the model chose."""
    mask = torch.tensor([True, False, False, True, False])
    values = torch.tensor([0.5, 9.0, -9.0, 0.25, 7.0])
    common = {"rewards": torch.tensor([2.0]), "group": torch.tensor([0])}
    whole = AdvantageInput(**common, lengths=torch.tensor([5]), values=values, loss_mask=mask)
    cut = AdvantageInput(**common, lengths=torch.tensor([2]), values=values[mask])
    a, b = gae(whole, gamma=0.9, lam=0.8, whiten=False), gae(cut, gamma=0.9, lam=0.8, whiten=False)
    assert a.returns is not None and b.returns is not None
    torch.testing.assert_close(a.advantages[mask], b.advantages)
    torch.testing.assert_close(a.returns[mask], b.returns)
    assert a.advantages[~mask].eq(0.0).all() and a.returns[~mask].eq(0.0).all()


@settings(deadline=None, max_examples=80)
@given(
    seed=SEEDS,
    lengths=LENGTHS,
    masked=st.booleans(),
    paid=st.booleans(),
    gamma=st.sampled_from([1.0, 0.97, 0.5]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
)
def test_gae_is_the_recursion(
    seed: int, lengths: list[int], masked: bool, paid: bool, gamma: float, lam: float
) -> None:
    x = make_input(seed, lengths, masked=masked, token_rewards=paid, values=True)
    advantages, returns = naive_gae(x, gamma, lam)
    plain, whitened = gae(x, gamma=gamma, lam=lam, whiten=False), gae(x, gamma=gamma, lam=lam)
    masks = [bool(m) for row in as_lists(x, x.loss_mask, True) for m in row]
    expected = torch.tensor(naive_whiten(advantages, masks), dtype=torch.float32)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(plain.advantages, torch.tensor(advantages, dtype=torch.float32), **close)
    torch.testing.assert_close(plain.returns, torch.tensor(returns, dtype=torch.float32), **close)
    torch.testing.assert_close(whitened.advantages, expected, **close)
    torch.testing.assert_close(whitened.returns, plain.returns)


def test_gae_of_long_sequences() -> None:
    """Many doubling rounds, and lengths on either side of powers of two."""
    x = make_input(3, [1, 2, 3, 4, 5, 255, 256, 257, 1025], values=True, token_rewards=True)
    advantages, _ = naive_gae(x, 0.999, 0.99)
    result = gae(x, gamma=0.999, lam=0.99, whiten=False).advantages
    torch.testing.assert_close(result, torch.tensor(advantages, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_extreme_batches_are_finite() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = AdvantageInput(torch.zeros(0), nothing, nothing, values=torch.zeros(0))
    assert len(gae(empty, gamma=1.0, lam=1.0).advantages) == len(grpo(empty, norm_by_std=True).advantages) == 0
    mask = torch.zeros(4, dtype=torch.bool)
    hole = torch.full((4,), float("nan"))
    masked = AdvantageInput(
        torch.tensor([1e6, -1e6]), torch.tensor([0, 0]), torch.tensor([4, 0]), hole, hole, loss_mask=mask
    )
    for result in (gae(masked, gamma=1.0, lam=1.0), grpo(masked, norm_by_std=True)):
        assert result.advantages.eq(0.0).all()


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns + 5.0, returns) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(4), returns) == pytest.approx(0.0)
    assert explained_variance(torch.tensor([2.0, 1.0, 3.0, 4.0]), returns) == pytest.approx(1 - (2 / 3) / (5 / 3))
    mask = torch.tensor([True, True, False, False])
    assert explained_variance(torch.tensor([1.0, 2.0, 9.0, -9.0]), returns, mask) == pytest.approx(1.0)
    assert explained_variance(returns, torch.ones(4)) == 0.0
    assert explained_variance(torch.zeros(0), torch.zeros(0)) == 0.0


def test_estimators_by_name() -> None:
    cfg = AlgorithmConfig.model_construct(gamma=0.9, lam=0.8, norm_adv_by_std_in_grpo=False)
    x = make_input(1, [3, 2, 4, 1], values=True)
    assert estimator("gae").needs_values and not estimator("grpo").needs_values
    torch.testing.assert_close(estimator("gae")(x, cfg).advantages, gae(x, gamma=0.9, lam=0.8).advantages)
    torch.testing.assert_close(estimator("grpo")(x, cfg).advantages, grpo(x, norm_by_std=False).advantages)
    with pytest.raises(ValueError, match=r"adv_estimator='grop' is unknown; choose one of dr_grpo, gae, gdpo"):
        estimator("grop")
    with pytest.raises(ValueError, match="needs values"):
        gae(make_input(1, [2]), gamma=1.0, lam=1.0)


def test_sequence_ids() -> None:
    assert sequence_ids(torch.tensor([2, 0, 3])).tolist() == [0, 0, 2, 2, 2]
