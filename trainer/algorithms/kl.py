"""KL divergence from samples, and the controller of its weight.

Estimators of KL(policy, reference) for tokens drawn from the policy, with r = reference / policy
(http://joschu.net/blog/kl-approx.html):

    k1, kl          -log r                  unbiased, high variance, may be negative
    abs             |log r|
    k2, mse         (log r)^2 / 2           biased, low variance
    k3, low_var_kl  r - 1 - log r           unbiased, low variance, never negative

In a loss the gradient counts, not the value, and only k2's is an unbiased estimate of the gradient of the KL (k1's is 0
on average). A name with `+` has the value of its estimator and the gradient of k2 (straight through).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.config.schema import KlCtrlConfig

LOG_RATIO_LIMIT = 20.0
K3_LIMIT = 10.0


def k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log policy - log reference, [R]."""
    return logprobs - reference


def absolute(logprobs: Tensor, reference: Tensor) -> Tensor:
    """|log policy - log reference|, [R]."""
    return (logprobs - reference).abs()


def k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Half the squared difference of the log-probs, [R]."""
    return 0.5 * (logprobs - reference).square()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """r - 1 - log r, [R]; log r is held within +-20 and the result below 10, where its gradient is 0.

    expm1 keeps the digits that `exp(x) - 1` loses where policy and reference are close.
    """
    log_ratio = (reference - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (torch.expm1(log_ratio) - log_ratio).clamp(-K3_LIMIT, K3_LIMIT)


ESTIMATORS = {"k1": k1, "kl": k1, "abs": absolute, "k2": k2, "mse": k2, "k3": k3, "low_var_kl": k3}
STRAIGHT_THROUGH = "+"


def estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Per-token KL(policy, reference) [R] of log-probs [R], differentiable in the first. ValueError: unknown kind."""
    base = kind.removesuffix(STRAIGHT_THROUGH)
    if base not in ESTIMATORS:
        names = ", ".join(ESTIMATORS)
        raise ValueError(f"KL estimator {kind!r} is unknown; choose one of {names}, or one of them with + at its end")
    value = ESTIMATORS[base](logprobs, reference)
    if base == kind:
        return value
    slope = (logprobs - reference).detach()
    return value.detach() + slope * (logprobs - logprobs.detach())


def reward_penalty(
    logprobs: Tensor, reference: Tensor, mask: Tensor, lengths: Tensor, *, kind: str, coef: float
) -> tuple[Tensor, float]:
    """What KL takes from the rewards: (token rewards -coef * KL [R], 0 where masked; mean KL).

    logprobs, reference: [R]. mask: [R] bool. lengths: [S] int64.
    The mean, which the controller follows, is over sequences of each one's token mean, as in verl; a sequence without
    tokens counts as 0.
    """
    divergence = torch.where(mask, estimate(logprobs, reference, kind), 0.0)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    zeros = torch.zeros(len(lengths), dtype=torch.float64)
    total = zeros.index_add(0, sequence, divergence.double())
    count = zeros.index_add(0, sequence, mask.double())
    mean = (total / count.clamp(min=1.0)).sum() / max(len(lengths), 1)
    return -coef * divergence, float(mean)


class KLController(Protocol):
    """Holds the weight of the KL penalty; part of the training state."""

    @property
    def coef(self) -> float:
        """Present weight."""

    def update(self, current_kl: float, num_sequences: int) -> None:
        """Called once per step with the mean KL of the step and the sequences it had."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues from `state_dict`."""


@dataclass(frozen=True, slots=True)
class FixedKL:
    """A constant weight. It has no state: after a resume the configuration's value holds."""

    coef: float

    def update(self, current_kl: float, num_sequences: int) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, float]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to do."""


@dataclass(slots=True)
class AdaptiveKL:
    """Moves the weight so that the KL goes to `target_kl` (https://arxiv.org/abs/1909.08593, section 2.2).

    error = clip(KL / target - 1, -0.2, 0.2);  coef <- coef * (1 + error * num_sequences / horizon)
    """

    coef: float
    target_kl: float
    horizon: float

    def update(self, current_kl: float, num_sequences: int) -> None:
        """Raises or lowers the weight by at most 20 % per `horizon` sequences."""
        error = min(max(current_kl / self.target_kl - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_sequences / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The weight."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes the weight; a run whose weight was fixed until now begins with its own."""
        self.coef = state.get("coef", self.coef)


def kl_controller(cfg: KlCtrlConfig) -> KLController:
    """The controller that algorithm.kl_ctrl asks for. ValueError: unknown type."""
    if cfg.type == "fixed":
        return FixedKL(cfg.kl_coef)
    if cfg.type == "adaptive":
        return AdaptiveKL(cfg.kl_coef, target_kl=cfg.target_kl, horizon=cfg.horizon)
    raise ValueError(f"algorithm.kl_ctrl.type={cfg.type!r} is unknown; choose fixed or adaptive")
