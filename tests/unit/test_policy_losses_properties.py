"""What every policy loss must be, whatever its formula: independent of the split, the order and padding; finite."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_world import INPUTS, VOCABULARY, accumulate, norm_of, splits, theta_of, whole
from policy_world import LENGTHS, likely, loss_of, policy_batch

from trainer.algorithms.aggregation import AGGREGATION_MODES
from trainer.algorithms.losses import PolicyLoss
from trainer.algorithms.policy.build import OBJECTIVES
from trainer.algorithms.thresholds import Bounds, Correction, Rejection
from workers.batch import Batch

COLUMNS = (*INPUTS, "chosen_tokens", "entropy", "rollout_weights")
CORRECTIONS = (
    Correction(),
    Correction(level="token", bounds=Bounds(None, 1.1)),
    Correction(level="sequence", bounds=Bounds(0.5, 1.5), rejections=(Rejection("seq_mean_k3", Bounds(None, 0.1)),)),
    Correction(
        level="geometric",
        rejections=(Rejection("token_k1", Bounds(-0.5, 0.5)), Rejection("seq_max_k2", Bounds(None, 0.5))),
    ),
    Correction(level="token", batch_normalize=True),
    Correction(bypass=True, rejections=(Rejection("seq_sum_k2", Bounds(None, 0.5)),)),
)


def batch_of(seed: int, lengths: list[int], dtype: torch.dtype = torch.float64, *, near: bool = False) -> Batch:
    """With the column of a normalised correction. near: the sampler is close to the old policy."""
    batch = policy_batch(seed, lengths, dtype)
    batch.tokens["rollout_weights"] = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)).to(dtype)
    if near:
        batch.tokens["rollout_logprobs"] = batch.tokens["old_logprobs"] + 0.3 * batch.tokens["ref_logprobs"]
    return batch


@settings(deadline=None, max_examples=120)
@given(
    split=splits(),
    name=st.sampled_from(sorted(OBJECTIVES)),
    mode=st.sampled_from(AGGREGATION_MODES),
    correction=st.sampled_from(CORRECTIONS),
)
def test_any_split_in_any_order_gives_the_same(
    split: tuple[int, list[int], list[list[int]]], name: str, mode: str, correction: Correction
) -> None:
    """Parts are micro-batches of one rank or the shares of several: their gradients are summed all the same."""
    seed, lengths, parts = split
    loss = loss_of(name, agg_mode=mode, correction=correction, kl_loss_coef=0.1, kl_loss_type="k3+")
    batch, theta = batch_of(seed, lengths, near=True), theta_of(seed)
    value, gradient, metrics = whole(loss, batch, theta, likely)
    value_split, gradient_split, metrics_split = accumulate(loss, batch, theta, parts, likely)
    assert value_split == pytest.approx(value, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(gradient_split, gradient, rtol=1e-9, atol=1e-12)
    assert metrics_split == pytest.approx(metrics, rel=1e-5, abs=1e-9)  # shares of tokens are float32


def padded(batch: Batch, extra: list[int], filler: float) -> Batch:
    """The batch with masked tokens at the end of each sequence that hold `filler` in every column."""
    starts = np.concatenate([[0], np.cumsum(batch.lengths)])
    places, more = [], []
    for row, (first, last) in enumerate(pairwise(starts)):
        places += [*range(first, last), *[-1] * extra[row]]
        more.append(np.concatenate([batch.responses[row], np.zeros(extra[row], dtype=np.int32)]))
    index = torch.tensor(places, dtype=torch.int64)
    tokens = batch.tokens[index.clamp(min=0)].clone() if batch.num_tokens else batch.tokens.new_zeros([len(places)])
    pad = index < 0
    tokens["loss_mask"][pad] = False
    for name in COLUMNS:
        if name != "base":  # the model's own numbers stay finite
            tokens[name][pad] = filler
    return Batch(batch.prompts, more, batch.group, tokens)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    extra=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    filler=st.sampled_from([math.nan, math.inf, 0.0, 1e30]),
    name=st.sampled_from(sorted(OBJECTIVES)),
    correction=st.sampled_from(CORRECTIONS),
)
def test_padding_changes_nothing(
    seed: int, lengths: list[int], extra: list[int], filler: float, name: str, correction: Correction
) -> None:
    batch, theta = batch_of(seed, lengths, near=True), theta_of(seed)
    loss = loss_of(name, agg_mode="seq-mean-token-mean", correction=correction)
    value, gradient, metrics = whole(loss, batch, theta, likely)
    again, gradient_padded, metrics_padded = whole(loss, padded(batch, extra, filler), theta, likely)
    assert again == pytest.approx(value, rel=1e-12, abs=1e-15)
    torch.testing.assert_close(gradient_padded, gradient, rtol=1e-10, atol=1e-14)
    assert metrics_padded == pytest.approx(metrics, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=range(len(CORRECTIONS)))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_tokens_do_not_reach_the_gradient(name: str, correction: Correction) -> None:
    batch, theta = batch_of(4, LENGTHS, near=True), theta_of(4)
    loss = loss_of(name, correction=correction)
    before = whole(loss, batch, theta)
    for column in COLUMNS:
        batch.tokens[column][~batch.tokens["loss_mask"]] = math.nan
    after = whole(loss, batch, theta)
    assert after[0] == before[0] and after[2] == before[2]
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


def spoiled(kind: str) -> tuple[Batch, torch.Tensor]:
    """float32, as in training, with something in it that ought not to be."""
    batch, theta = batch_of(3, LENGTHS, torch.float32), theta_of(3, torch.float32)
    mask = batch.tokens["loss_mask"]
    first = int(torch.nonzero(mask)[0])
    if kind in ("far up", "far down"):
        batch.tokens["old_logprobs"] = batch.tokens["old_logprobs"] + (-1e3 if kind == "far up" else 1e3)
    elif kind == "far from the sampler":
        batch.tokens["rollout_logprobs"] = batch.tokens["rollout_logprobs"] - 1e3
    elif kind == "advantage":
        batch.tokens["advantages"] = batch.tokens["advantages"].sign() * 1e30
        batch.tokens["old_logprobs"] = batch.tokens["old_logprobs"].clamp(min=-9.0)
    elif kind == "old impossible":
        batch.tokens["old_logprobs"][first] = -math.inf
    elif kind == "sampler impossible":
        batch.tokens["rollout_logprobs"][first] = -math.inf
    elif kind == "both impossible":
        batch.tokens["old_logprobs"][first] = batch.tokens["rollout_logprobs"][first] = -math.inf
    else:
        assert kind == "not asked"
        batch.tokens["rollout_logprobs"][:] = math.nan
    return batch, theta


KINDS = (
    *("far up", "far down", "far from the sampler", "advantage", "old impossible", "sampler impossible"),
    *("both impossible", "not asked"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_inputs_are_finite(name: str, kind: str) -> None:
    batch, theta = spoiled(kind)
    for correction in CORRECTIONS:
        for mode in ("token-mean", "seq-mean-token-sum"):
            loss = loss_of(name, agg_mode=mode, correction=correction)
            value, gradient, metrics = whole(loss, batch, theta, likely)
            assert math.isfinite(value) and gradient.isfinite().all(), (correction, mode)
            assert [n for n, m in metrics.items() if not math.isfinite(m)] == [], (correction, mode)


@pytest.mark.parametrize("lengths", [[4, 2], [0, 0], []], ids=["masked", "no tokens", "no sequences"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_learn_from(name: str, lengths: list[int]) -> None:
    batch = batch_of(3, lengths)
    batch.tokens["loss_mask"] = torch.zeros(sum(lengths), dtype=torch.bool)
    for column in COLUMNS:
        batch.tokens[column] = torch.full((sum(lengths),), math.nan, dtype=torch.float64)
    for correction in CORRECTIONS:
        for mode in AGGREGATION_MODES:
            value, gradient, metrics = whole(loss_of(name, agg_mode=mode, correction=correction), batch, theta_of(3))
            assert value == 0.0 and gradient.eq(0.0).all()
            assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_far_token_is_pulled_back_or_left_alone(name: str) -> None:
    """However far the ratio: a token with a good advantage is never pushed down by the objective itself."""
    batch, theta = policy_batch(8, [4, 4]), theta_of(8)
    batch.tokens["advantages"] = torch.ones(8, dtype=torch.float64)
    batch.tokens["loss_mask"] = torch.ones(8, dtype=torch.bool)
    batch.tokens["old_logprobs"] = torch.full((8,), -500.0, dtype=torch.float64)
    gradient = whole(loss_of(name), batch, theta, lambda x: x)[1]
    if name == "dro":
        assert (gradient >= 0.0).all() and gradient.sum().item() == pytest.approx(-1.0 + 0.3 * 20.0)
    elif name not in ("kl_cov",):
        assert (gradient <= 0.0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_waits_for_the_device(name: str) -> None:
    """On a device without data whatever reads a number, or makes a tensor elsewhere, fails."""
    batch, device = batch_of(3, LENGTHS), torch.device("meta")
    micro = batch.micro_batch(range(len(batch)), norm_of(batch), share_prompt=True, device=device)
    entropy = torch.zeros(batch.num_tokens, device=device)
    for correction in CORRECTIONS:
        for mode in AGGREGATION_MODES:
            logprobs = torch.zeros(batch.num_tokens, device=device, requires_grad=True)
            loss = loss_of(name, agg_mode=mode, correction=correction, kl_loss_coef=0.1, entropy_coeff=0.1)
            value, metrics = loss(logprobs, entropy, micro)
            value.backward()
            assert logprobs.grad is not None
            assert {metric.device.type for metric in metrics.values()} == {"meta"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_travel(name: str) -> None:
    loss: PolicyLoss = loss_of(name, correction=CORRECTIONS[2])
    copy: Any = pickle.loads(pickle.dumps(loss))
    assert copy == loss != replace(loss, length=loss.length + 1)
    batch, theta = batch_of(3, LENGTHS), theta_of(3)
    assert whole(copy, batch, theta, likely)[0] == whole(loss, batch, theta, likely)[0]


def test_every_token_of_the_toy_model_is_seen() -> None:
    """Else equal gradients above would mean little."""
    for name in OBJECTIVES:
        gradient = whole(loss_of(name), batch_of(3, LENGTHS), theta_of(3), likely)[1]
        assert int(gradient.ne(0.0).sum()) >= VOCABULARY - 2, name
