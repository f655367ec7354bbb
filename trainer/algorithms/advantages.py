"""Advantages: how much better a token was than expected. Pure functions of ragged tensors, run on the driver.

Sums are taken in float64 over the whole batch, so the result does not depend on how the batch is later split.

A new estimator is a function in `estimators/` and a line in `estimators/catalog.py`; one's own needs neither: its
import path is its name. docs/algorithms/advantages.md has formula, source and parameters of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.algorithms import custom
from trainer.algorithms.estimators.catalog import KEY, PARAMS_KEY, Settings, entry
from trainer.algorithms.estimators.ragged import AdvantageInput, Advantages, Tokens, check_finite, sequence_ids

if TYPE_CHECKING:
    from trainer.config.schema import AlgorithmConfig

__all__ = ["AdvantageInput", "Advantages", "Estimator", "estimator", "explained_variance", "sequence_ids"]


@dataclass(frozen=True, slots=True)
class Estimator:
    """An advantage estimator, its parameters, and what it needs.

    name: as in algorithm.adv_estimator. settings: argument -> how to read it from the section `algorithm`.
    """

    name: str
    fn: Callable[..., Advantages | Tensor]
    settings: Settings
    params: Mapping[str, Any]
    needs: frozenset[str]

    @property
    def needs_values(self) -> bool:
        """Whether it needs a critic's values."""
        return "values" in self.needs

    @property
    def needs_baseline(self) -> bool:
        """Whether it needs the reward of a greedy response to each prompt."""
        return "baseline" in self.needs

    @property
    def needs_parts(self) -> bool:
        """Whether it needs the parts of the rewards."""
        return "parts" in self.needs

    @property
    def needs_logprobs(self) -> bool:
        """Whether it needs log-probs of the policy before the update."""
        return "logprobs" in self.needs

    @property
    def needs_sum_pi_squared(self) -> bool:
        """Whether it needs the sum of the squared probabilities at each token."""
        return "sum_pi_squared" in self.needs

    @property
    def needs_groups(self) -> bool:
        """Whether it compares several responses to one prompt."""
        return "groups" in self.needs

    def __call__(self, x: AdvantageInput, cfg: AlgorithmConfig) -> Advantages:
        """The advantages of a batch.

        Raises ValueError for a parameter with an impossible value, for rewards the estimator cannot use, and where the
        result is not one finite number per response token.
        """
        result = self.fn(x, **{name: read(cfg) for name, read in self.settings.items()}, **self.params)
        found = result if isinstance(result, Advantages) else Advantages(result)
        returns = None if found.returns is None else self._checked(found.returns, x, "returns")
        return Advantages(self._checked(found.advantages, x, "advantages"), returns)

    def _checked(self, column: Tensor, x: AdvantageInput, what: str) -> Tensor:
        """float32, and 0 where masked."""
        tokens = int(x.lengths.sum())
        if not isinstance(column, Tensor) or column.shape != (tokens,):
            shape = list(column.shape) if isinstance(column, Tensor) else type(column).__name__
            raise ValueError(
                f"{KEY}={self.name} returned {what} {shape}; it must return one number per token, [{tokens}]"
            )
        values = torch.where(Tokens.of(x).chosen, column.float(), 0.0)
        check_finite(values, f"the {what} of {KEY}={self.name}", "check the rewards and the critic, or the function")
        return values


def estimator(name: str, params: Mapping[str, Any] | None = None) -> Estimator:
    """The estimator of that name (algorithm.adv_estimator), or one's own by import path, with its parameters.

    Raises ValueError for an unknown name (listing the names), a path that leads to no function, and for unknown or
    missing parameters (listing the known ones).
    """
    found, given = entry(name), dict(params or {})
    function = custom.load(found.path, KEY)
    custom.check_params(function, given, key=PARAMS_KEY, owner=f"{KEY}={name}", taken=tuple(found.settings))
    return Estimator(name, function, found.settings, given, found.needs)


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
