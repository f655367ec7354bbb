"""Every policy loss and its gradient against the formula written out, and at ratio 1 against the policy gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from loss_world import COLUMNS, VOCABULARY, make_batch, naive_aggregate, theta_of, whole
from policy_formulas import BETA, FORMULAS, KL_COEF, PRESCRIBED, Token
from policy_world import CLIPS, LENGTHS, likely, logprobs_of, loss_of, policy_batch

from trainer.algorithms.aggregation import AGGREGATION_MODES
from trainer.algorithms.policy.build import OBJECTIVES
from workers.batch import Batch

MODES = {"token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"}


def tokens_of(batch: Batch, theta: torch.Tensor) -> list[list[tuple[int, Token]]]:
    """The chosen tokens of each sequence, with their places."""
    columns = {name: batch.tokens[name].tolist() for name in (*COLUMNS, "chosen_tokens")}
    new, mask = logprobs_of(batch, theta).tolist(), batch.tokens["loss_mask"].tolist()
    sequences, start = [], 0
    for length in batch.lengths.tolist():
        places = [i for i in range(start, start + length) if mask[i]]
        others = [columns[name] for name in ("old_logprobs", "advantages", "chosen_tokens")]
        sequences.append([(i, Token(new[i], *(values[i] for values in others))) for i in places])
        start += length
    return sequences


def expected(name: str, mode: str, batch: Batch, theta: torch.Tensor) -> tuple[float, list[float]]:
    """Loss and gradient by theta. The weight of a token is what the aggregate of its indicator is."""
    mode = "seq-mean-token-mean" if name in PRESCRIBED else mode
    sequences = tokens_of(batch, theta)
    results = [FORMULAS[name]([t for _, t in s]) if s else [] for s in sequences]
    value = naive_aggregate([[v for v, _ in row] for row in results], mode)
    gradient = [0.0] * VOCABULARY
    targets = [int(t) for response in batch.responses for t in response]
    for number, (sequence, row) in enumerate(zip(sequences, results, strict=True)):
        for k, ((place, token), (_, slope)) in enumerate(zip(sequence, row, strict=True)):
            one = [[float(number == n and k == j) for j in range(len(s))] for n, s in enumerate(sequences)]
            gradient[targets[place]] += naive_aggregate(one, mode) * slope * token.new  # d logp / d theta is logp
    return value, gradient


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_the_formula(name: str, mode: str) -> None:
    for seed in (5, 6):
        batch, theta = policy_batch(seed, LENGTHS), theta_of(seed)
        value, gradient, metrics = whole(loss_of(name, agg_mode=mode), batch, theta, likely)
        wanted, slopes = expected(name, mode, batch, theta)
        assert value == pytest.approx(wanted, rel=1e-11) == metrics["actor/pg_loss"] == metrics["actor/loss"]
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)


def test_the_batches_reach_every_branch() -> None:
    """Else a bound that is never active would go untested."""
    shares = {name: [0.0, 0.0] for name in OBJECTIVES}
    for name in OBJECTIVES:
        for seed in (5, 6):
            metrics = whole(loss_of(name), policy_batch(seed, LENGTHS), theta_of(seed), likely)[2]
            shares[name][0] += metrics["actor/clip_frac"] / 2
            shares[name][1] += metrics["actor/clip_frac_lower"] / 2
    bounded = {"ppo", "gspo", "cispo", "gmpo", "clip_cov", "dppo_tv", "dppo_kl", "topr"}
    assert {name for name, (share, _) in shares.items() if 0.0 < share < 1.0} == bounded
    assert {name for name, (_, lower) in shares.items() if 0.0 < lower < 1.0} == {
        *("ppo", "clip_cov", "kl_cov", "dppo_tv", "dppo_kl")
    }


@pytest.mark.parametrize("name", ["ppo", "sapo", "gspo", "gmpo", "clip_cov", "kl_cov", "dro"])
def test_gradient_is_the_slope_of_the_loss(name: str) -> None:
    """Those without a stop-gradient, by differences; each sequence has one advantage, as in the papers."""
    batch, theta = policy_batch(7, LENGTHS, per_sequence=True), theta_of(7)
    loss, step = loss_of(name), 1e-6
    gradient = whole(loss, batch, theta, likely)[1]
    for i in range(VOCABULARY):
        bump = torch.zeros_like(theta)
        bump[i] = step
        up, down = (whole(loss, batch, theta + sign * bump, likely)[0] for sign in (1, -1))
        assert gradient[i].item() == pytest.approx((up - down) / (2 * step), abs=2e-7), i


@pytest.mark.parametrize("given", [True, False], ids=["old given", "no old"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_at_ratio_one_is_the_policy_gradient(name: str, given: bool) -> None:
    """-A d logp, for all of them; of clip_cov for the tokens that are not chosen."""
    batch, theta = policy_batch(1, LENGTHS, per_sequence=name == "gmpo"), theta_of(2)
    batch.tokens["old_logprobs"] = logprobs_of(batch, theta)
    if not given:
        del batch.tokens["old_logprobs"]
    if name == "clip_cov":
        batch.tokens["chosen_tokens"] = torch.zeros_like(batch.tokens["chosen_tokens"])
    loss = loss_of(name, agg_mode="seq-mean-token-mean")
    mask, new = batch.tokens["loss_mask"], logprobs_of(batch, theta)
    wanted, start = torch.zeros(VOCABULARY, dtype=torch.float64), 0
    targets = np.concatenate(batch.responses)
    for length in batch.lengths.tolist():
        kept = [i for i in range(start, start + length) if mask[i]]
        for i in kept:
            share = 1.0 / (len(batch) * len(kept))
            wanted[int(targets[i])] -= share * batch.tokens["advantages"][i] * new[i]
        start += length
    _, gradient, metrics = whole(loss, batch, theta, likely)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)
    assert metrics["actor/clip_frac"] == 0.0 and metrics["actor/ratio_max"] == 1.0


def test_gmpo_is_a_mean_over_all_sequences_of_the_mini_batch() -> None:
    """Not over those of a micro-batch: the sum over micro-batches of one sequence each is the whole."""
    batch, theta = policy_batch(3, [4, 4], per_sequence=True), theta_of(3)
    batch.tokens["loss_mask"] = torch.ones(8, dtype=torch.bool)
    new, old = logprobs_of(batch, theta).tolist(), batch.tokens["old_logprobs"].tolist()
    advantages = batch.tokens["advantages"].tolist()
    total = 0.0
    for rows in (range(4), range(4, 8)):
        product = 1.0
        for i in rows:
            ratio = math.exp(new[i] - old[i])
            positive = advantages[i] > 0
            product *= min(ratio, math.exp(0.28)) if positive else max(ratio, math.exp(-0.2))
        total += -advantages[rows[0]] * product**0.25
    assert whole(loss_of("gmpo"), batch, theta, likely)[0] == pytest.approx(total / 2)


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in PRESCRIBED for mode in sorted(MODES)])
def test_prescribed_aggregation(name: str, mode: str) -> None:
    batch, theta = policy_batch(3, LENGTHS), theta_of(3)
    wanted = whole(loss_of(name, agg_mode="seq-mean-token-mean"), batch, theta, likely)
    got = whole(loss_of(name, agg_mode=mode), batch, theta, likely)
    assert got[0] == wanted[0] and got[1].equal(wanted[1])


def test_entropy_and_kl_keep_the_configured_aggregation() -> None:
    batch, theta = policy_batch(3, LENGTHS), theta_of(3)
    extra: dict[str, Any] = {"kl_loss_coef": 0.5, "kl_loss_type": "k2", "entropy_coeff": 0.1}
    plain, full = loss_of("gspo", agg_mode="token-sum"), loss_of("gspo", agg_mode="token-sum", **extra)
    mask, new = batch.tokens["loss_mask"].tolist(), logprobs_of(batch, theta).tolist()
    ref, entropy = batch.tokens["ref_logprobs"].tolist(), batch.tokens["entropy"].tolist()
    scale = 1.0 + theta.mean().item()
    added = sum(0.25 * (n - r) ** 2 - 0.1 * e * scale for n, r, e, m in zip(new, ref, entropy, mask, strict=True) if m)
    got = whole(full, batch, theta, likely)[0] - whole(plain, batch, theta, likely)[0]
    assert got == pytest.approx(added)


def sequence_of(values: Sequence[tuple[float, float, float]]) -> Batch:
    """One response with these (log-prob, old, advantage)."""
    batch = make_batch(0, [len(values)])
    base, old, advantages = (torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True))
    batch.tokens["base"], batch.tokens["old_logprobs"], batch.tokens["advantages"] = base, old, advantages
    batch.tokens["loss_mask"] = torch.ones(len(values), dtype=torch.bool)
    return batch


ZERO = torch.zeros(VOCABULARY, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "values", "loss", "clip", "lower"),
    [
        ("gspo", [(-1.0, -1.4, 1.0), (-1.0, -1.0, 1.0)], -math.exp(0.2), 0.0, 0.0),
        ("gspo", [(-1.0, -1.6, 1.0), (-1.0, -1.0, 1.0)], -1.28, 1.0, 0.0),
        ("gspo", [(-1.0, -90.0, -1.0)], math.exp(10.0), 0.0, 0.0),
        ("gmpo", [(-1.0, -1.6, 1.0), (-1.0, -1.0, 1.0)], -math.exp(0.14), 0.5, 0.0),
        ("gmpo", [(-1.0, -0.4, -1.0), (-1.0, -1.0, -1.0)], math.exp(-0.1), 0.5, 0.0),
        ("sapo", [(-1.0, -1.0, 1.0)], -2.0, 0.0, 0.0),
        ("sapo", [(-1.0, -1.0, -1.0)], 2.0 / 1.05, 0.0, 0.0),
        ("cispo", [(-1.0, -2.0, 2.0)], 1.28 * 2.0, 1.0, 0.0),
        ("cispo", [(-1.0, -0.5, 2.0)], 0.8 * 2.0, 1.0, 0.0),
        ("dppo_tv", [(math.log(0.5), math.log(0.2), 1.0)], 0.0, 1.0, 0.0),  # 0.3 up, more than 0.28
        ("dppo_tv", [(math.log(0.5), math.log(0.2), -1.0)], 2.5 * math.log(0.5), 0.0, 0.0),  # comes back
        ("dppo_tv", [(math.log(0.04), math.log(0.001), 1.0)], -3.0 * math.log(0.04), 0.0, 1.0),  # ratio 40 is fine
        ("dppo_tv", [(math.log(0.2), math.log(0.41), -1.0)], 0.0, 1.0, 0.0),
        ("topr", [(-1.0, -0.5, -1.0), (-1.0, -0.5, -1.0)], -math.exp(-1.0), 0.0, 0.0),
        ("topr", [(-1.0, -1.5, -1.0), (-1.0, -1.5, -1.0)], -1.0, 1.0, 0.0),
        ("topr", [(-1.0, -0.5, 1.0), (-1.0, -0.5, 1.0)], 1.0, 0.0, 0.0),
        ("dro", [(-1.0, -3.0, 0.5)], 0.5 + BETA / 2 * 4.0, 0.0, 0.0),
        ("gpg", [(-1.0, -3.0, 0.5)], 0.5, 0.0, 0.0),
    ],
)
def test_by_hand(
    name: str, values: Sequence[tuple[float, float, float]], loss: float, clip: float, lower: float
) -> None:
    got, _, metrics = whole(loss_of(name), sequence_of(values), ZERO)
    assert got == pytest.approx(loss)
    assert (metrics["actor/clip_frac"], metrics["actor/clip_frac_lower"]) == (clip, lower)


def test_parameters_are_used() -> None:
    """Each parameter changes the loss of its objective as the formula says."""
    batch = sequence_of([(-1.0, -1.0, 2.0), (-1.0, -1.0, -2.0)])
    assert whole(loss_of("sapo", {"tau_pos": 2.0, "tau_neg": 4.0}), batch, ZERO)[0] == pytest.approx((-2.0 + 1.0) / 2)
    assert whole(loss_of("dro", {"dro_beta": 2.0}), sequence_of([(-1.0, -2.0, 0.0)]), ZERO)[0] == pytest.approx(1.0)
    batch = sequence_of([(-1.0, -3.0, 0.0)])
    batch.tokens["chosen_tokens"] = torch.ones(1)
    assert whole(loss_of("kl_cov"), batch, ZERO)[0] == pytest.approx(2.0 * KL_COEF)
    assert CLIPS.clip_c == 3.0
