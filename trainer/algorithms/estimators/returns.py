"""Estimators whose advantage differs from token to token: it counts the rewards that are still to come.

Time steps are the tokens that the model chose: tokens outside the loss mask are passed over, as if they were not there.
The outcome is paid at the last chosen token (verl: at the last token, and a masked one loses it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.algorithms.estimators.ragged import AdvantageInput, Advantages, Tokens, suffix_sum
from trainer.algorithms.estimators.ragged import whiten as whitened


def gae(x: AdvantageInput, *, gamma: float, lam: float, whiten: bool = True) -> Advantages:
    """Generalized advantage estimation (https://arxiv.org/abs/1506.02438, equation 16), whitened over the batch.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V, before whitening.
    Raises ValueError without values.
    """
    if x.values is None:
        raise ValueError("algorithm.adv_estimator=gae needs values; leave critic.enable at null or set it to true")
    tokens = Tokens.of(x)
    values = x.values[tokens.chosen].double()
    same = tokens.sequence[1:] == tokens.sequence[:-1]
    delta = tokens.rewards(x) - values
    delta[:-1] += gamma * torch.where(same, values[1:], 0.0)
    advantages = suffix_sum(delta, tokens.sequence, gamma * lam)
    returns = advantages + values
    if whiten:
        advantages = whitened(advantages)
    return Advantages(tokens.scatter(advantages), tokens.scatter(returns))


def reinforce_plus_plus(x: AdvantageInput, *, gamma: float) -> Advantages:
    """Discounted reward to come, whitened over the tokens of the batch (https://arxiv.org/abs/2501.03262).

    G_t = r_t + gamma G_{t+1}, with the KL penalty in r_t if there is one; A = (G - mean G) / sqrt(var G + 1e-8).
    """
    tokens = Tokens.of(x)
    returns = suffix_sum(tokens.rewards(x), tokens.sequence, gamma)
    return Advantages(tokens.scatter(whitened(returns)), tokens.scatter(returns))


def reward_to_come(x: AdvantageInput, *, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, [R] float32, 0 where masked: what a critic can learn under any estimator."""
    tokens = Tokens.of(x)
    return tokens.scatter(suffix_sum(tokens.rewards(x), tokens.sequence, gamma))


def remax(x: AdvantageInput) -> Advantages:
    """Reward to come less the reward of the greedy response (https://arxiv.org/abs/2310.10505, algorithm 1).

    A_t = sum of r_u over u >= t, less b. Raises ValueError without the greedy baseline.
    """
    if x.baseline is None:
        raise ValueError("algorithm.adv_estimator=remax needs the reward of a greedy response to each prompt")
    tokens = Tokens.of(x)
    returns = suffix_sum(tokens.rewards(x), tokens.sequence)
    return Advantages(tokens.scatter(returns - x.baseline.double()[tokens.sequence]), tokens.scatter(returns))
