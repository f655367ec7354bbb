"""Corrections for a sampler whose probabilities differ from the trainer's: importance weights and rejection.

With rho = trainer / sampler probability of a sampled token, the weight of a token is (rollout_is)

    token       rho
    sequence    product of rho over the sequence
    geometric   that product to the power 1 / tokens

truncated at the threshold (https://fengyao.notion.site/off-policy-rl), or 0 outside of "lo_hi" (IcePop). A token is
rejected, weight 0, where a statistic of k1 = -log rho, k2 = (log rho)^2 / 2, k3 = rho - 1 - log rho is out of bounds
(rollout_rs), of the token itself or the sum, mean or maximum over its sequence. The number of tokens that the loss is
divided by stays that of the loss mask: rejection makes the step smaller, it does not make the rest louder.

The trainer's log-probs are those of before the first update of the batch (decoupled PPO: https://arxiv.org/abs/2110.00641,
https://arxiv.org/abs/2505.24298), with bypass the policy's of now. Nothing here carries a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.algorithms.aggregation import token_mean
from trainer.algorithms.kl import LOG_RATIO_LIMIT
from trainer.algorithms.policy.base import BatchInput, sum_by_sequence
from trainer.algorithms.thresholds import Bounds, Correction, Rejection
from workers.normalizers import Normalizers

WEIGHTS = "rollout_weights"
INFINITE = 1e4
"""What an infinite log ratio counts as: one side holds the token for impossible."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Trainer against sampler in one micro-batch. log_rho: [R], 0 where masked or not asked. Others as elsewhere."""

    log_rho: Tensor
    mask: Tensor
    sequence: Tensor
    num_sequences: int

    def sums(self, values: Tensor) -> Tensor:
        """Over each sequence, [num_sequences]."""
        return sum_by_sequence(values, self.mask, self.sequence, self.num_sequences)

    def means(self, values: Tensor) -> Tensor:
        """Over each sequence, [num_sequences]; 0 where it has no token."""
        return self.sums(values) / self.sums(torch.ones_like(values)).clamp(min=1.0)


def mismatch(trainer: Tensor, sampler: Tensor, mask: Tensor, sequence: Tensor, num_sequences: int) -> Mismatch:
    """The parts above from log-probs [R]; a token that the sampler was not asked for (NaN) agrees."""
    return Mismatch(log_ratios(trainer, sampler, mask), mask, sequence, num_sequences)


def log_ratios(trainer: Tensor, sampler: Tensor, mask: Tensor) -> Tensor:
    """log rho of log-probs [R], detached and finite; 0 where masked or NaN."""
    difference = torch.nan_to_num(trainer.detach() - sampler, nan=0.0, posinf=INFINITE, neginf=-INFINITE)
    return torch.where(mask, difference, 0.0)


def raw_weights(x: Mismatch, level: str) -> Tensor:
    """Importance weights [R] before any bound, exp of at most +-20."""
    log_weight = x.log_rho
    if level != "token":
        log_weight = (x.sums(x.log_rho) if level == "sequence" else x.means(x.log_rho))[x.sequence]
    return log_weight.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def bounded(weights: Tensor, bounds: Bounds) -> Tensor:
    """Truncated at the upper bound, or 0 outside both, [R]."""
    if bounds.lower is None:
        return weights.clamp(max=bounds.upper)
    return torch.where((weights >= bounds.lower) & (weights <= bounds.upper), weights, 0.0)


def kept(x: Mismatch, rejections: tuple[Rejection, ...]) -> Tensor:
    """Tokens that no criterion rejects, [R] bool."""
    keep = torch.ones_like(x.mask)
    for rejection in rejections:
        value, bounds = statistic(x, rejection.statistic), rejection.bounds
        keep &= value <= bounds.upper
        if bounds.lower is not None:
            keep &= value >= bounds.lower
    return keep


def statistic(x: Mismatch, name: str) -> Tensor:
    """A statistic of `thresholds.STATISTICS` for each token, [R]; those of a sequence are the same for its tokens."""
    level, _, kind = name.rpartition("_")
    value = _divergence(x.log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), kind)
    if level == "token":
        return value
    if level == "seq_max":
        zeros = value.new_zeros(x.num_sequences)
        return zeros.scatter_reduce(0, x.sequence, torch.where(x.mask, value, 0.0), "amax")[x.sequence]
    return (x.sums(value) if level == "seq_sum" else x.means(value))[x.sequence]


def _divergence(log_rho: Tensor, kind: str) -> Tensor:
    if kind == "k1":
        return -log_rho
    return 0.5 * log_rho.square() if kind == "k2" else torch.expm1(log_rho) - log_rho


def correction_weights(correction: Correction, x: Mismatch, given: Tensor | None) -> Tensor:
    """What the loss of each token is multiplied by, [R].

    given: the importance weights of this micro-batch's tokens where the driver has normalised them (`WEIGHTS`).
    """
    weights = torch.ones_like(x.log_rho)
    if correction.level is not None:
        weights = given if given is not None else bounded(raw_weights(x, correction.level), correction.bounds)
    return torch.where(kept(x, correction.rejections), weights, 0.0)


def correction_metrics(correction: Correction, x: Mismatch, weights: Tensor, norm: Normalizers) -> dict[str, Tensor]:
    """Shares of the mini-batch's means; effective sample size follows from the two means of the weight.

    weights: [R], of `correction_weights`.
    """
    keep = kept(x, correction.rejections)
    rejected = (x.sums((~keep).to(weights.dtype)) > 0).to(weights.dtype).sum()
    rho = x.log_rho.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    whole = x.sums(x.log_rho).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    metrics = {
        "correction/weight_mean": token_mean(weights, x.mask, norm),
        "correction/weight_square_mean": token_mean(weights.square(), x.mask, norm),
        "correction/rejected": token_mean(~keep, x.mask, norm),
        "correction/rejected_sequences": rejected / max(norm.num_sequences, 1.0),
        "correction/chi2_token": token_mean(rho.square() - 1.0, x.mask, norm),
        "correction/chi2_sequence": (whole.square() - 1.0).sum() / max(norm.num_sequences, 1.0),
    }
    if correction.level is not None:
        raw = raw_weights(x, correction.level)
        metrics["correction/truncated"] = token_mean(bounded(raw, correction.bounds) != raw, x.mask, norm)
    return metrics


def normalized_weights(correction: Correction, x: BatchInput) -> Tensor:
    """Importance weights over their mean in the step's batch, [R] float32: over tokens, or over sequences with tokens.

    Rejection comes after, in the loss. Weights that are all 0 stay so.
    """
    assert correction.level is not None and x.sampler is not None
    sequence = torch.repeat_interleave(torch.arange(len(x.lengths)), x.lengths)
    found = mismatch(x.old.double(), x.sampler.double(), x.mask, sequence, len(x.lengths))
    weights = bounded(raw_weights(found, correction.level), correction.bounds)
    if correction.level == "token":
        total, count = torch.where(x.mask, weights, 0.0).sum(), x.mask.sum()
    else:
        total, count = found.means(weights).sum(), (found.sums(torch.ones_like(weights)) > 0).sum()
    mean = total / count.clamp(min=1)
    return torch.where(mean > 0.0, weights / mean, weights).float()
