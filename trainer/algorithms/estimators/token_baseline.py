"""The optimal token baseline: a baseline of least variance for each position in the response."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.algorithms.estimators.ragged import AdvantageInput, Advantages, Groups, Tokens, prefix_sum, suffix_sum

WEIGHT_EPS = 1e-8
"""Keeps a position at which every token was certain a plain mean instead of 0 / 0."""


def optimal_token_baseline(x: AdvantageInput, *, handle_zero_tail: bool = True) -> Advantages:
    """A_t = G_t - B_t with B_t = sum G_t W_t / sum W_t over the responses of the group that reach token t.

    https://arxiv.org/abs/2602.07078 (Optimal Token Baseline, with the Logit-Gradient Proxy): G_t is the reward to
    come, W_t = sum of w_u over u <= t, and w = 1 - 2 pi + sum pi^2 is the squared norm of the gradient of log pi with
    respect to the logits. t counts the tokens that the model chose.

    handle_zero_tail: where one response of a group is longer than all others, B_t = 0 beyond them (A_t = G_t); False:
    A_t = 0 there, as it is compared with itself. A group with one response that has tokens has advantage 0.
    Raises ValueError without logprobs or sum_pi_squared.
    """
    if x.logprobs is None or x.sum_pi_squared is None:
        raise ValueError(
            "algorithm.adv_estimator=optimal_token_baseline needs the policy's log-probs and sums of squared "
            "probabilities at the response tokens"
        )
    tokens = Tokens.of(x)
    returns = suffix_sum(tokens.rewards(x), tokens.sequence)
    norm = 1.0 - 2.0 * x.logprobs[tokens.chosen].double().exp() + x.sum_pi_squared[tokens.chosen].double()
    weight = prefix_sum(norm.clamp(min=0.0), tokens.sequence) + WEIGHT_EPS
    place, alone = _places(Groups.of(x), tokens)
    count = torch.bincount(place)
    zero = torch.zeros(len(count), dtype=torch.float64)
    baseline = zero.index_add(0, place, returns * weight) / zero.index_add(0, place, weight)
    if handle_zero_tail:
        baseline[count == 1] = 0.0
    advantages = torch.where(alone, 0.0, returns - baseline[place])
    return Advantages(tokens.scatter(advantages), tokens.scatter(returns))


def _places(groups: Groups, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """For each chosen token [C]: a number that the tokens at one position of one group share, 0, 1, 2 and so on; and
    whether its response is the only one of the group that has tokens."""
    position = prefix_sum(torch.ones(len(tokens.sequence), dtype=torch.float64), tokens.sequence).long() - 1
    longest = int(position.max()) + 1 if len(position) else 0
    group = groups.member[tokens.sequence]
    with_tokens = torch.bincount(group[position == 0], minlength=len(groups.size))
    place = torch.unique(group * longest + position, return_inverse=True)[1]
    return place, (with_tokens < 2)[group]
