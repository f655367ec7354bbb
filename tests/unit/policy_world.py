"""Batches and losses for the tests of policy objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from loss_world import LENGTH, make_batch
from policy_formulas import BETA, HIGH, KL_COEF, LOW, C
from torch import Tensor

from trainer.algorithms.losses import PolicyLoss
from trainer.algorithms.policy.build import ClipRange, policy_objective
from workers.batch import Batch

CLIPS = ClipRange(LOW, HIGH, C)
LENGTHS = [3, 0, 5, 1, 8, 2, 4, 6, 7, 9]
GIVEN: Mapping[str, Mapping[str, Any]] = {"dro": {"dro_beta": BETA}, "kl_cov": {"ppo_kl_coef": KL_COEF}}


def likely(x: Tensor) -> Tensor:
    """A toy log-prob: below 0, and its own derivative."""
    return -0.5 * x.exp()


def logprobs_of(batch: Batch, theta: Tensor) -> Tensor:
    """What the toy model says of the response tokens, [R]."""
    targets = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *batch.responses]).astype(np.int64))
    return likely(batch.tokens["base"] + theta[targets])


def loss_of(name: str, params: Mapping[str, Any] | None = None, **changes: Any) -> PolicyLoss:
    """A policy loss without entropy and KL."""
    objective = policy_objective(name, GIVEN.get(name, {}) if params is None else params, CLIPS)
    plain = PolicyLoss(objective, "token-mean", 0.0, False, None, "k3", LENGTH)
    return replace(plain, **changes)


def policy_batch(
    seed: int, lengths: Sequence[int], dtype: torch.dtype = torch.float64, *, per_sequence: bool = False
) -> Batch:
    """Log-probs below 0, the sampler's of every token, and some tokens chosen. per_sequence: one advantage for each."""
    batch = make_batch(seed, lengths, dtype)
    rng = np.random.default_rng(seed + 1)
    total = sum(lengths)
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs"):
        batch.tokens[name] = likely(torch.from_numpy(rng.normal(size=total)).to(dtype))
    batch.tokens["chosen_tokens"] = torch.from_numpy((rng.random(total) < 0.3).astype(np.float32))
    if per_sequence:
        values = torch.from_numpy(rng.normal(size=len(lengths))).to(dtype)
        batch.tokens["advantages"] = torch.repeat_interleave(values, torch.tensor(lengths))
    return batch
