"""Corrections for a sampler that differs from the trainer, against loops over sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_world import VOCABULARY, naive_aggregate, theta_of, whole
from policy_formulas import FORMULAS, Token
from policy_world import LENGTHS, likely, logprobs_of, loss_of, policy_batch

from trainer.algorithms.corrections import mismatch, statistic
from trainer.algorithms.losses import driver_columns
from trainer.algorithms.policy.base import BatchInput
from trainer.algorithms.policy.build import OBJECTIVES
from trainer.algorithms.thresholds import (
    STATISTICS,
    Bounds,
    Correction,
    Rejection,
    read_correction,
    read_rejections,
    weight_bounds,
)
from trainer.config.schema import RolloutCorrectionConfig
from trainer.measure import update_metrics
from trainer.roles import UpdateReport
from workers.batch import Batch

ONE_SEQUENCE = (torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), 1)
SPREAD = 0.4
"""Standard deviation of the log ratios below: weights reach both sides of all bounds."""


def near_batch(seed: int, spread: float = SPREAD) -> Batch:
    """The sampler's log-probs differ from the old ones by normal noise."""
    batch = policy_batch(seed, LENGTHS)
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=batch.num_tokens))
    batch.tokens["rollout_logprobs"] = batch.tokens["old_logprobs"] + spread * noise
    return batch


def log_ratios(batch: Batch) -> list[list[tuple[int, float]]]:
    """(place, log old - log sampler) of the chosen tokens of each sequence."""
    old, sampler = batch.tokens["old_logprobs"].tolist(), batch.tokens["rollout_logprobs"].tolist()
    mask, rows, start = batch.tokens["loss_mask"].tolist(), [], 0
    for length in batch.lengths.tolist():
        rows.append([(i, old[i] - sampler[i]) for i in range(start, start + length) if mask[i]])
        start += length
    return rows


def naive_weights(batch: Batch, level: str, bound: Callable[[float], float]) -> dict[int, float]:
    weights = {}
    for row in log_ratios(batch):
        product = math.exp(sum(d for _, d in row))
        for place, d in row:
            raw = {"token": math.exp(d), "sequence": product, "geometric": product ** (1 / len(row))}[level]
            weights[place] = bound(raw)
    return weights


def naive_statistic(row: list[float], name: str) -> list[float]:
    """Of each token, from the log ratios of its sequence."""
    kinds: dict[str, Callable[[float], float]] = {
        "k1": lambda d: -d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(d) - 1 - d,
    }
    values = [kinds[name[-2:]](d) for d in row]
    if name.startswith("token"):
        return values
    how: dict[str, Callable[[list[float]], float]] = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max}
    return [how[name.split("_")[1]](values)] * len(row)


def weighted_loss(name: str, batch: Batch, theta: torch.Tensor, weights: dict[int, float]) -> tuple[float, list[float]]:
    """Token-mean of the formula's loss times the weights, and the gradient."""
    new = logprobs_of(batch, theta).tolist()
    columns = [batch.tokens[c].tolist() for c in ("old_logprobs", "advantages", "chosen_tokens")]
    targets = [int(t) for response in batch.responses for t in response]
    rows, slopes = [], [0.0] * VOCABULARY
    count = sum(len(row) for row in log_ratios(batch))
    for row in log_ratios(batch):
        found = FORMULAS[name]([Token(new[i], *(c[i] for c in columns)) for i, _ in row]) if row else []
        rows.append([weights[i] * value for (i, _), (value, _) in zip(row, found, strict=True)])
        for (i, _), (_, slope) in zip(row, found, strict=True):
            slopes[targets[i]] += weights[i] * slope * new[i] / count
    return naive_aggregate(rows, "token-mean"), slopes


def truncated(raw: float) -> float:
    return min(raw, 1.3)


def icepop(raw: float) -> float:
    return raw if 0.7 <= raw <= 1.3 else 0.0


def masked_above(raw: float) -> float:
    return 0.0 if raw > 1.3 else raw


@pytest.mark.parametrize("name", ["ppo", "gpg", "cispo", "topr", "dppo_tv", "dro"])
@pytest.mark.parametrize(
    ("threshold", "bound"),
    [(1.3, truncated), ("0.7_1.3", icepop), ("0_1.3", masked_above)],
    ids=["tis", "icepop", "mis"],
)
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_importance_weights(level: str, threshold: Any, bound: Callable[[float], float], name: str) -> None:
    """Decoupled PPO: the ratio is policy / old, the weight old / sampler."""
    batch, theta = near_batch(11), theta_of(11)
    weights = naive_weights(batch, level, bound)
    value, gradient, metrics = whole(
        loss_of(name, correction=Correction(level=level, bounds=weight_bounds(threshold))), batch, theta, likely
    )
    wanted, slopes = weighted_loss(name, batch, theta, weights)
    assert value == pytest.approx(wanted, rel=1e-11)
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-13)
    raw = naive_weights(batch, level, lambda w: w)
    cut = [weights[i] != raw[i] for i in raw]
    assert 0 < sum(cut) < len(cut), "both kinds of token are there"
    assert metrics["correction/truncated"] == pytest.approx(sum(cut) / len(cut))
    assert metrics["correction/weight_mean"] == pytest.approx(sum(weights.values()) / len(weights))


THRESHOLDS = {"token_k1": "0.7_1.5", "seq_sum_k1": "0.7_1.5", "seq_mean_k1": "0.9_1.05"}
UPPER = {"token": 0.08, "seq_sum": 0.4, "seq_mean": 0.08, "seq_max": 0.2}


@pytest.mark.parametrize("name", STATISTICS)
def test_rejection(name: str) -> None:
    threshold = THRESHOLDS.get(name, str(UPPER[name.rpartition("_")[0]]))
    low, high = (math.log(float(x)) for x in threshold.split("_")) if "_" in threshold else (-1e9, float(threshold))
    batch, theta = near_batch(12), theta_of(12)
    weights, sequences = {}, []
    for row in log_ratios(batch):
        keep = [low <= value <= high for value in naive_statistic([d for _, d in row], name)] if row else []
        weights |= {place: float(k) for (place, _), k in zip(row, keep, strict=True)}
        sequences.append(not all(keep))
    assert 0 < sum(weights.values()) < len(weights), "some are kept, some are not"
    value, gradient, metrics = whole(
        loss_of("ppo", correction=Correction(rejections=read_rejections(name, threshold))), batch, theta, likely
    )
    wanted, slopes = weighted_loss("ppo", batch, theta, weights)
    assert value == pytest.approx(wanted, rel=1e-11), "divided by all tokens, the rejected ones too"
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-13)
    assert metrics["correction/rejected"] == pytest.approx(1 - sum(weights.values()) / len(weights))
    assert metrics["correction/rejected_sequences"] == pytest.approx(sum(sequences) / len(sequences))


def test_statistics_of_a_far_token_stop_at_20_nats() -> None:
    """As weights do: one token cannot make a sum infinite. k2 is 200 at most, k3 of one that became unlikely 19."""
    far = mismatch(*(torch.full((2,), value) for value in (-1e3, -1.0)), *ONE_SEQUENCE)
    assert (
        statistic(far, "token_k2").tolist() == [200.0, 200.0] and statistic(far, "seq_sum_k2").tolist() == [400.0] * 2
    )
    assert statistic(far, "token_k3").tolist() == pytest.approx([19.0, 19.0])
    assert statistic(far, "seq_mean_k1").tolist() == [20.0, 20.0]


def test_no_gradient_flows_through_a_correction() -> None:
    trainer = torch.full((2,), -1.0, requires_grad=True)
    assert not mismatch(trainer, torch.full((2,), -2.0), *ONE_SEQUENCE).log_rho.requires_grad


def test_several_criteria_and_weights_together() -> None:
    batch, theta = near_batch(13), theta_of(13)
    weights = naive_weights(batch, "token", truncated)
    for row in log_ratios(batch):
        if row and sum(d * d / 2 for _, d in row) > 0.4:
            weights |= {i: 0.0 for i, _ in row}
        weights |= {i: 0.0 for i, d in row if not math.log(0.7) <= -d <= math.log(1.5)}
    correction = Correction("token", Bounds(None, 1.3), read_rejections("token_k1, seq_sum_k2", "0.7_1.5, 0.4"))
    wanted, slopes = weighted_loss("ppo", batch, theta, weights)
    value, gradient, _ = whole(loss_of("ppo", correction=correction), batch, theta, likely)
    assert value == pytest.approx(wanted) and gradient.tolist() == pytest.approx(slopes)


def every_correction() -> list[Correction]:
    levels = [
        Correction(level=level, bounds=bounds)
        for level in ("token", "sequence", "geometric")
        for bounds in (Bounds(None, 2.0), Bounds(0.5, 5.0), Bounds(None, 1.0), Bounds(1.0, 1.0))
    ]
    rejections = [
        Correction(rejections=read_rejections(name, "1.0" if name[-1] == "1" else "1e-9")) for name in STATISTICS
    ]
    return [*levels, *rejections, Correction("token", rejections=rejections[0].rejections)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_matching_sampler_needs_no_correction(name: str) -> None:
    batch, theta = near_batch(14, spread=0.0), theta_of(14)
    plain = whole(loss_of(name), batch, theta, likely)
    for correction in every_correction():
        value, gradient, metrics = whole(loss_of(name, correction=correction), batch, theta, likely)
        assert value == plain[0] and gradient.equal(plain[1]), correction
        assert metrics["correction/weight_mean"] == pytest.approx(1.0)
        assert metrics["correction/rejected"] == metrics["correction/chi2_token"] == 0.0
        assert metrics["correction/chi2_sequence"] == 0.0


def test_metrics_against_their_definitions() -> None:
    batch, theta = near_batch(15), theta_of(15)
    correction = Correction("token", Bounds(None, 1.3), read_rejections("token_k2", 0.3))
    metrics = whole(loss_of("ppo", correction=correction), batch, theta, likely)[2]
    rows = log_ratios(batch)
    weights = [min(math.exp(d), 1.3) if d * d / 2 <= 0.3 else 0.0 for row in rows for _, d in row]
    reported = update_metrics("actor", UpdateReport(metrics, 1.0, 1.0, 1, 0, 0))
    assert reported["correction/weight_mean"] == pytest.approx(sum(weights) / len(weights))
    size = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
    assert reported["correction/effective_sample_size"] == pytest.approx(size)
    assert "correction/weight_square_mean" not in reported
    squares = [math.exp(2 * d) - 1 for row in rows for _, d in row]
    assert metrics["correction/chi2_token"] == pytest.approx(sum(squares) / len(squares))
    products = [math.exp(2 * sum(d for _, d in row)) - 1 for row in rows]
    assert metrics["correction/chi2_sequence"] == pytest.approx(sum(products) / len(products))


def test_the_docs_name_every_metric() -> None:
    batch, theta = near_batch(15), theta_of(15)
    metrics = whole(loss_of("ppo", correction=every_correction()[-1]), batch, theta, likely)[2]
    reported = update_metrics("actor", UpdateReport(metrics, 1.0, 1.0, 1, 0, 0))
    names = {name for name in reported if name.startswith("correction/")}
    for page in ("metrics.md", "algorithms/corrections.md"):
        text = (Path(__file__).parents[2] / "docs" / page).read_text()
        assert {line.split("`")[1] for line in text.splitlines() if line.startswith("| `correction/")} == names, page


def test_nothing_left_has_no_effective_sample() -> None:
    metrics = {"correction/weight_mean": 0.0, "correction/weight_square_mean": 0.0}
    assert update_metrics("actor", UpdateReport(metrics, 1.0, 1.0, 1, 0, 0))["correction/effective_sample_size"] == 0.0


def test_without_a_correction_nothing_is_said_of_it() -> None:
    metrics = whole(loss_of("ppo"), near_batch(1), theta_of(1), likely)[2]
    assert [name for name in metrics if name.startswith("correction/")] == []
    assert metrics["mismatch/num_tokens"] > 0


def test_without_old_logprobs_the_policy_is_the_trainer() -> None:
    """One update per batch: no pass for old log-probs, ratio 1, weight policy / sampler, no gradient through it."""
    batch, theta = near_batch(16), theta_of(16)
    batch.tokens["old_logprobs"] = logprobs_of(batch, theta)
    batch.tokens["rollout_logprobs"] = batch.tokens["old_logprobs"] + 0.3 * batch.tokens["ref_logprobs"]
    loss = loss_of("ppo", correction=Correction("sequence", rejections=read_rejections("seq_mean_k3", 0.05)))
    given_old = whole(loss, batch, theta, likely)
    del batch.tokens["old_logprobs"]
    found = whole(loss, batch, theta, likely)
    assert found[0] == pytest.approx(given_old[0]) and found[2] == pytest.approx(given_old[2])
    torch.testing.assert_close(found[1], given_old[1])


def test_bypass_takes_the_ratio_against_the_sampler() -> None:
    batch, theta = near_batch(17), theta_of(17)
    batch.tokens["rollout_logprobs"] = batch.tokens["rollout_logprobs"] - 0.1
    found = whole(loss_of("ppo", correction=Correction(bypass=True)), batch, theta, likely)
    mismatch = logprobs_of(batch, theta) - batch.tokens["rollout_logprobs"]
    batch.tokens["old_logprobs"] = batch.tokens["rollout_logprobs"]
    wanted = whole(loss_of("ppo"), batch, theta, likely)
    assert found[0] == wanted[0] and found[1].equal(wanted[1])
    kept = mismatch[batch.tokens["loss_mask"]]
    assert found[2]["mismatch/logprob_abs_diff_sum"] == pytest.approx(kept.abs().sum().item())


def test_bypass_and_weights_are_off_policy_reinforce() -> None:
    """gpg: -A logp, weighed by the policy of now against the sampler."""
    batch, theta = near_batch(18), theta_of(18)
    new = logprobs_of(batch, theta)
    batch.tokens["rollout_logprobs"] = new + 0.3 * torch.tanh(batch.tokens["ref_logprobs"] + 1.0)
    loss = loss_of("gpg", correction=Correction("token", Bounds(None, 1.1), bypass=True))
    mask, targets = batch.tokens["loss_mask"].tolist(), [int(t) for r in batch.responses for t in r]
    gradient = [0.0] * VOCABULARY
    for i, (n, s) in enumerate(zip(new.tolist(), batch.tokens["rollout_logprobs"].tolist(), strict=True)):
        if mask[i]:
            weight = min(math.exp(n - s), 1.1)
            gradient[targets[i]] -= weight * batch.tokens["advantages"][i].item() * n / sum(mask)
    assert whole(loss, batch, theta, likely)[1].tolist() == pytest.approx(gradient)


def test_tokens_that_the_sampler_was_not_asked_for_are_left_as_they_are() -> None:
    batch, theta = near_batch(19), theta_of(19)
    plain = whole(loss_of("ppo"), batch, theta, likely)
    batch.tokens["rollout_logprobs"][:] = math.nan
    for correction in every_correction():
        value, gradient, _ = whole(loss_of("ppo", correction=correction), batch, theta, likely)
        assert value == plain[0] and gradient.equal(plain[1])
    batch.tokens["old_logprobs"] = logprobs_of(batch, theta)
    wanted = whole(loss_of("ppo"), batch, theta, likely)
    found = whole(loss_of("ppo", correction=Correction(bypass=True)), batch, theta, likely)
    assert found[0] == wanted[0] and found[1].equal(wanted[1])


def test_a_correction_without_the_sampler_is_a_fault_of_ours() -> None:
    batch = near_batch(20)
    del batch.tokens["rollout_logprobs"]
    for correction in (Correction(level="token"), Correction(bypass=True)):
        with pytest.raises(AssertionError, match="needs the sampler"):
            whole(loss_of("ppo", correction=correction), batch, theta_of(20), likely)


# --- normalised over the batch --------------------------------------------------------------------------------------


def input_of(batch: Batch) -> BatchInput:
    tokens = batch.tokens
    return BatchInput(
        old=tokens["old_logprobs"],
        advantages=tokens["advantages"],
        mask=tokens["loss_mask"],
        lengths=torch.from_numpy(batch.lengths),
        sampler=tokens["rollout_logprobs"],
    )


@pytest.mark.parametrize("threshold", [1.3, "0.7_1.3"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_normalised_weights(level: str, threshold: Any) -> None:
    """Over their mean in the whole batch: of tokens, or of sequences that have any. Rejection comes after."""
    batch, theta = near_batch(21), theta_of(21)
    correction = Correction(level, weight_bounds(threshold), read_rejections("token_k2", 0.3), batch_normalize=True)
    loss = loss_of("ppo", correction=correction)
    assert loss.columns == ("rollout_weights",) and loss.needs_old_logprobs
    columns = driver_columns(loss, input_of(batch), seed=(0,))
    batch.tokens["rollout_weights"] = columns["rollout_weights"].double()
    weights = naive_weights(batch, level, truncated if threshold == 1.3 else icepop)
    rows = log_ratios(batch)
    means = [sum(weights[i] for i, _ in row) / len(row) for row in rows if row]
    mean = sum(weights.values()) / len(weights) if level == "token" else sum(means) / len(means)
    kept = {i: weights[i] / mean if d * d / 2 <= 0.3 else 0.0 for row in rows for i, d in row}
    wanted, slopes = weighted_loss("ppo", batch, theta, kept)
    value, gradient, _ = whole(loss, batch, theta, likely)
    assert value == pytest.approx(wanted, rel=1e-6)  # the column is float32
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-8)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.0, 3.0), level=st.sampled_from(["token", "sequence", "geometric"]))
def test_normalised_weights_have_mean_one(seed: int, scale: float, level: str) -> None:
    batch = near_batch(seed, scale)
    loss = loss_of("ppo", correction=Correction(level, batch_normalize=True))
    weights = driver_columns(loss, input_of(batch), seed=(0,))["rollout_weights"].double().tolist()
    rows = log_ratios(batch)
    per_sequence = [[weights[i] for i, _ in row] for row in rows if row]
    values = [w for row in per_sequence for w in row] if level == "token" else [row[0] for row in per_sequence]
    assert sum(values) / len(values) == pytest.approx(1.0, rel=1e-5)


def test_weights_that_are_all_zero_stay_so() -> None:
    batch = near_batch(22, spread=0.0)
    batch.tokens["rollout_logprobs"] = batch.tokens["old_logprobs"] - 5.0
    correction = Correction("token", Bounds(0.5, 2.0), batch_normalize=True)
    weights = driver_columns(loss_of("ppo", correction=correction), input_of(batch), seed=(0,))["rollout_weights"]
    assert weights[batch.tokens["loss_mask"]].eq(0.0).all()


def test_what_a_loss_needs() -> None:
    plain = loss_of("ppo")
    assert not plain.needs_old_logprobs and plain.uses_old_logprobs and not plain.needs_sampler
    bypass = replace(plain, correction=Correction(bypass=True))
    assert not bypass.uses_old_logprobs and not bypass.needs_old_logprobs and bypass.needs_sampler
    assert not loss_of("clip_cov", correction=Correction(bypass=True)).needs_old_logprobs
    assert loss_of("clip_cov").needs_old_logprobs and loss_of("kl_cov").needs_old_logprobs
    assert replace(plain, correction=Correction(level="token")).needs_sampler
    assert not replace(plain, correction=Correction(level="token")).needs_old_logprobs


# --- thresholds -----------------------------------------------------------------------------------------------------


def section(**changes: Any) -> RolloutCorrectionConfig:
    values: dict[str, Any] = {
        "rollout_is": None,
        "rollout_is_threshold": 2.0,
        "rollout_rs": None,
        "rollout_rs_threshold": None,
        "bypass_mode": False,
        "rollout_is_batch_normalize": False,
    }
    return RolloutCorrectionConfig(**(values | changes))


def test_the_section_is_read() -> None:
    assert read_correction(section()) == Correction() and not Correction().weighs
    read = read_correction(
        section(
            rollout_is="geometric",
            rollout_is_threshold="0.5_5",
            rollout_rs="token_k1,seq_max_k3",
            rollout_rs_threshold="4,0.1",
            rollout_is_batch_normalize=True,
        )
    )
    one, other = read.rejections
    assert (read.level, read.bounds, read.batch_normalize) == ("geometric", Bounds(0.5, 5.0), True)
    assert one == Rejection("token_k1", Bounds(math.log(0.25), math.log(4.0)))
    assert other == Rejection("seq_max_k3", Bounds(None, 0.1))
    assert [r.bounds.upper for r in read_rejections("token_k2,seq_sum_k3", 0.5)] == [0.5, 0.5]
    assert weight_bounds("2.5") == weight_bounds(2.5) == Bounds(None, 2.5)


IS, RS = "algorithm.rollout_correction.rollout_is_threshold", "algorithm.rollout_correction.rollout_rs"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_is_threshold": "many"}, f"{IS}=many: not a number; write 2.0"),
        ({"rollout_is_threshold": "1_2_3"}, f"{IS}=1_2_3: neither a number nor two"),
        ({"rollout_is_threshold": "5_0.5"}, f"{IS}=5_0.5: the lower bound must be within 0 and the upper"),
        ({"rollout_is_threshold": "-1_2"}, f"{IS}=-1_2: the lower bound must be within 0"),
        ({"rollout_is_threshold": 0.5}, f"{IS}=0.5: leaves out 1, the ratio where sampler and trainer agree"),
        ({"rollout_is_threshold": "1.5_2.0"}, f"{IS}=1.5_2.0: leaves out 1"),
        ({"rollout_is_threshold": "0.5_inf"}, f"{IS}=0.5_inf: not a number"),
        ({"rollout_rs": "token_k4", "rollout_rs_threshold": 1.0}, f"{RS}=token_k4: token_k4 is unknown; choose from"),
        ({"rollout_rs": "seq_max_k1", "rollout_rs_threshold": 1.0}, "seq_max_k1 is unknown"),
        ({"rollout_rs": "token_k1,", "rollout_rs_threshold": 1.0}, "an empty name is unknown"),
        ({"rollout_rs": "token_k2,token_k2", "rollout_rs_threshold": 1.0}, "names a statistic twice"),
        ({"rollout_rs": "token_k2"}, f"{RS}_threshold=null: {RS}=token_k2 needs it; set one number"),
        ({"rollout_rs_threshold": 1.0}, f"{RS}_threshold=1.0: rejects nothing without {RS}"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "1,2"}, "2 values for the 1 of"),
        ({"rollout_rs": "token_k1,token_k2,token_k3", "rollout_rs_threshold": "1,2"}, "2 values for the 3 of"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": 0.0}, "token_k2 is never below 0; set its upper bound"),
        ({"rollout_rs": "token_k2", "rollout_rs_threshold": "0.5_2.0"}, "not a number"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": "0_2.0"}, "a ratio is above 0; set the lower bound"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": 0.5}, "leaves out 1"),
        ({"rollout_rs": "token_k1", "rollout_rs_threshold": "2.0_0.5"}, "the lower bound must be within 0"),
    ],
)
def test_thresholds_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        read_correction(section(**changes))
    assert message in str(error.value)
