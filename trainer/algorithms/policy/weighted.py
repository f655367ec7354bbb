"""Objectives that weigh log-probs without clipping the ratio: SAPO, GPG, DRO and TOPR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from trainer.algorithms.policy.base import (
    PARAMS,
    Objective,
    ObjectiveInput,
    PolicyObjective,
    check_number,
    sequence_sum,
    unclipped,
)


@dataclass(frozen=True, slots=True)
class Sapo(PolicyObjective):
    """Soft adaptive policy optimization (https://arxiv.org/abs/2511.20347).

    -A (4 / tau) sigmoid(tau (r - 1)), tau = tau_pos where A > 0, else tau_neg. The gate's slope at r = 1 is 1.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    agg_mode: ClassVar[str | None] = "seq-mean-token-mean"

    def __post_init__(self) -> None:
        check_number("tau_pos", self.tau_pos, above=0.0)
        check_number("tau_neg", self.tau_neg, above=0.0)

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        tau = torch.full_like(x.log_ratio, self.tau_neg).masked_fill(x.advantages > 0, self.tau_pos)
        gate = torch.sigmoid(tau * (x.log_ratio.exp() - 1.0)) * (4.0 / tau)
        return unclipped(-x.advantages * gate)


@dataclass(frozen=True, slots=True)
class Gpg(PolicyObjective):
    """-A logp, whatever sampled the token (https://arxiv.org/abs/2504.02546); `old` is not used."""

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        return unclipped(-x.advantages * x.logprobs)


@dataclass(frozen=True, slots=True)
class Dro(PolicyObjective):
    """-(logp A - beta / 2 (log r)^2), per token (after https://arxiv.org/abs/2405.19107).

    Where |log r| exceeds 20 the square stands still and its gradient stays that of 20: the token is still pulled back.
    """

    dro_beta: float | None = None

    def __post_init__(self) -> None:
        if self.dro_beta is None:
            raise ValueError(f"{PARAMS}.dro_beta=null: loss_mode=dro needs the weight of its penalty; set it, e.g. 0.1")
        check_number("dro_beta", self.dro_beta, above=0.0)

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        assert self.dro_beta is not None
        distance = x.log_ratio.detach()
        penalty = 0.5 * distance.square() + distance * (x.logprobs - x.logprobs.detach())
        return unclipped(-x.advantages * x.logprobs + self.dro_beta * penalty)


@dataclass(frozen=True, slots=True)
class Topr(PolicyObjective):
    """Tapered off-policy REINFORCE (https://arxiv.org/abs/2503.14286).

    -sg(w) A logp, with w = 1 where A >= 0, else the ratio of the whole sequence, policy / old, held within [0, 1].
    """

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        log_w = sequence_sum(x.log_ratio.detach(), x)[x.sequence]
        negative = x.advantages < 0
        weight = torch.where(negative, log_w.clamp(max=0.0).exp(), 1.0)
        never = torch.zeros_like(x.mask)
        return Objective(-weight * x.advantages * x.logprobs, clipped=negative & (log_w > 0), clipped_lower=never)
