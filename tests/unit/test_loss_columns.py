"""The driver's columns for the policy loss: from references to tensors and back, and only where a loss wants them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from policy_world import loss_of
from test_samples import LENGTHS, make_samples, trajectory

from trainer import samples as module
from trainer.algorithms.losses import driver_columns
from trainer.algorithms.policy.base import BatchInput
from trainer.algorithms.thresholds import Correction
from trainer.assembly import wants_old_logprobs
from trainer.loss_columns import LossColumns
from trainer.samples import Samples
from workers.protocol import RolloutBlock, Scores

ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0, -0.5, 1.5, -3.0])
OLD = np.linspace(-0.1, -4.0, 9, dtype=np.float32)


@pytest.fixture(autouse=True)
def local_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """References are the objects themselves."""
    monkeypatch.setattr(module.ray, "get", lambda reference: reference)


def samples_with_logprobs() -> Samples:
    """As `make_samples`, but the first replica's sampler was asked: -1 for group 0, -2 for group 1."""
    first = [
        replace(trajectory(*pair), logprobs=(-1.0 - pair[0],) * LENGTHS[pair]) for pair in [(0, 0), (0, 1), (1, 0)]
    ]
    second = [trajectory(*pair) for pair in [(2, 1), (1, 1), (2, 0)]]
    blocks = [RolloutBlock.collate(first), RolloutBlock.collate(second)]
    zeros = Scores(np.zeros(3, dtype=np.float32), {}, ("",) * 3)
    return Samples.join("train-1", [], tuple(blocks), [b.meta for b in blocks], [zeros, zeros])


def test_the_samplers_logprobs_in_batch_order() -> None:
    found = samples_with_logprobs().fetch_sampler_logprobs()
    np.testing.assert_array_equal(found, np.array([-1, -1, -2, -2, -2, *[math.nan] * 4], dtype=np.float32))
    assert np.isnan(make_samples().fetch_sampler_logprobs()).all()


def test_chosen_tokens_travel_with_the_batch() -> None:
    samples = make_samples(masked=True)
    samples.put_column("old_logprobs", OLD)
    loss = loss_of("kl_cov", {"kl_cov_ratio": 0.4})
    LossColumns(loss, seed=3).compute(samples, ADVANTAGES, step=7)
    mask = samples.fetch_loss_mask()
    assert mask is not None and not mask.all()
    x = BatchInput(
        old=torch.from_numpy(OLD),
        advantages=ADVANTAGES,
        mask=torch.from_numpy(mask),
        lengths=torch.tensor([2, 0, 3, 1, 1, 2]),
    )
    wanted = driver_columns(loss, x, seed=(3, 7))["chosen_tokens"]
    assert samples.fetch_column("chosen_tokens").tolist() == wanted.tolist()
    assert 0 < wanted.sum() < len(wanted)


def test_normalised_weights_travel_with_the_batch() -> None:
    samples = samples_with_logprobs()
    samples.put_column("old_logprobs", np.full(9, -1.5, dtype=np.float32))
    correction = Correction("token", batch_normalize=True)
    LossColumns(loss_of("ppo", correction=correction), seed=3).compute(samples, ADVANTAGES, step=7)
    raw = np.minimum(np.exp(np.array([-0.5, -0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0])), 2.0)
    np.testing.assert_allclose(samples.fetch_column("rollout_weights"), raw / raw.mean(), rtol=1e-6)


def test_with_bypass_the_sampler_stands_for_the_old_policy() -> None:
    samples = samples_with_logprobs()
    loss = loss_of("kl_cov", {"kl_cov_ratio": 0.2}, correction=Correction(bypass=True))
    LossColumns(loss, seed=3).compute(samples, ADVANTAGES, step=7)
    # means over the five tokens that were asked for: 0.3 and -1.6, so the largest is -1.3 * -0.4
    assert samples.fetch_column("chosen_tokens").nonzero()[0].tolist() == [4]


def test_most_losses_want_nothing() -> None:
    samples = make_samples()  # without old log-probs: reading them would fail
    LossColumns(loss_of("ppo", correction=Correction(level="token")), seed=3).compute(samples, ADVANTAGES, step=7)
    assert not samples.columns


@pytest.mark.parametrize(
    ("name", "correction", "once", "often"),
    [
        ("ppo", Correction(), False, True),
        ("ppo", Correction(level="token"), False, True),
        ("ppo", Correction(bypass=True), False, False),
        ("clip_cov", Correction(), True, True),
        ("clip_cov", Correction(bypass=True), False, False),
        ("ppo", Correction("token", batch_normalize=True), True, True),
    ],
)
def test_when_old_logprobs_are_computed(name: str, correction: Correction, once: bool, often: bool) -> None:
    loss = loss_of(name, correction=correction)
    assert (wants_old_logprobs(loss, 1), wants_old_logprobs(loss, 2)) == (once, often)
