"""Algorithms of a user's own, as a user would write them."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.algorithms.advantages import AdvantageInput, Advantages


def sign(x: AdvantageInput, *, scale: float = 1.0) -> Tensor:
    """+ scale for a reward above one half, - scale for others, at every token."""
    return torch.repeat_interleave(torch.where(x.rewards > 0.5, scale, -scale), x.lengths)


def less_value(x: AdvantageInput, **params: float) -> Advantages:
    assert x.values is not None
    advantages = torch.repeat_interleave(x.rewards, x.lengths) - params["weight"] * x.values
    return Advantages(advantages, returns=advantages + x.values)


less_value.needs = ("values", "groups")  # type: ignore[attr-defined]


def needs_a_limit(x: AdvantageInput, *, limit: float) -> Tensor:
    return torch.full_like(x.rewards, limit)  # wrong: one number per sequence


def greedy(x: AdvantageInput) -> Tensor:
    return torch.zeros(0)


greedy.needs = "everything"  # type: ignore[attr-defined]


def odd(x: AdvantageInput) -> Tensor:
    return torch.zeros(0)


odd.needs = 5  # type: ignore[attr-defined]


def infinite(x: AdvantageInput) -> Tensor:
    return torch.full((int(x.lengths.sum()),), float("inf"))


def a_list(x: AdvantageInput) -> list[float]:
    return [0.0] * int(x.lengths.sum())


NUMBER = 3
