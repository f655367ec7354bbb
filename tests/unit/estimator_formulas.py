"""Advantage estimators written out with Python loops over sequences, in float64, and ragged batches to try them on.

Nothing here is shared with the code under test: a formula is a list of one number per chosen token of each sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from trainer.algorithms.advantages import AdvantageInput, Advantages, estimator
from trainer.config.schema import AlgorithmConfig

SETTINGS = MappingProxyType({"gamma": 0.9, "lam": 0.8, "norm_adv_by_std_in_grpo": True})
GROUP = ("grpo", "dr_grpo", "rloo", "opo", "grpo_passk", "gpg", "max_rl", "reinforce_plus_plus_baseline", "gdpo")
EVERY = (*GROUP, "gae", "reinforce_plus_plus", "remax", "optimal_token_baseline")
WHITENED = ("gae", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gdpo")
Table = list[list[float]]


def run(name: str, x: AdvantageInput, params: dict[str, Any] | None = None, **settings: Any) -> Advantages:
    """The estimator as the trainer calls it."""
    return estimator(name, params)(x, AlgorithmConfig.model_construct(**{**SETTINGS, **settings}))


def make_batch(
    seed: int, sizes: list[int], *, masked: bool, paid: bool, binary: bool, longest: int = 6
) -> AdvantageInput:
    """Groups of these sizes, in mixed order, with responses of 0 to `longest` tokens and every column there is."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.randperm(len(sizes), generator=generator) * 3, torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    num = len(group)
    lengths = torch.randint(0, longest + 1, (num,), generator=generator)
    total = int(lengths.sum())

    def outcome() -> Tensor:
        if binary:
            return torch.randint(0, 2, (num,), generator=generator).float()
        return torch.rand(num, generator=generator) * 3.0

    vocabulary = torch.randn(total, 7, generator=generator).softmax(dim=-1)
    token = torch.randint(0, 7, (total, 1), generator=generator)
    return AdvantageInput(
        rewards=outcome(),
        group=group,
        lengths=lengths,
        token_rewards=0.1 * torch.randn(total, generator=generator) if paid else None,
        values=torch.randn(total, generator=generator),
        loss_mask=torch.rand(total, generator=generator) > 0.4 if masked else None,
        parts={"answer": outcome(), "format": torch.randint(0, 2, (num,), generator=generator).float()},
        baseline=outcome(),
        logprobs=vocabulary.gather(1, token).log().flatten(),
        sum_pi_squared=vocabulary.square().sum(dim=-1),
    )


@st.composite
def batches(draw: st.DrawFn) -> AdvantageInput:
    """Any ragged batch: groups of one to five responses, of any length, masked or not, with a KL penalty or without."""
    return make_batch(
        draw(st.integers(0, 2**31 - 1)),
        draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)),
        masked=draw(st.booleans()),
        paid=draw(st.booleans()),
        binary=draw(st.booleans()),
    )


def take(x: AdvantageInput, order: list[int]) -> AdvantageInput:
    """The batch with these sequences, in this order."""
    rows, pieces = torch.tensor(order, dtype=torch.int64), tokens_of(x)
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *[pieces[row] for row in order]])

    def pick(column: Tensor | None, at: Tensor) -> Tensor | None:
        return None if column is None else column[at]

    return replace(
        x,
        rewards=x.rewards[rows],
        group=x.group[rows],
        lengths=x.lengths[rows],
        parts={name: part[rows] for name, part in x.parts.items()},
        baseline=pick(x.baseline, rows),
        token_rewards=pick(x.token_rewards, index),
        values=pick(x.values, index),
        loss_mask=pick(x.loss_mask, index),
        logprobs=pick(x.logprobs, index),
        sum_pi_squared=pick(x.sum_pi_squared, index),
    )


def tokens_of(x: AdvantageInput) -> list[Tensor]:
    """Positions of each sequence's tokens in the flat columns."""
    return list(torch.arange(int(x.lengths.sum())).split(x.lengths.tolist()))


@dataclass
class Row:
    """One sequence: its chosen tokens alone."""

    group: int
    reward: float
    baseline: float
    parts: dict[str, float]
    paid: list[float]
    values: list[float]
    norms: list[float]

    @property
    def total(self) -> float:
        return self.reward + sum(self.paid)

    def to_go(self, gamma: float = 1.0) -> list[float]:
        """Discounted reward to come, the outcome paid at the last chosen token."""
        result: list[float] = []
        for t in range(len(self.paid)):
            coming = sum(gamma ** (u - t) * self.paid[u] for u in range(t, len(self.paid)))
            result.append(coming + gamma ** (len(self.paid) - 1 - t) * self.reward)
        return result


def rows_of(x: AdvantageInput) -> list[Row]:
    rows = []
    for s, index in enumerate(tokens_of(x)):
        kept = [int(i) for i in index if x.loss_mask is None or bool(x.loss_mask[i])]
        pi = [math.exp(float(x.logprobs[i])) if x.logprobs is not None else 0.0 for i in kept]
        square = [float(x.sum_pi_squared[i]) if x.sum_pi_squared is not None else 0.0 for i in kept]
        rows.append(
            Row(
                group=int(x.group[s]),
                reward=float(x.rewards[s]),
                baseline=0.0 if x.baseline is None else float(x.baseline[s]),
                parts={name: float(part[s]) for name, part in x.parts.items()},
                paid=[0.0 if x.token_rewards is None else float(x.token_rewards[i]) for i in kept],
                values=[0.0 if x.values is None else float(x.values[i]) for i in kept],
                norms=[1.0 - 2.0 * p + q for p, q in zip(pi, square, strict=True)],
            )
        )
    return rows


def flat(x: AdvantageInput, table: Table) -> Tensor:
    """The numbers of chosen tokens among all tokens, 0 elsewhere."""
    result = torch.zeros(int(x.lengths.sum()))
    for index, numbers in zip(tokens_of(x), table, strict=True):
        kept = [int(i) for i in index if x.loss_mask is None or bool(x.loss_mask[i])]
        assert len(kept) == len(numbers)
        for i, number in zip(kept, numbers, strict=True):
            result[i] = number
    return result


def peers(rows: list[Row], row: Row) -> list[Row]:
    return [other for other in rows if other.group == row.group]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def std(values: list[float]) -> float:
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


def per_row(rows: list[Row], advantage: Callable[[Row, list[Row]], float]) -> Table:
    """One number for each sequence that has something to be compared with."""
    table = []
    for row in rows:
        group = peers(rows, row)
        table.append([advantage(row, group) if len(group) > 1 else 0.0] * len(row.paid))
    return table


def whitened(table: Table) -> Table:
    numbers = [n for line in table for n in line]
    if len(numbers) < 2:
        return [[0.0] * len(line) for line in table]
    centre = mean(numbers)
    scale = math.sqrt(sum((n - centre) ** 2 for n in numbers) / (len(numbers) - 1) + 1e-8)
    return [[(n - centre) / scale for n in line] for line in table]


def whitened_in_company(rows: list[Row], table: Table) -> Table:
    """Whitened over the sequences that are not alone in their group."""
    company = [len(peers(rows, row)) > 1 for row in rows]
    result = whitened([line if c else [] for line, c in zip(table, company, strict=True)])
    return [line if c else [0.0] * len(row.paid) for row, line, c in zip(rows, result, company, strict=True)]


def gae(rows: list[Row]) -> Table:
    """Sum of the discounted temporal differences, written out."""
    gamma, lam, table = SETTINGS["gamma"], SETTINGS["lam"], []
    for row in rows:
        n = len(row.paid)
        reward = [row.paid[t] + (row.reward if t == n - 1 else 0.0) for t in range(n)]
        delta = [reward[t] + (gamma * row.values[t + 1] if t + 1 < n else 0.0) - row.values[t] for t in range(n)]
        table.append([sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)])
    return whitened(table)


def rloo(row: Row, group: list[Row]) -> float:
    return row.total - mean([other.total for other in group if other is not row])


def opo(row: Row, group: list[Row]) -> float:
    weight = sum(len(other.paid) for other in group)
    return row.total - sum(len(o.paid) * o.total for o in group) / weight if weight else 0.0


def grpo_passk(row: Row, group: list[Row]) -> float:
    """The maximum of the group with this response, less the maximum without it."""
    gain = max(o.total for o in group) - max(o.total for o in group if o is not row)
    return gain / (std([o.total for o in group]) + 1e-6)


def gpg(rows: list[Row]) -> Table:
    alpha = len(rows) / max(sum(row.reward != 0.0 for row in rows), 1)
    return per_row(rows, lambda row, group: alpha * (row.total - mean([o.total for o in group])))


def max_rl(row: Row, group: list[Row]) -> float:
    success = mean([o.reward for o in group])
    penalty = sum(row.paid) - mean([sum(o.paid) for o in group])
    return (row.reward - success) / (success + 1e-6) + penalty


def gdpo(rows: list[Row], weights: dict[str, float] | None = None) -> Table:
    def advantage(row: Row, group: list[Row]) -> float:
        result = sum(row.paid) - mean([sum(o.paid) for o in group])
        for name, weight in (weights or {"answer": 1.0, "format": 1.0}).items():
            part = [o.parts[name] for o in group]
            result += weight * (row.parts[name] - mean(part)) / (std(part) + 1e-6)
        return result

    return whitened_in_company(rows, per_row(rows, advantage))


def optimal_token_baseline(rows: list[Row], *, zero_tail: bool = True) -> Table:
    """As verl writes it, with 1e-8 in the denominator."""
    table = []
    for row in rows:
        group = [other for other in peers(rows, row) if other.paid]
        line = []
        for t, to_go in enumerate(row.to_go()):
            there = [o for o in group if len(o.paid) > t]
            weight = [sum(o.norms[: t + 1]) for o in there]
            baseline = sum(w * o.to_go()[t] for w, o in zip(weight, there, strict=True)) / (sum(weight) + 1e-8)
            if len(there) == 1 and zero_tail:
                baseline = 0.0
            line.append(to_go - baseline if len(group) > 1 else 0.0)
        table.append(line)
    return table


FORMULAS: dict[str, Callable[[list[Row]], Table]] = {
    "gae": gae,
    "grpo": lambda rows: per_row(
        rows, lambda row, g: (row.total - mean([o.total for o in g])) / (std([o.total for o in g]) + 1e-6)
    ),
    "dr_grpo": lambda rows: per_row(rows, lambda row, g: row.total - mean([o.total for o in g])),
    "rloo": lambda rows: per_row(rows, rloo),
    "reinforce_plus_plus": lambda rows: whitened([row.to_go(SETTINGS["gamma"]) for row in rows]),
    "reinforce_plus_plus_baseline": lambda rows: whitened_in_company(rows, FORMULAS["dr_grpo"](rows)),
    "remax": lambda rows: [[g - row.baseline for g in row.to_go()] for row in rows],
    "opo": lambda rows: per_row(rows, opo),
    "grpo_passk": lambda rows: per_row(rows, grpo_passk),
    "gpg": gpg,
    "gdpo": gdpo,
    "optimal_token_baseline": optimal_token_baseline,
    "max_rl": lambda rows: per_row(rows, max_rl),
}
