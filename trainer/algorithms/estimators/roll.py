"""Advantages as ROLL's RLVR pipeline computes them, for configurations brought from there (docs/roll.md).

    algorithm.adv_estimator=trainer.algorithms.estimators.roll:reinforce algorithm.adv_params.advantage_clip=2.0 ...

Rewards are normalised, then clipped; what is to come is summed; advantages are whitened, then clipped. Responses that
are left out have advantage 0 and no part in any mean. ROLL does all of it for each domain, this for the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trainer.algorithms.estimators.ragged import AdvantageInput, Advantages, Groups, Tokens, chosen_lengths, suffix_sum
from trainer.algorithms.estimators.ragged import whiten as whitened
from trainer.algorithms.estimators.returns import gae as plain_gae

Norm = Literal["batch", "group"]
_EPS = 1e-6


def reinforce(
    x: AdvantageInput,
    *,
    gamma: float = 1.0,
    norm_mean: Norm | None = None,
    norm_std: Norm | None = None,
    reward_clip: float | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = False,
    advantage_clip: float | None = None,
    max_length: int | None = None,
    min_group_reward: float | None = None,
    max_group_reward: float | None = None,
    max_failed_length: int | None = None,
) -> Advantages:
    """Reward to come, G_t = r_t + gamma G_{t+1}, of normalised rewards; then whitened and clipped.

    norm_mean, norm_std: what is taken from a reward and what divides it, of the batch or of the prompt's group.
    reward_clip, advantage_clip: bounds of the absolute value.
    Left out: responses of max_length tokens; groups whose mean reward is not between min_ and max_group_reward; rewards
    other than 1, unless 0 on a response below max_failed_length tokens. None: nothing is.
    """
    shaped = _Shaped.of(x, norm_mean, norm_std, reward_clip)
    kept = _kept(x, max_length, min_group_reward, max_group_reward, max_failed_length)
    tokens, rewards = shaped.rewards(kept, reward_clip, whiten_rewards)
    returns = suffix_sum(rewards, tokens.sequence, gamma)
    advantages = _finish(returns, kept[tokens.sequence], whiten_advantages, advantage_clip)
    return Advantages(tokens.scatter(advantages), tokens.scatter(returns))


def gae(
    x: AdvantageInput,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    norm_mean: Norm | None = None,
    norm_std: Norm | None = None,
    reward_clip: float | None = None,
    whiten_rewards: bool = False,
    whiten_advantages: bool = False,
    advantage_clip: float | None = None,
    max_length: int | None = None,
    min_group_reward: float | None = None,
    max_group_reward: float | None = None,
    max_failed_length: int | None = None,
) -> Advantages:
    """As `reinforce`, with generalized advantage estimation in place of the reward to come. Needs a critic's values."""
    shaped = _Shaped.of(x, norm_mean, norm_std, reward_clip)
    kept = _kept(x, max_length, min_group_reward, max_group_reward, max_failed_length)
    tokens, rewards = shaped.rewards(kept, reward_clip, whiten_rewards)
    paid = replace(x, rewards=torch.zeros_like(x.rewards), token_rewards=tokens.scatter(rewards))
    plain = plain_gae(paid, gamma=gamma, lam=lam, whiten=False)
    advantages = plain.advantages[tokens.chosen].double()
    advantages = _finish(advantages, kept[tokens.sequence], whiten_advantages, advantage_clip)
    return Advantages(tokens.scatter(advantages), plain.returns)


gae.needs = {"values"}  # type: ignore[attr-defined]  # read by the catalog of estimators


@dataclass(frozen=True, slots=True)
class _Shaped:
    """A batch whose outcomes are normalised and clipped."""

    x: AdvantageInput

    @staticmethod
    def of(x: AdvantageInput, mean: Norm | None, std: Norm | None, clip: float | None) -> _Shaped:
        rewards = x.rewards.double()
        groups = Groups.of(x)
        shaped = rewards
        if mean is not None:
            shaped = groups.centred(rewards) if mean == "group" else rewards - rewards.mean()
        if std is not None:
            divisor = groups.std(groups.centred(rewards)) if std == "group" else _std(rewards)
            shaped = shaped / (divisor + _EPS)
        if clip is not None:
            shaped = shaped.clamp(-clip, clip)
        return _Shaped(replace(x, rewards=shaped.float()))

    def rewards(self, kept: Tensor, clip: float | None, whiten: bool) -> tuple[Tokens, Tensor]:
        """The tokens and what each is paid, [C] float64: 0 in responses that are left out. kept: [S] bool."""
        tokens = Tokens.of(self.x)
        rewards, taken = tokens.rewards(self.x), kept[tokens.sequence]
        if clip is not None:
            rewards = rewards.clamp(-clip, clip)
        if whiten:
            rewards = rewards.masked_scatter(taken, whitened(rewards[taken]))
        return tokens, torch.where(taken, rewards, 0.0)


def _kept(
    x: AdvantageInput, max_length: int | None, low: float | None, high: float | None, max_failed_length: int | None
) -> Tensor:
    """Which responses are trained on, [S] bool."""
    kept, lengths = torch.ones(len(x.rewards), dtype=torch.bool), chosen_lengths(x)
    if max_length is not None:
        kept &= lengths < max_length
    mean = Groups.of(x).mean(x.rewards.double())
    if low is not None:
        kept &= mean > low
    if high is not None:
        kept &= mean < high
    if max_failed_length is not None:
        kept &= (x.rewards == 1) | ((x.rewards == 0) & (lengths < max_failed_length))
    return kept


def _finish(advantages: Tensor, kept: Tensor, whiten: bool, clip: float | None) -> Tensor:
    """Advantages [C], whitened over the kept tokens and clipped; 0 elsewhere."""
    values = advantages[kept]
    if whiten:
        values = whitened(values)
    if clip is not None:
        values = values.clamp(-clip, clip)
    return torch.zeros_like(advantages).masked_scatter(kept, values)


def _std(rewards: Tensor) -> Tensor:
    return rewards.std() if len(rewards) > 1 else torch.zeros((), dtype=rewards.dtype)
