"""Losses, one callable per role, the same for every training engine.

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
from trainer.algorithms.corrections import (
    WEIGHTS,
    correction_metrics,
    correction_weights,
    log_ratios,
    mismatch,
    normalized_weights,
)
from trainer.algorithms.policy.base import BatchInput, Objective, ObjectiveInput, PolicyObjective
from trainer.algorithms.policy.build import ClipRange, policy_objective
from trainer.algorithms.thresholds import Correction, read_correction

if TYPE_CHECKING:
    from trainer.config.schema import ActorConfig, CriticConfig, RolloutCorrectionConfig
    from workers.batch import MicroBatch

NO_CORRECTION = Correction()
Metrics = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """A policy objective, weighed by a correction, - entropy_coeff * entropy + kl_loss_coef * KL(policy, reference).

    Reads from `micro.tokens`: loss_mask, advantages; old_logprobs (absent: the policy itself, whose ratio is 1);
    ref_logprobs where kl_loss_coef is set; rollout_logprobs where the sampler was asked (NaN: not for this token);
    those of `columns`.

    agg_mode: of entropy, KL and an objective that prescribes none. Only the objective is weighed by the correction.
    kl_loss_coef: None: no KL in the loss, and no reference is needed.
    length: tokens, what seq-mean-token-sum-norm divides by; the driver puts it into `Normalizers`.
    """

    objective: PolicyObjective
    agg_mode: str
    entropy_coeff: float
    calculate_entropy: bool
    kl_loss_coef: float | None
    kl_loss_type: str
    length: float
    correction: Correction = NO_CORRECTION

    @property
    def needs_entropy(self) -> bool:
        """Whether the engine has to compute the entropy."""
        return self.entropy_coeff != 0.0 or self.calculate_entropy

    @property
    def needs_reference(self) -> bool:
        """Whether `ref_logprobs` must be there."""
        return self.kl_loss_coef is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The per-token columns that `driver_columns` makes for it."""
        return (*self.objective.columns, *((WEIGHTS,) if self.correction.batch_normalize else ()))

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the driver needs the policy's log-probs before the first update, even where there is only one."""
        return bool(self.columns) and not self.correction.bypass

    @property
    def uses_old_logprobs(self) -> bool:
        """Whether several updates of one batch need them; False where the sampler's take their place."""
        return not self.correction.bypass

    @property
    def needs_sampler(self) -> bool:
        """Whether every token's log-prob must have been asked of the sampler."""
        return self.correction.needs_sampler

    def __call__(self, logprobs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of one micro-batch. logprobs: [R] with gradient; entropy: [R] in nats, or None."""
        mask = _column(micro, "loss_mask")
        x = self._input(torch.where(mask, logprobs, 0.0), mask, micro)
        objective = self.objective(x)
        per_token, metrics = self._corrected(objective.loss, x, micro)
        mode = self.agg_mode if self.objective.agg_mode is None else self.objective.agg_mode
        pg_loss = weighted_sum(per_token, mask, _weights(micro, mask, mode, logprobs.dtype))
        metrics |= {name: value.detach() for name, value in objective.metrics.items()}
        metrics |= {"actor/pg_loss": pg_loss.detach(), **_ratio_metrics(x.log_ratio.detach(), objective, mask, micro)}
        weights = _weights(micro, mask, self.agg_mode, logprobs.dtype)
        loss = self._add_entropy(pg_loss, entropy, mask, weights, micro, metrics)
        loss = self._add_kl(loss, x.logprobs, mask, weights, micro, metrics)
        metrics["actor/loss"] = loss.detach()
        return loss, metrics

    def _input(self, logprobs: Tensor, mask: Tensor, micro: MicroBatch) -> ObjectiveInput:
        """The micro-batch as objectives see it: nothing that a masked token holds is left."""
        policy = logprobs.detach()
        sampler = _sampler(micro, mask)
        if self.correction.bypass:
            assert sampler is not None, "bypass_mode needs the sampler's log-probs"
            old = torch.where(torch.isnan(sampler), policy, sampler)
        else:
            old = torch.where(mask, _column_or(micro, "old_logprobs", policy), 0.0)
        return ObjectiveInput(
            logprobs=logprobs,
            old=old,
            log_ratio=(logprobs - old).clamp(-kl.LOG_RATIO_LIMIT, kl.LOG_RATIO_LIMIT),
            advantages=torch.where(mask, _column(micro, "advantages"), 0.0),
            mask=mask,
            sequence=micro.sequence,
            num_sequences=micro.num_sequences,
            columns={str(name): _column(micro, str(name)) for name in micro.tokens.keys()},  # noqa: SIM118
            sampler=sampler,
        )

    def _corrected(self, loss: Tensor, x: ObjectiveInput, micro: MicroBatch) -> tuple[Tensor, Metrics]:
        """The loss per token times the correction's weights, and what is to be told about the sampler."""
        if x.sampler is None:
            assert not self.correction.needs_sampler, "the correction needs the sampler's log-probs"
            return loss, {}
        trainer = x.logprobs.detach() if self.correction.bypass else x.old
        metrics = mismatch_metrics(x.sampler, trainer, x.mask)
        if not self.correction.weighs:
            return loss, metrics
        found = mismatch(trainer, x.sampler, x.mask, x.sequence, x.num_sequences)
        given = _column(micro, WEIGHTS) if self.correction.batch_normalize else None
        weights = correction_weights(self.correction, found, given)
        return loss * weights, metrics | correction_metrics(self.correction, found, weights, micro.norm)

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


def policy_loss(cfg: ActorConfig, max_response_length: int, rollout_correction: RolloutCorrectionConfig) -> PolicyLoss:
    """The actor's loss as actor_rollout_ref.actor and algorithm.rollout_correction ask for it.

    max_response_length: tokens. Raises ValueError naming key, value and remedy.
    """
    length = float(max_response_length if cfg.loss_scale_factor is None else cfg.loss_scale_factor)
    if not length > 0.0:
        raise ValueError(
            f"actor_rollout_ref.actor.loss_scale_factor={length:g}: the loss is divided by it; "
            "set it above 0, or to null"
        )
    clips = ClipRange(cfg.clip_ratio_low, cfg.clip_ratio_high, cfg.clip_ratio_c)
    return PolicyLoss(
        objective=policy_objective(cfg.policy_loss.loss_mode, cfg.policy_loss.params, clips),
        agg_mode=cfg.loss_agg_mode,
        entropy_coeff=cfg.entropy_coeff,
        calculate_entropy=cfg.calculate_entropy,
        kl_loss_coef=cfg.kl_loss_coef if cfg.use_kl_loss else None,
        kl_loss_type=cfg.kl_loss_type,
        length=length,
        correction=read_correction(rollout_correction),
    )


def driver_columns(loss: PolicyLoss, x: BatchInput, *, seed: tuple[int, ...]) -> dict[str, Tensor]:
    """The columns of `loss.columns`, [R] float32 each, from the whole batch of a step; the same for the same seed.

    With bypass_mode `x.old` is the sampler's log-probs.
    """
    columns = loss.objective.driver_columns(x, seed)
    if loss.correction.batch_normalize:
        columns[WEIGHTS] = normalized_weights(loss.correction, x)
    assert set(columns) == set(loss.columns), (set(columns), loss.columns)
    return columns


def value_loss(cfg: CriticConfig, max_response_length: int) -> ValueLoss:
    """The critic's loss as critic asks for it; max_response_length in tokens."""
    return ValueLoss(clip=cfg.cliprange_value, agg_mode=cfg.loss_agg_mode, length=float(max_response_length))


def mismatch_metrics(sampler: Tensor, trainer: Tensor, mask: Tensor) -> Metrics:
    """How far the sampler's log-probs [R] (NaN: not asked) are from the trainer's [R], as sums and a count.

    mismatch/kl_sum is the k3 estimate of KL(sampler, trainer); divide the sums by mismatch/num_tokens.
    """
    with torch.no_grad():
        asked = mask & ~torch.isnan(sampler)
        log_rho = log_ratios(trainer, sampler, asked)
        distance, divergence = log_rho.abs(), kl.k3(torch.zeros_like(log_rho), log_rho)
        return {
            "mismatch/logprob_abs_diff_sum": distance.sum(),
            "mismatch/logprob_abs_diff_max": _max(distance, identity=0.0),
            "mismatch/kl_sum": divergence.sum(),
            "mismatch/num_tokens": asked.sum().to(distance.dtype),
        }


def _ratio_metrics(log_ratio: Tensor, objective: Objective, mask: Tensor, micro: MicroBatch) -> Metrics:
    """The identities of max and min are the bounds of the log ratio: finite, and neutral where no token is."""
    highest = _max(torch.where(mask, log_ratio, -kl.LOG_RATIO_LIMIT), identity=-kl.LOG_RATIO_LIMIT)
    lowest = -_max(torch.where(mask, -log_ratio, -kl.LOG_RATIO_LIMIT), identity=-kl.LOG_RATIO_LIMIT)
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


def _sampler(micro: MicroBatch, mask: Tensor) -> Tensor | None:
    """The sampler's log-probs [R], NaN where masked or not asked; None where it was not asked for any token."""
    sampler = micro.tokens.get("rollout_logprobs")
    return torch.where(mask, sampler, torch.nan) if isinstance(sampler, Tensor) else None


def _column(micro: MicroBatch, name: str) -> Tensor:
    column = micro.tokens.get(name)
    assert isinstance(column, Tensor), f"the micro-batch has no column {name!r}"
    return column


def _column_or(micro: MicroBatch, name: str, default: Tensor) -> Tensor:
    column = micro.tokens.get(name, default)
    assert isinstance(column, Tensor)
    return column
