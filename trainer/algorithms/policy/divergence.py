"""DPPO: a trust region by the divergence of the token's binary event (this token or any other), not by the ratio.

https://arxiv.org/abs/2602.04879. p and q are the probabilities of the token under policy and old:

    TV = |p - q|;    KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p))

A token whose update would move it further out, up for A > 0 and down for A < 0, has no gradient once it is further
away than clip_high (up) or clip_low (down). The others have the truncated importance weight min(r, clip_c).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.algorithms.policy.base import (
    Objective,
    ObjectiveInput,
    PolicyObjective,
    check_clip_c,
    check_clip_range,
)

EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Dppo(PolicyObjective):
    """-sg(min(r, clip_c)) A logp inside the trust region, 0 outside. clip_low, clip_high: divergences."""

    clip_low: float
    clip_high: float
    clip_c: float

    def __post_init__(self) -> None:
        check_clip_range(self.clip_low, self.clip_high)
        check_clip_c(self.clip_c)

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        ratio = x.log_ratio.detach().exp()
        inside = self._inside(x.logprobs.detach(), x.old, x.advantages > 0)
        loss = -ratio.clamp(max=self.clip_c) * x.advantages * x.logprobs
        return Objective(torch.where(inside, loss, 0.0), clipped=~inside, clipped_lower=inside & (ratio > self.clip_c))

    def _inside(self, logprobs: Tensor, old: Tensor, up: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class DppoTv(Dppo):
    """By total variation (loss_mode dppo_tv)."""

    def _inside(self, logprobs: Tensor, old: Tensor, up: Tensor) -> Tensor:
        moved = logprobs.exp() - old.exp()
        return torch.where(up, moved <= self.clip_high, moved >= -self.clip_low)


@dataclass(frozen=True, slots=True)
class DppoKl(Dppo):
    """By KL divergence (loss_mode dppo_kl)."""

    def _inside(self, logprobs: Tensor, old: Tensor, up: Tensor) -> Tensor:
        divergence = binary_kl(old, logprobs)
        return torch.where(
            up,
            (divergence <= self.clip_high) | (logprobs <= old),
            (divergence <= self.clip_low) | (logprobs >= old),
        )


def binary_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q, p) of the events with these log-probs, [R], nats; 1e-8 is added to what is left for other tokens."""
    q = log_q.exp()
    event = torch.where(q > 0.0, q * (log_q - log_p), 0.0)
    rest_q, rest_p = ((-torch.expm1(log)).clamp(min=0.0) for log in (log_q, log_p))
    return event + rest_q * ((rest_q + EPSILON).log() - (rest_p + EPSILON).log())
