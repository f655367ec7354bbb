"""Clip-Cov and KL-Cov: the few tokens that would cost most entropy are held back (https://arxiv.org/abs/2505.22617).

The covariance of a token is (A - mean A) (log old - mean log old), with means over the batch of the step. Which tokens
are held back is chosen on the driver over the whole batch, by a seeded draw or a stable order, and arrives as the
column `chosen_tokens`: neither micro-batches nor ranks change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from trainer.algorithms.policy.base import (
    PARAMS,
    BatchInput,
    Objective,
    ObjectiveInput,
    PolicyObjective,
    check_clip_range,
    check_number,
)
from trainer.algorithms.policy.clipped import clip_pair

CHOSEN = "chosen_tokens"
LOGPROB_FLOOR = -1e3
"""An impossible token (log-prob -inf) counts as this unlikely: the mean stays finite."""


@dataclass(frozen=True, slots=True)
class ClipCov(PolicyObjective):
    """PPO's clipped loss (without dual clip), and no gradient for the chosen tokens.

    clip_cov_ratio: share of all tokens that is chosen, at least one token; at random among those whose covariance is
    within (clip_cov_lb, clip_cov_ub).
    """

    clip_low: float
    clip_high: float
    clip_cov_ratio: float = 2e-4
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    columns: ClassVar[tuple[str, ...]] = (CHOSEN,)

    def __post_init__(self) -> None:
        check_clip_range(self.clip_low, self.clip_high)
        _check_share("clip_cov_ratio", self.clip_cov_ratio)
        low, high = check_number("clip_cov_lb", self.clip_cov_lb), check_number("clip_cov_ub", self.clip_cov_ub)
        if low >= high:
            raise ValueError(f"{PARAMS}.clip_cov_lb={low}: not below clip_cov_ub={high}; exchange them, or widen them")

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        plain, bounded = clip_pair(x.log_ratio.exp(), x.advantages, self.clip_low, self.clip_high)
        chosen = _chosen(x)
        loss = torch.where(chosen, 0.0, torch.maximum(plain, bounded))
        return Objective(loss, clipped=(bounded > plain) | chosen, clipped_lower=chosen)

    def driver_columns(self, x: BatchInput, seed: tuple[int, ...]) -> dict[str, Tensor]:
        """Which tokens lose their gradient, 0 or 1."""
        covariance = covariances(x.old, x.advantages, x.mask)
        within = x.mask & (covariance > self.clip_cov_lb) & (covariance < self.clip_cov_ub)
        candidates = torch.nonzero(within).squeeze(1)
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(candidates)))
        return {CHOSEN: _column(candidates[order[: _count(x.mask, self.clip_cov_ratio)]], x.mask)}


@dataclass(frozen=True, slots=True)
class KlCov(PolicyObjective):
    """-A r, and ppo_kl_coef |log r| on top for the chosen tokens.

    kl_cov_ratio: share of all tokens that is chosen, at least one token: those of the largest covariance.
    """

    kl_cov_ratio: float = 2e-4
    ppo_kl_coef: float = 0.1
    columns: ClassVar[tuple[str, ...]] = (CHOSEN,)

    def __post_init__(self) -> None:
        _check_share("kl_cov_ratio", self.kl_cov_ratio)
        check_number("ppo_kl_coef", self.ppo_kl_coef, at_least=0.0)

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        chosen = _chosen(x)
        plain = -x.advantages * x.log_ratio.exp()
        loss = plain + torch.where(chosen, self.ppo_kl_coef * x.log_ratio.abs(), 0.0)
        return Objective(loss, clipped=torch.zeros_like(chosen), clipped_lower=chosen)

    def driver_columns(self, x: BatchInput, seed: tuple[int, ...]) -> dict[str, Tensor]:
        """Which tokens are penalised, 0 or 1."""
        covariance = covariances(x.old, x.advantages, x.mask).masked_fill(~x.mask, -torch.inf)
        order = torch.argsort(covariance, descending=True, stable=True)
        count = _count(x.mask, self.kl_cov_ratio) if bool(x.mask.any()) else 0
        return {CHOSEN: _column(order[:count], x.mask)}


def covariances(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Product of both deviations from their mean over masked-in tokens, [R] float64; 0 where masked or NaN."""
    mask = mask & ~logprobs.isnan()
    count = mask.sum().clamp(min=1)
    floored = logprobs.clamp(min=LOGPROB_FLOOR)
    parts = [torch.where(mask, values, 0.0).double() for values in (advantages, floored)]
    first, second = (torch.where(mask, values - values.sum() / count, 0.0) for values in parts)
    return first * second


def _count(mask: Tensor, share: float) -> int:
    return max(int(share * int(mask.sum())), 1)


def _column(places: Tensor, mask: Tensor) -> Tensor:
    column = torch.zeros(len(mask), dtype=torch.float32)
    column[places] = 1.0
    return column


def _chosen(x: ObjectiveInput) -> Tensor:
    assert CHOSEN in x.columns, f"the driver made no column {CHOSEN!r}"
    return x.mask & (x.columns[CHOSEN] > 0.5)


def _check_share(name: str, value: object) -> None:
    if check_number(name, value, above=0.0) > 1.0:
        raise ValueError(f"{PARAMS}.{name}={value}: a share of the tokens; set it to at most 1")
