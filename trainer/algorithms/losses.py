"""Losses, one plain function per role, the same for every training engine.

An engine calls `loss(predictions [R], entropy [R] | None, micro) -> (scalar, metrics)` for each micro-batch, where R
counts its response tokens, and adds up the gradients. Every result is divided by counts of the whole mini-batch, so
sums over micro-batches and ranks are the mini-batch's means; metrics whose name ends in `_max` or `_min` are reduced by
max or min. Metrics are detached 0-d tensors on the device: nothing here waits for it.

The losses are frozen dataclasses, not closures, because they travel to the training workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.algorithms import kl
from trainer.algorithms.aggregation import token_mean, token_weights, weighted_sum
from workers.batch import MicroBatch

if TYPE_CHECKING:
    from trainer.config.schema import ActorConfig, CriticConfig

LOG_RATIO_LIMIT = 20.0
"""The log of the ratio is held within +- this, so that one wild token cannot overflow the step."""

Metrics = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ClippedObjective:
    """PPO's loss per token and which bound was active, all [R]."""

    loss: Tensor
    clipped: Tensor
    clipped_lower: Tensor


def clipped_objective(
    log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, clip_c: float
) -> ClippedObjective:
    """Dual-clip PPO, per token.

    max(-A r, -A clip(r, 1 - low, 1 + high))      https://arxiv.org/abs/1707.06347, equation 7
    for A < 0 never above -A c                    https://arxiv.org/abs/1912.09729, equation 5

    log_ratio: [R], log of r = new / old probability. advantages: [R]. clip_c: c > 1.
    """
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    upper = torch.maximum(plain, bounded)
    floor = -advantages * clip_c
    negative = advantages < 0
    return ClippedObjective(
        loss=torch.where(negative, torch.minimum(upper, floor), upper),
        clipped=bounded > plain,
        clipped_lower=negative & (upper > floor),
    )


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """PPO's clipped objective - entropy_coeff * entropy + kl_loss_coef * KL(policy, reference).

    Reads from `micro.tokens`: loss_mask, advantages; old_logprobs (absent: the policy itself, whose ratio is 1);
    ref_logprobs where kl_loss_coef is set; rollout_logprobs where the sampler was asked (NaN: not for this token).

    kl_loss_coef: None: no KL in the loss, and no reference is needed.
    length: tokens, what seq-mean-token-sum-norm divides by; the driver puts it into `Normalizers`.
    """

    clip_low: float
    clip_high: float
    clip_c: float
    agg_mode: str
    entropy_coeff: float
    calculate_entropy: bool
    kl_loss_coef: float | None
    kl_loss_type: str
    length: float

    @property
    def needs_entropy(self) -> bool:
        """Whether the engine has to compute the entropy."""
        return self.entropy_coeff != 0.0 or self.calculate_entropy

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_logprobs` must be there."""
        return self.kl_loss_coef is not None

    def __call__(self, logprobs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of one micro-batch. logprobs: [R] with gradient; entropy: [R] in nats, or None."""
        mask = _column(micro, "loss_mask")
        logprobs = torch.where(mask, logprobs, 0.0)
        old = _column_or(micro, "old_logprobs", logprobs.detach())
        log_ratio = (logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        objective = clipped_objective(
            log_ratio,
            _column(micro, "advantages"),
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            clip_c=self.clip_c,
        )
        weights = _weights(micro, mask, self.agg_mode, logprobs.dtype)
        pg_loss = weighted_sum(objective.loss, mask, weights)
        metrics = {"actor/pg_loss": pg_loss.detach(), **_ratio_metrics(log_ratio.detach(), objective, mask, micro)}
        loss = self._add_entropy(pg_loss, entropy, mask, weights, micro, metrics)
        loss = self._add_kl(loss, logprobs, mask, weights, micro, metrics)
        metrics["actor/loss"] = loss.detach()
        if "rollout_logprobs" in micro.tokens.keys():  # noqa: SIM118 (a TensorDict is not a dict)
            metrics |= mismatch_metrics(_column(micro, "rollout_logprobs"), old, mask)
        return loss, metrics

    def _add_entropy(
        self, loss: Tensor, entropy: Tensor | None, mask: Tensor, weights: Tensor, micro: MicroBatch, metrics: Metrics
    ) -> Tensor:
        """The metric is the mean over tokens in nats, whatever the aggregation mode."""
        assert entropy is not None or self.entropy_coeff == 0.0, "the engine left out the entropy that the loss needs"
        if entropy is None:
            return loss
        metrics["actor/entropy"] = token_mean(entropy.detach(), mask, micro.norm)
        if self.entropy_coeff == 0.0:
            return loss
        return loss - self.entropy_coeff * weighted_sum(entropy, mask, weights)

    def _add_kl(
        self, loss: Tensor, logprobs: Tensor, mask: Tensor, weights: Tensor, micro: MicroBatch, metrics: Metrics
    ) -> Tensor:
        if self.kl_loss_coef is None:
            return loss
        divergence = kl.estimate(logprobs, _column(micro, "ref_logprobs"), self.kl_loss_type)
        kl_loss = weighted_sum(divergence, mask, weights)
        metrics["actor/kl_loss"] = kl_loss.detach()
        return loss + self.kl_loss_coef * kl_loss


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """Half the squared error of the critic, where a prediction that moved by more than `clip` gains nothing.

    max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2, after https://arxiv.org/abs/1707.06347's published code.
    Reads from `micro.tokens`: loss_mask, values (V_old), returns (R).
    """

    clip: float
    agg_mode: str
    length: float

    @property
    def needs_entropy(self) -> bool:
        """Never."""
        return False

    def __call__(self, values: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of one micro-batch. values: [R] with gradient; entropy: None."""
        mask = _column(micro, "loss_mask")
        values = torch.where(mask, values, 0.0)
        old, returns = _column(micro, "values"), _column(micro, "returns")
        near = torch.clamp(values, old - self.clip, old + self.clip)
        error, near_error = (values - returns).square(), (near - returns).square()
        weights = _weights(micro, mask, self.agg_mode, values.dtype)
        loss = 0.5 * weighted_sum(torch.maximum(error, near_error), mask, weights)
        return loss, {
            "critic/value_loss": loss.detach(),
            "critic/clip_frac": token_mean(near_error.detach() > error.detach(), mask, micro.norm),
            "critic/value_mean": token_mean(values.detach(), mask, micro.norm),
        }


def policy_loss(cfg: ActorConfig, max_response_length: int) -> PolicyLoss:
    """The actor's loss as actor_rollout_ref.actor asks for it; max_response_length in tokens."""
    return PolicyLoss(
        clip_low=cfg.clip_ratio_low,
        clip_high=cfg.clip_ratio_high,
        clip_c=cfg.clip_ratio_c,
        agg_mode=cfg.loss_agg_mode,
        entropy_coeff=cfg.entropy_coeff,
        calculate_entropy=cfg.calculate_entropy,
        kl_loss_coef=cfg.kl_loss_coef if cfg.use_kl_loss else None,
        kl_loss_type=cfg.kl_loss_type,
        length=float(max_response_length if cfg.loss_scale_factor is None else cfg.loss_scale_factor),
    )


def value_loss(cfg: CriticConfig, max_response_length: int) -> ValueLoss:
    """The critic's loss as critic asks for it; max_response_length in tokens."""
    return ValueLoss(clip=cfg.cliprange_value, agg_mode=cfg.loss_agg_mode, length=float(max_response_length))


def mismatch_metrics(sampler: Tensor, trainer: Tensor, mask: Tensor) -> Metrics:
    """How far the sampler's log-probs [R] (NaN: not asked) are from the trainer's [R], as sums and a count.

    mismatch/kl_sum is the k3 estimate of KL(sampler, trainer); divide the sums by mismatch/num_tokens.
    """
    with torch.no_grad():
        asked = mask & ~torch.isnan(sampler)
        sampler = torch.where(asked, sampler, trainer)
        distance = torch.where(asked, (trainer - sampler).abs(), 0.0)
        divergence = torch.where(asked, kl.k3(sampler, trainer), 0.0)
        return {
            "mismatch/logprob_abs_diff_sum": distance.sum(),
            "mismatch/logprob_abs_diff_max": _max(distance, identity=0.0),
            "mismatch/kl_sum": divergence.sum(),
            "mismatch/num_tokens": asked.sum().to(distance.dtype),
        }


def _ratio_metrics(log_ratio: Tensor, objective: ClippedObjective, mask: Tensor, micro: MicroBatch) -> Metrics:
    """The identities of max and min are the bounds of the log ratio: finite, and neutral where no token is."""
    highest = _max(torch.where(mask, log_ratio, -LOG_RATIO_LIMIT), identity=-LOG_RATIO_LIMIT)
    lowest = -_max(torch.where(mask, -log_ratio, -LOG_RATIO_LIMIT), identity=-LOG_RATIO_LIMIT)
    return {
        "actor/ppo_kl": token_mean(-log_ratio, mask, micro.norm),
        "actor/ratio_max": highest.exp(),
        "actor/ratio_min": lowest.exp(),
        "actor/clip_frac": token_mean(objective.clipped, mask, micro.norm),
        "actor/clip_frac_lower": token_mean(objective.clipped_lower, mask, micro.norm),
    }


def _max(values: Tensor, *, identity: float) -> Tensor:
    """Largest of values [R], or `identity` where R is 0."""
    return values.amax() if values.numel() else values.new_full((), identity)


def _weights(micro: MicroBatch, mask: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    return token_weights(mask, micro.sequence, micro.num_sequences, mode=mode, norm=micro.norm, dtype=dtype)


def _column(micro: MicroBatch, name: str) -> Tensor:
    column = micro.tokens.get(name)
    assert isinstance(column, Tensor), f"the micro-batch has no column {name!r}"
    return column


def _column_or(micro: MicroBatch, name: str, default: Tensor) -> Tensor:
    column = micro.tokens.get(name, default)
    assert isinstance(column, Tensor)
    return column
