"""Objectives that bound the ratio: PPO, GSPO, CISPO and GMPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trainer.algorithms.policy.base import (
    Objective,
    ObjectiveInput,
    PolicyObjective,
    check_clip_c,
    check_clip_range,
    sequence_mean,
)

SEQUENCE_LOG_RATIO_LIMIT = 10.0
"""GSPO's ratio of a sequence, a geometric mean over its tokens, stays below exp of this."""


@dataclass(frozen=True, slots=True)
class Ppo(PolicyObjective):
    """Dual-clip PPO, per token; r = policy / old, c = clip_c.

    max(-A r, -A clip(r, 1 - low, 1 + high))      https://arxiv.org/abs/1707.06347, equation 7
    for A < 0 never above -A c                    https://arxiv.org/abs/1912.09729, equation 5
    """

    clip_low: float
    clip_high: float
    clip_c: float

    def __post_init__(self) -> None:
        check_clip_range(self.clip_low, self.clip_high)
        check_clip_c(self.clip_c)

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        plain, bounded = clip_pair(x.log_ratio.exp(), x.advantages, self.clip_low, self.clip_high)
        upper = torch.maximum(plain, bounded)
        floor = -x.advantages * self.clip_c
        negative = x.advantages < 0
        return Objective(
            loss=torch.where(negative, torch.minimum(upper, floor), upper),
            clipped=bounded > plain,
            clipped_lower=negative & (upper > floor),
        )


@dataclass(frozen=True, slots=True)
class Gspo(PolicyObjective):
    """Group sequence policy optimization (https://arxiv.org/abs/2507.18071, equations 5, 7 and 14).

    s = exp(mean over the sequence of log r), in the token form whose gradient is s * d logp of each token;
    max(-A s, -A clip(s, 1 - low, 1 + high)), averaged over tokens, then over sequences.
    """

    clip_low: float
    clip_high: float
    agg_mode: ClassVar[str | None] = "seq-mean-token-mean"

    def __post_init__(self) -> None:
        check_clip_range(self.clip_low, self.clip_high)

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        log_s = sequence_mean(x.log_ratio.detach(), x)[x.sequence]
        ratio = (log_s + x.logprobs - x.logprobs.detach()).clamp(max=SEQUENCE_LOG_RATIO_LIMIT).exp()
        plain, bounded = clip_pair(ratio, x.advantages, self.clip_low, self.clip_high)
        never = torch.zeros_like(x.mask)
        return Objective(torch.maximum(plain, bounded), clipped=bounded > plain, clipped_lower=never)


@dataclass(frozen=True, slots=True)
class Cispo(PolicyObjective):
    """-sg(clip(r, 1 - low, 1 + high)) A logp: the weight is bounded, every token keeps its gradient.

    https://arxiv.org/abs/2506.13585, equations 4 and 5.
    """

    clip_low: float
    clip_high: float

    def __post_init__(self) -> None:
        check_clip_range(self.clip_low, self.clip_high)

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        ratio = x.log_ratio.detach().exp()
        weight = ratio.clamp(1.0 - self.clip_low, 1.0 + self.clip_high)
        never = torch.zeros_like(x.mask)
        return Objective(-weight * x.advantages * x.logprobs, clipped=ratio != weight, clipped_lower=never)


@dataclass(frozen=True, slots=True)
class Gmpo(PolicyObjective):
    """Geometric-mean policy optimization (https://arxiv.org/abs/2507.20673).

    -A exp(mean over the sequence of l), l = log r where sign(A) log r is below the bound of its side, else that bound,
    -low or high (in log space); A is the mean advantage of the sequence. Written per token, each with the value of its
    sequence and its own part of the gradient, so that a weight per token weighs that token alone.
    """

    clip_low: float
    clip_high: float
    agg_mode: ClassVar[str | None] = "seq-mean-token-mean"

    def __post_init__(self) -> None:
        check_clip_range(self.clip_low, self.clip_high)

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        advantage = sequence_mean(x.advantages, x)[x.sequence]
        bounded = x.log_ratio.clamp(-self.clip_low, self.clip_high)
        held = torch.where(advantage > 0, x.log_ratio > bounded, x.log_ratio < bounded) & (advantage != 0)
        log_ratio = torch.where(held, bounded, x.log_ratio)
        log_s = sequence_mean(log_ratio.detach(), x)[x.sequence]
        loss = -advantage * (log_s + log_ratio - log_ratio.detach()).exp()
        return Objective(loss, clipped=held, clipped_lower=torch.zeros_like(x.mask))


def clip_pair(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-A r and -A clip(r, 1 - low, 1 + high), [R]."""
    return -advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high)
