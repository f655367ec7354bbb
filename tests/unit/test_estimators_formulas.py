"""Every advantage estimator against its formula in loops, and against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from estimator_formulas import (
    EVERY,
    FORMULAS,
    Row,
    batches,
    flat,
    gdpo,
    make_batch,
    optimal_token_baseline,
    peers,
    per_row,
    rows_of,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.algorithms.advantages import AdvantageInput
from trainer.algorithms.estimators.catalog import ESTIMATORS

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def outcomes(rewards: list[float], group: list[int] | None = None, lengths: list[int] | None = None) -> AdvantageInput:
    num = len(rewards)
    return AdvantageInput(
        rewards=torch.tensor(rewards),
        group=torch.tensor(group or [0] * num),
        lengths=torch.tensor(lengths or [1] * num),
    )


def test_every_estimator_has_a_formula_here() -> None:
    assert set(FORMULAS) == set(EVERY) == set(ESTIMATORS)


@pytest.mark.parametrize("name", EVERY)
@settings(deadline=None, max_examples=80)
@given(x=batches())
def test_formula(name: str, x: AdvantageInput) -> None:
    torch.testing.assert_close(run(name, x).advantages, flat(x, FORMULAS[name](rows_of(x))), **CLOSE)


@settings(deadline=None, max_examples=40)
@given(x=batches(), gamma=st.sampled_from([1.0, 0.9, 0.0]))
def test_returns_are_the_rewards_to_come(x: AdvantageInput, gamma: float) -> None:
    to_go = flat(x, [row.to_go(gamma) for row in rows_of(x)])
    torch.testing.assert_close(run("reinforce_plus_plus", x, gamma=gamma).returns, to_go, **CLOSE)
    undiscounted = flat(x, [row.to_go() for row in rows_of(x)])
    for name in ("remax", "optimal_token_baseline"):
        torch.testing.assert_close(run(name, x).returns, undiscounted, **CLOSE)


@settings(deadline=None, max_examples=40)
@given(x=batches())
def test_without_the_standard_deviation(x: AdvantageInput) -> None:
    grpo = run("grpo", x, norm_adv_by_std_in_grpo=False)
    torch.testing.assert_close(grpo.advantages, run("dr_grpo", x).advantages)
    expected = per_row(rows_of(x), lambda row, g: max(o.total for o in g) - max(o.total for o in g if o is not row))
    passk = run("grpo_passk", x, norm_adv_by_std_in_grpo=False)
    torch.testing.assert_close(passk.advantages, flat(x, expected), **CLOSE)


@settings(deadline=None, max_examples=40)
@given(x=batches())
def test_gpg_counts_mixed_groups_as_its_authors_do(x: AdvantageInput) -> None:
    rows = rows_of(x)
    mixed = sum(len({o.reward for o in peers(rows, row)}) > 1 for row in rows)
    nonzero = sum(row.reward != 0.0 for row in rows)
    plain = run("gpg", x).advantages * max(nonzero, 1) / len(rows)
    given = {"valid": "mixed_groups", "f_norm": 4.0}
    torch.testing.assert_close(run("gpg", x, given).advantages, plain * len(rows) / max(mixed, 1) / 4.0, **CLOSE)


@settings(deadline=None, max_examples=40)
@given(x=batches())
def test_gdpo_weights(x: AdvantageInput) -> None:
    weights = {"format": 0.25, "answer": 2}
    result = run("gdpo", x, {"weights": weights}).advantages
    torch.testing.assert_close(result, flat(x, gdpo(rows_of(x), weights)), **CLOSE)
    one = run("gdpo", x, {"weights": {"format": 1.0}}).advantages
    torch.testing.assert_close(one, flat(x, gdpo(rows_of(x), {"format": 1.0})), **CLOSE)


def test_gdpo_whitens_responses_or_tokens() -> None:
    """Normalised parts -+ 0.7071 and 0.7071: over sequences of 1 and 3 tokens the mean is 0, or that of four tokens."""
    x = AdvantageInput(
        rewards=torch.tensor([0.0, 1.0]),
        group=torch.tensor([5, 5]),
        lengths=torch.tensor([1, 3]),
        parts={"score": torch.tensor([0.0, 1.0])},
    )
    half = 0.5**0.5
    sequences = run("gdpo", x, {"whiten_over": "sequences"}).advantages
    torch.testing.assert_close(sequences, torch.tensor([-half, half, half, half]), rtol=1e-4, atol=0.0)
    tokens = run("gdpo", x).advantages
    torch.testing.assert_close(tokens, torch.tensor([-1.5, 0.5, 0.5, 0.5]), rtol=1e-4, atol=0.0)


@settings(deadline=None, max_examples=40)
@given(x=batches())
def test_optimal_token_baseline_without_zero_tail(x: AdvantageInput) -> None:
    result = run("optimal_token_baseline", x, {"handle_zero_tail": False}).advantages
    torch.testing.assert_close(result, flat(x, optimal_token_baseline(rows_of(x), zero_tail=False)), **CLOSE)


def test_the_weight_of_a_token_is_the_squared_norm_of_its_gradient() -> None:
    """1 - 2 pi + sum pi^2 = |d log pi / d logits|^2, by automatic differentiation."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(dim=0)
    (gradient,) = torch.autograd.grad(logprobs[3], logits)
    pi = logprobs.detach().exp()
    x = AdvantageInput(
        rewards=torch.tensor([0.0]),
        group=torch.tensor([0]),
        lengths=torch.tensor([1]),
        logprobs=logprobs.detach()[3:],
        sum_pi_squared=pi.square().sum().reshape(1),
    )
    assert rows_of(x)[0].norms[0] == pytest.approx(float(gradient.square().sum()))


def test_optimal_token_baseline_by_hand() -> None:
    """Weights of the two first tokens 1 and 3, rewards 0 and 1: baseline 3/4; the longer response is alone after it."""
    x = AdvantageInput(
        rewards=torch.tensor([0.0, 1.0]),
        group=torch.tensor([0, 0]),
        lengths=torch.tensor([1, 2]),
        logprobs=torch.full((3,), -torch.inf),  # pi = 0, so that the weight is 1 + sum pi^2
        sum_pi_squared=torch.tensor([0.0, 2.0, 0.0]),
    )
    result = run("optimal_token_baseline", x).advantages
    torch.testing.assert_close(result, torch.tensor([-0.75, 0.25, 1.0]))
    tail = run("optimal_token_baseline", x, {"handle_zero_tail": False}).advantages
    torch.testing.assert_close(tail, torch.tensor([-0.75, 0.25, 0.0]))


def test_optimal_token_baseline_of_certain_tokens_is_the_mean() -> None:
    """Tokens of probability 1 weigh nothing; 0 / 0 is taken for the plain mean."""
    x = outcomes([0.0, 1.0, 5.0])
    certain = replace(x, logprobs=torch.zeros(3), sum_pi_squared=torch.ones(3))
    torch.testing.assert_close(run("optimal_token_baseline", certain).advantages, torch.tensor([-2.0, -1.0, 3.0]))


def test_max_rl_is_the_gradient_of_the_log_of_the_success_rate() -> None:
    """Three of four fail: success weighs (1 - p) / p = 3, a failure -1; over n these sum with 1/K over successes."""
    result = run("max_rl", outcomes([0.0, 1.0, 0.0, 0.0])).advantages
    torch.testing.assert_close(result, torch.tensor([-1.0, 3.0, -1.0, -1.0]), rtol=1e-5, atol=0.0)
    assert run("max_rl", outcomes([0.0, 0.0])).advantages.eq(0.0).all()
    torch.testing.assert_close(
        run("max_rl", outcomes([0.0, 0.5, 0.5, 0.0])).advantages,
        torch.tensor([-1.0, 1.0, 1.0, -1.0]),
        rtol=1e-5,
        atol=0.0,
    )


def test_group_estimators_by_hand() -> None:
    x = outcomes([1.0, 2.0, 6.0, 5.0], [0, 0, 0, 1], [3, 1, 0, 1])
    lengths = x.lengths

    def per_token(values: list[float]) -> torch.Tensor:
        return torch.repeat_interleave(torch.tensor(values), lengths)

    spread = 7.0**0.5  # of 1, 2, 6, unbiased
    expected = {
        "grpo": [-2 / spread, -1 / spread, 3 / spread, 0.0],
        "dr_grpo": [-2.0, -1.0, 3.0, 0.0],
        "rloo": [-3.0, -1.5, 4.5, 0.0],
        "opo": [-0.25, 0.75, 4.75, 0.0],  # baseline (3 * 1 + 1 * 2) / 4
        "grpo_passk": [0.0, 0.0, 4 / spread, 0.0],
        "gpg": [-2.0, -1.0, 3.0, 0.0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(run(name, x).advantages, per_token(values), rtol=1e-5, atol=1e-6)
    zeros = outcomes([0.0, 0.0, 0.0, 3.0])
    torch.testing.assert_close(run("gpg", zeros).advantages, torch.tensor([-3.0, -3.0, -3.0, 9.0]))  # alpha = 4 / 1


def test_discounting_passes_over_observations() -> None:
    """A tool's tokens in the middle and at the end neither discount the reward nor swallow it."""
    mask = torch.tensor([True, False, False, True, False])
    x = AdvantageInput(torch.tensor([2.0]), torch.tensor([0]), torch.tensor([5]), loss_mask=mask)
    assert run("reinforce_plus_plus", x, gamma=0.5).returns.tolist() == [1.0, 0.0, 0.0, 2.0, 0.0]


def test_rows_of_a_batch_are_its_chosen_tokens() -> None:
    """The formulas here read what they should."""
    x = make_batch(1, [2, 3], masked=True, paid=True, binary=False)
    assert x.loss_mask is not None and x.token_rewards is not None
    rows: list[Row] = rows_of(x)
    assert sum(len(row.paid) for row in rows) == int(x.loss_mask.sum())
    assert sum(sum(row.paid) for row in rows) == pytest.approx(float(x.token_rewards[x.loss_mask].sum()), abs=1e-6)
