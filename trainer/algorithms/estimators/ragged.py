"""What advantage estimators compute on, and sums over sequences, groups and batches of ragged tensors.

S sequences, R response tokens in all, flat in sequence order; C of them chosen by the model. Everything is summed in
float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

WHITEN_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class AdvantageInput:
    """What every estimator may use.

    rewards: [S] float32, the outcome of each sequence, paid at its last chosen token.
    group: [S] int64, responses to one prompt share it.
    lengths: [S] int64, response tokens of each sequence.
    token_rewards: [R] float32, paid on top of the outcome (a KL penalty, already negative), or None.
    values: [R] float32, the critic's prediction before each token, or None.
    loss_mask: [R] bool, False where the model did not choose the token (tool output), or None: all True.
    parts: name -> [S] float32, the parts of the reward; NaN where a reward came without that part.
    baseline: [S] float32, reward of the greedy response to the same prompt, or None.
    logprobs: [R] float32, log-prob of each token under the policy that is about to be updated, or None.
    sum_pi_squared: [R] float32, sum over the vocabulary of its squared probabilities at each token, or None.

    Raises ValueError where a reward, a baseline, or a token reward inside the mask is not finite.
    """

    rewards: Tensor
    group: Tensor
    lengths: Tensor
    token_rewards: Tensor | None = None
    values: Tensor | None = None
    loss_mask: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    baseline: Tensor | None = None
    logprobs: Tensor | None = None
    sum_pi_squared: Tensor | None = None

    def __post_init__(self) -> None:
        assert len(self.rewards) == len(self.group) == len(self.lengths)
        check_finite(self.rewards, "the rewards of the responses", "a reward function must return finite numbers")
        if self.baseline is not None:
            check_finite(self.baseline, "the greedy baselines", "a reward function must return finite numbers")
        if self.token_rewards is not None:
            paid = self.token_rewards if self.loss_mask is None else self.token_rewards[self.loss_mask]
            check_finite(
                paid,
                "the KL penalties of the tokens",
                "the policy or the reference gave a log-prob that is not finite; use the k1 estimator "
                "(algorithm.kl_penalty=kl), or a lower learning rate",
            )


@dataclass(frozen=True, slots=True)
class Advantages:
    """advantages: [R] float32. returns: [R] float32, what the critic learns, or None. Both 0 where masked."""

    advantages: Tensor
    returns: Tensor | None = None


def check_finite(values: Tensor, what: str, remedy: str) -> None:
    """Raises ValueError that counts the values that are not finite and quotes the first."""
    wrong = torch.nonzero(~torch.isfinite(values)).flatten()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{len(wrong)} of {len(values)} numbers are not finite in {what} (first: number {first} is "
            f"{float(values[first])}); {remedy}"
        )


def sequence_ids(lengths: Tensor) -> Tensor:
    """Which sequence each of the R tokens belongs to, [R] int64, from lengths [S]."""
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that the model chose. chosen: [R] bool; sequence: [C] int64, which sequence each belongs to."""

    chosen: Tensor
    sequence: Tensor

    @staticmethod
    def of(x: AdvantageInput) -> Tokens:
        """Of a batch; tokens outside the loss mask are passed over, as if they were not there."""
        ids = sequence_ids(x.lengths)
        chosen = torch.ones(len(ids), dtype=torch.bool) if x.loss_mask is None else x.loss_mask
        return Tokens(chosen, ids[chosen])

    def rewards(self, x: AdvantageInput) -> Tensor:
        """Reward of each chosen token, [C] float64: token rewards, and the outcome at each sequence's last one."""
        last = torch.ones(len(self.sequence), dtype=torch.bool)
        last[:-1] = self.sequence[1:] != self.sequence[:-1]
        outcome = torch.where(last, x.rewards.double()[self.sequence], 0.0)
        return outcome if x.token_rewards is None else outcome + x.token_rewards[self.chosen].double()

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the chosen tokens [C] among all tokens, [R] float32; 0 elsewhere."""
        return torch.zeros(len(self.chosen)).masked_scatter_(self.chosen, values.float())

    def spread(self, values: Tensor) -> Tensor:
        """One value per sequence [S] at each of its chosen tokens, [R] float32; 0 elsewhere."""
        return self.scatter(values[self.sequence])


@dataclass(frozen=True, slots=True)
class Groups:
    """Which sequences answer the same prompt. member: [S] int64, in 0 .. G-1; size: [G] float64."""

    member: Tensor
    size: Tensor

    @staticmethod
    def of(x: AdvantageInput) -> Groups:
        """Of a batch; groups may have different sizes, as a response whose reward failed is left out."""
        member = torch.unique(x.group, return_inverse=True)[1]
        return Groups(member, torch.bincount(member).double())

    @property
    def alone(self) -> Tensor:
        """[S] bool, True where a group has one response: there is nothing to compare it with."""
        return self.size[self.member] < 2.0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each group, [G], of values [S] float64."""
        return torch.zeros_like(self.size).index_add_(0, self.member, values)

    def lowest(self, values: Tensor) -> Tensor:
        """The lowest of the group at each of its sequences, [S]."""
        return self._extreme(values, "amin")

    def highest(self, values: Tensor) -> Tensor:
        """The highest of the group at each of its sequences, [S]."""
        return self._extreme(values, "amax")

    def mean(self, values: Tensor) -> Tensor:
        """Mean of the group at each of its sequences, [S]."""
        return (self.sum(values) / self.size)[self.member]

    def centred(self, values: Tensor) -> Tensor:
        """Values [S] less the mean of their group; exactly 0 where a group's values are the same float32 number."""
        return values - self.mean(values)  # float64 holds the sum of float32 numbers exactly

    def std(self, centred: Tensor) -> Tensor:
        """Unbiased standard deviation of the group at each of its sequences, [S], from centred values; 0 if alone."""
        variance = self.sum(centred.square()) / (self.size - 1.0).clamp(min=1.0)
        return variance.sqrt()[self.member]

    def _extreme(self, values: Tensor, reduce: str) -> Tensor:
        return torch.zeros_like(self.size).scatter_reduce(0, self.member, values, reduce, include_self=False)[
            self.member
        ]


def token_reward_sums(x: AdvantageInput) -> Tensor:
    """Token rewards of each sequence's chosen tokens, [S] float64; zeros where there are none."""
    total = torch.zeros(len(x.rewards), dtype=torch.float64)
    if x.token_rewards is None:
        return total
    tokens = Tokens.of(x)
    return total.index_add_(0, tokens.sequence, x.token_rewards[tokens.chosen].double())


def total_rewards(x: AdvantageInput) -> Tensor:
    """Outcome plus token rewards of each sequence, [S] float64."""
    return x.rewards.double() + token_reward_sums(x)


def chosen_lengths(x: AdvantageInput) -> Tensor:
    """Tokens of each sequence that the model chose, [S] float64."""
    return torch.bincount(Tokens.of(x).sequence, minlength=len(x.lengths)).double()


def suffix_sum(x: Tensor, sequence: Tensor, discount: float = 1.0) -> Tensor:
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


def prefix_sum(x: Tensor, sequence: Tensor) -> Tensor:
    """y_t = x_t + y_{t-1} within each sequence, [C]."""
    return suffix_sum(x.flip(0), sequence.flip(0)).flip(0)


def whiten(x: Tensor) -> Tensor:
    """Mean 0, unbiased variance 1; values that are all equal, or a single one, become 0."""
    if x.numel() < 2:
        return torch.zeros_like(x)
    variance, mean = torch.var_mean(x)
    return (x - mean) * torch.rsqrt(variance + WHITEN_EPS)
