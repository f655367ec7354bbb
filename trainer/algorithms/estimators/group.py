"""Estimators that compare the responses to one prompt: one advantage per response, at each token that it chose.

r is the outcome plus the token rewards (KL penalty) of the response. A group may be of any size; one response alone has
advantage 0, as there is nothing to compare it with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from trainer.algorithms.estimators.ragged import (
    AdvantageInput,
    Advantages,
    Groups,
    Tokens,
    check_finite,
    chosen_lengths,
    token_reward_sums,
    total_rewards,
    whiten,
)

GROUP_EPS = 1e-6
"""Added to a group's standard deviation (grpo, grpo_passk, gdpo) or mean (max_rl)."""


def grpo(x: AdvantageInput, *, norm_by_std: bool) -> Advantages:
    """A = (r - mean r) / (std r + 1e-6) over the group, with the unbiased standard deviation.

    https://arxiv.org/abs/2402.03300, section 4.1.2; without the division where `norm_by_std` is False.
    """
    return _spread(x, _normalised(total_rewards(x), Groups.of(x), norm_by_std=norm_by_std))


def dr_grpo(x: AdvantageInput) -> Advantages:
    """A = r - mean r over the group: no division, which favours groups with little spread.

    https://arxiv.org/abs/2503.20783, section 3.2. The other half of the method is the aggregation
    seq-mean-token-sum-norm.
    """
    return grpo(x, norm_by_std=False)


def rloo(x: AdvantageInput) -> Advantages:
    """A_i = r_i - mean of the n - 1 others = n / (n - 1) (r_i - mean r): leave one out.

    https://arxiv.org/abs/2402.14740, section 2.2 (REINFORCE leave-one-out).
    """
    groups = Groups.of(x)
    factor = groups.size / (groups.size - 1.0).clamp(min=1.0)
    return _spread(x, factor[groups.member] * groups.centred(total_rewards(x)))


def opo(x: AdvantageInput) -> Advantages:
    """A = r - b with b = sum l r / sum l over the group, l the number of tokens that the model chose.

    https://arxiv.org/abs/2505.23585: the baseline of least variance if all tokens have gradients of equal norm,
    orthogonal to each other.
    """
    groups, lengths, total = Groups.of(x), chosen_lengths(x), total_rewards(x)
    baseline = groups.sum(lengths * total) / groups.sum(lengths).clamp(min=1.0)
    return _spread(x, total - baseline[groups.member])


def grpo_passk(x: AdvantageInput, *, norm_by_std: bool) -> Advantages:
    """Only the best of a group has an advantage: (r_1 - r_2) / (std r + 1e-6), r_1 and r_2 the two highest.

    https://arxiv.org/abs/2503.19595: the leave-one-out advantage of the group's maximum. 0 where two share the top.
    Without the division where `norm_by_std` is False.
    """
    groups, total = Groups.of(x), total_rewards(x)
    best = total == groups.highest(total)
    unique = best & (groups.sum(best.double())[groups.member] == 1.0) & ~groups.alone
    second = groups.highest(torch.where(best, -torch.inf, total))
    advantage = torch.where(unique, total - second, 0.0)
    if norm_by_std:
        advantage = advantage / (groups.std(groups.centred(total)) + GROUP_EPS)
    return _spread(x, advantage)


def gpg(
    x: AdvantageInput, *, f_norm: float = 1.0, valid: Literal["nonzero_rewards", "mixed_groups"] = "nonzero_rewards"
) -> Advantages:
    """A = alpha (r - mean r) / f_norm with alpha = S / number of valid responses, at least 1 counted.

    https://arxiv.org/abs/2504.02546: alpha makes up for responses without a gradient. valid: "nonzero_rewards" counts
    outcomes other than 0, as verl does; "mixed_groups" counts the responses of groups whose rewards are not all
    equal: the authors' B / (B - M). The KL penalty counts in r, not in alpha.
    """
    if valid not in ("nonzero_rewards", "mixed_groups"):
        raise ValueError(f"algorithm.adv_params.valid={valid}: choose nonzero_rewards or mixed_groups")
    if not f_norm > 0.0:
        raise ValueError(f"algorithm.adv_params.f_norm={f_norm}: it divides the advantages; set it above 0, e.g. 1.0")
    groups, outcome = Groups.of(x), x.rewards.double()
    counted = outcome != 0.0 if valid == "nonzero_rewards" else groups.lowest(outcome) != groups.highest(outcome)
    alpha = len(outcome) / max(int(counted.sum()), 1)
    return _spread(x, alpha / f_norm * groups.centred(total_rewards(x)))


def max_rl(x: AdvantageInput) -> Advantages:
    """A = (r - mean r) / (mean r + 1e-6) over the group, 0 where no response has a reward: maximum likelihood.

    https://arxiv.org/abs/2602.02710: with rewards 0 or 1 and K successes the gradient is the mean over the successes
    of grad log pi, an estimate of grad log P(success). Ours: a KL penalty k is part of the objective, not of its
    likelihood, so k - mean k is added and not divided. Raises ValueError for a reward below 0, which is no likelihood.
    """
    outcome, groups = x.rewards.double(), Groups.of(x)
    negative = int((outcome < 0.0).sum())
    if negative:
        raise ValueError(
            f"algorithm.adv_estimator=max_rl: {negative} of {len(outcome)} rewards are below 0 (lowest: "
            f"{float(outcome.min())}); it takes rewards for probabilities of success: give 0 for a failure"
        )
    success = groups.centred(outcome) / (groups.mean(outcome) + GROUP_EPS)
    return _spread(x, success + groups.centred(token_reward_sums(x)))


def reinforce_plus_plus_baseline(x: AdvantageInput) -> Advantages:
    """r - mean r over the group, then whitened over the tokens of the batch.

    https://arxiv.org/abs/2501.03262, the variant with baseline. Responses that are alone take no part.
    """
    groups = Groups.of(x)
    return _whiten_tokens(x, groups.centred(total_rewards(x)), ~groups.alone)


def gdpo(
    x: AdvantageInput,
    *,
    norm_by_std: bool,
    weights: Mapping[str, float] | None = None,
    whiten_over: Literal["tokens", "sequences"] = "tokens",
) -> Advantages:
    """Each part of the reward normalised over its group as in GRPO, their weighted sum whitened over the batch.

    https://arxiv.org/abs/2601.05242. weights: by part; None: 1 for every part that the reward function returns.
    whiten_over: "tokens" counts a response once per token, as verl and the authors' code for verl do; "sequences"
    once, as the authors' code for TRL does. Ours: a KL penalty k is added as k - mean k before whitening.
    Responses that are alone take no part. Raises ValueError without parts, or for a part that some rewards lack.
    """
    if whiten_over not in ("tokens", "sequences"):
        raise ValueError(f"algorithm.adv_params.whiten_over={whiten_over}: choose tokens or sequences")
    groups = Groups.of(x)
    total = groups.centred(token_reward_sums(x))
    for name, weight in _part_weights(x, weights).items():
        total += weight * _normalised(_part(x, name), groups, norm_by_std=norm_by_std)
    if whiten_over == "tokens":
        return _whiten_tokens(x, total, ~groups.alone)
    total[~groups.alone] = whiten(total[~groups.alone])
    return _spread(x, total)


def _spread(x: AdvantageInput, advantages: Tensor) -> Advantages:
    return Advantages(Tokens.of(x).spread(advantages))


def _normalised(values: Tensor, groups: Groups, *, norm_by_std: bool) -> Tensor:
    centred = groups.centred(values)
    return centred / (groups.std(centred) + GROUP_EPS) if norm_by_std else centred


def _whiten_tokens(x: AdvantageInput, values: Tensor, keep: Tensor) -> Advantages:
    """Values [S] of the sequences to keep [S], whitened over their chosen tokens; 0 for the others."""
    tokens = Tokens.of(x)
    kept = keep[tokens.sequence]
    result = torch.zeros(len(kept), dtype=torch.float64)
    result[kept] = whiten(values[tokens.sequence][kept])
    return Advantages(tokens.scatter(result))


def _part_weights(x: AdvantageInput, weights: Mapping[str, float] | None) -> Mapping[str, float]:
    if not x.parts:
        raise ValueError(
            "algorithm.adv_estimator=gdpo: the rewards have no parts; let the reward function return a dictionary with "
            '"score" and a number for each part'
        )
    if weights is None:
        return dict.fromkeys(x.parts, 1.0)
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"algorithm.adv_params.weights={weights}: must name parts of the reward with their weights")
    for name, weight in weights.items():
        if name not in x.parts:
            raise ValueError(
                f"algorithm.adv_params.weights.{name}: the rewards have no such part; they have {', '.join(x.parts)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"algorithm.adv_params.weights.{name}={weight}: must be a finite number")
    return weights


def _part(x: AdvantageInput, name: str) -> Tensor:
    check_finite(
        x.parts[name],
        f"part {name} of the rewards",
        "for algorithm.adv_estimator=gdpo the reward function must return each part, finite, with every response",
    )
    return x.parts[name].double()
