"""Advantages: how much better a token was than expected. Pure functions of ragged tensors, run on the driver.

S sequences, R response tokens in all, flat in sequence order. Sums are taken in float64 over the whole batch, so the
result does not depend on how the batch is later split.

A new estimator is a function `AdvantageInput, AlgorithmConfig -> Advantages` and a line in `ESTIMATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.config.schema import AlgorithmConfig

GRPO_EPS = 1e-6
WHITEN_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class AdvantageInput:
    """What every estimator may use.

    rewards: [S] float32, the outcome of each sequence, paid at its last token.
    group: [S] int64, responses to one prompt share it.
    lengths: [S] int64, response tokens of each sequence.
    token_rewards: [R] float32, paid on top of the outcome (a KL penalty, already negative), or None.
    values: [R] float32, the critic's prediction before each token, or None.
    loss_mask: [R] bool, False where the model did not choose the token (tool output), or None: all True.
    """

    rewards: Tensor
    group: Tensor
    lengths: Tensor
    token_rewards: Tensor | None = None
    values: Tensor | None = None
    loss_mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Advantages:
    """advantages: [R] float32. returns: [R] float32, what the critic learns, or None. Both 0 where masked."""

    advantages: Tensor
    returns: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Estimator:
    """An advantage estimator, whether it needs a critic, and whether every prompt has to be answered greedily too."""

    fn: Callable[[AdvantageInput, AlgorithmConfig], Advantages]
    needs_values: bool
    needs_baseline: bool = False


def grpo(x: AdvantageInput, *, norm_by_std: bool) -> Advantages:
    """Reward less the mean of its group, over the group's unbiased standard deviation + 1e-6 if `norm_by_std`.

    https://arxiv.org/abs/2402.03300, section 4.1.2; without the division https://arxiv.org/abs/2503.20783, section 3.2.
    A group of one has advantage 0: there is nothing to compare with. verl gives it the bare reward instead.
    """
    outcome = _total_rewards(x)
    member = torch.unique(x.group, return_inverse=True)[1]
    size = torch.bincount(member).double()
    centred = outcome - (_group_sum(outcome, member, size) / size)[member]
    if norm_by_std:
        variance = _group_sum(centred.square(), member, size) / (size - 1.0).clamp(min=1.0)
        centred = centred / (variance.sqrt()[member] + GRPO_EPS)
    return Advantages(centred.float()[sequence_ids(x.lengths)] * _mask(x))


def gae(x: AdvantageInput, *, gamma: float, lam: float, whiten: bool = True) -> Advantages:
    """Generalized advantage estimation (https://arxiv.org/abs/1506.02438, equation 16), whitened over the batch.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V, before whitening.
    Steps are the tokens that the model chose: tokens outside the loss mask are passed over, as if they were not there.
    The outcome is paid at the last chosen token (verl: at the last token, where a masked one loses it).

    Raises ValueError without values.
    """
    if x.values is None:
        raise ValueError("algorithm.adv_estimator=gae needs values; leave critic.enable at null or set it to true")
    chosen = _mask(x)
    sequence = sequence_ids(x.lengths)[chosen]
    values = x.values[chosen].double()
    rewards = _step_rewards(x, chosen, sequence)
    same = sequence[1:] == sequence[:-1]
    delta = rewards - values
    delta[:-1] += gamma * torch.where(same, values[1:], 0.0)
    advantages = _discounted_suffix_sum(delta, sequence, gamma * lam)
    returns = advantages + values
    if whiten:
        advantages = _whiten(advantages)
    return Advantages(_scatter(advantages, chosen), _scatter(returns, chosen))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> float:
    """1 - var(returns - values) / var(returns) over masked-in tokens: 1 is a perfect critic, 0 a constant one.

    All [R]. 0 where the returns do not vary.
    """
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    target, predicted = returns[keep].double(), values[keep].double()
    if target.numel() < 2:
        return 0.0
    spread = float(target.var())
    return 1.0 - float((target - predicted).var()) / spread if spread > 0.0 else 0.0


def sequence_ids(lengths: Tensor) -> Tensor:
    """Which sequence each of the R tokens belongs to, [R] int64, from lengths [S]."""
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def estimator(name: str) -> Estimator:
    """The estimator of that name (algorithm.adv_estimator). Raises ValueError that lists the names."""
    if name not in ESTIMATORS:
        raise ValueError(f"algorithm.adv_estimator={name!r} is unknown; choose one of {', '.join(sorted(ESTIMATORS))}")
    return ESTIMATORS[name]


def _grpo(x: AdvantageInput, cfg: AlgorithmConfig) -> Advantages:
    return grpo(x, norm_by_std=cfg.norm_adv_by_std_in_grpo)


def _gae(x: AdvantageInput, cfg: AlgorithmConfig) -> Advantages:
    return gae(x, gamma=cfg.gamma, lam=cfg.lam)


ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {"gae": Estimator(_gae, needs_values=True), "grpo": Estimator(_grpo, needs_values=False)}
)


def _mask(x: AdvantageInput) -> Tensor:
    return torch.ones(int(x.lengths.sum()), dtype=torch.bool) if x.loss_mask is None else x.loss_mask


def _total_rewards(x: AdvantageInput) -> Tensor:
    """Outcome plus token rewards of each sequence, [S] float64."""
    total = x.rewards.double()
    if x.token_rewards is None:
        return total
    paid = torch.where(_mask(x), x.token_rewards, 0.0).double()
    return total.index_add(0, sequence_ids(x.lengths), paid)


def _group_sum(values: Tensor, member: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add_(0, member, values)


def _step_rewards(x: AdvantageInput, chosen: Tensor, sequence: Tensor) -> Tensor:
    """Reward of each chosen token, [C] float64: token rewards, and the outcome at each sequence's last one."""
    last = torch.ones(len(sequence), dtype=torch.bool)
    last[:-1] = sequence[1:] != sequence[:-1]
    outcome = torch.where(last, x.rewards.double()[sequence], 0.0)
    return outcome if x.token_rewards is None else outcome + x.token_rewards[chosen].double()


def _discounted_suffix_sum(x: Tensor, sequence: Tensor, discount: float) -> Tensor:
    """y_t = x_t + discount * y_{t+1} within each sequence, [C].

    Doubling: after k rounds y_t holds the first 2^k terms, so the number of rounds is log2 of the longest sequence.
    """
    y = x.clone()
    longest = int(torch.bincount(sequence).max()) if len(sequence) else 0
    step, factor = 1, discount
    while step < longest and factor != 0.0:
        same = sequence[step:] == sequence[:-step]
        y[:-step] += torch.where(same, factor * y[step:], 0.0)
        step, factor = 2 * step, factor * factor
    return y


def _whiten(x: Tensor) -> Tensor:
    """Mean 0, unbiased variance 1; a single value becomes 0."""
    if x.numel() < 2:
        return torch.zeros_like(x)
    variance, mean = torch.var_mean(x)
    return (x - mean) * torch.rsqrt(variance + WHITEN_EPS)


def _scatter(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.zeros(len(chosen), dtype=torch.float32).masked_scatter_(chosen, values.float())
