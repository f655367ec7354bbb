"""What a policy objective is given and what it returns.

An objective is a frozen dataclass whose fields are its parameters: it travels to the training workers. It is called
once per micro-batch and must not take statistics over several of its sequences, which would depend on the split; what
needs them is chosen beforehand over the whole batch (`driver_columns`) and arrives as a column.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

ACTOR = "actor_rollout_ref.actor"
PARAMS = f"{ACTOR}.policy_loss.params"


@dataclass(frozen=True, slots=True)
class ObjectiveInput:
    """One micro-batch as a policy objective sees it: R response tokens of num_sequences whole sequences.

    logprobs: [R] of the policy, with gradient; 0 where masked.
    old: [R] log-probs the ratio is taken against; 0 where masked. They equal `logprobs` where a batch gives one update.
    log_ratio: [R] logprobs - old, with gradient, held within +-20.
    advantages: [R]; 0 where masked.
    mask: [R] bool, tokens that the model chose.
    sequence: [R] int64, which sequence of the micro-batch a token belongs to.
    columns: further per-token fields [R] by name; what they hold where masked is not defined.
    sampler: [R] log-probs that the sampler reported (NaN: not asked), or None.
    """

    logprobs: Tensor
    old: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    sequence: Tensor
    num_sequences: int
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    sampler: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss per token and which bounds were active, all [R].

    metrics: scalars by name, each already a share of the mini-batch's, or with a name ending in `_max` or `_min`.
    """

    loss: Tensor
    clipped: Tensor
    clipped_lower: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BatchInput:
    """The whole batch of a step, on the driver. R tokens in all, S sequences.

    old: [R] log-probs of before the first update (with bypass_mode: the sampler's). advantages: [R].
    mask: [R] bool. lengths: [S] int64. sampler: [R] or None.
    """

    old: Tensor
    advantages: Tensor
    mask: Tensor
    lengths: Tensor
    sampler: Tensor | None = None


class PolicyObjective(ABC):
    """A policy loss per token.

    agg_mode: the aggregation that the loss is defined with; None: the configuration's.
    columns: the per-token columns it needs from the driver.
    """

    __slots__ = ()
    agg_mode: ClassVar[str | None] = None
    columns: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, x: ObjectiveInput) -> Objective:
        """The loss of each token of a micro-batch."""

    def driver_columns(self, x: BatchInput, seed: tuple[int, ...]) -> dict[str, Tensor]:
        """The columns [R] float32 named in `columns`, chosen over the whole batch; the same for the same seed."""
        return {}


def unclipped(loss: Tensor) -> Objective:
    """The result of a loss without bounds."""
    never = torch.zeros_like(loss, dtype=torch.bool)
    return Objective(loss, never, never)


def sequence_sum(values: Tensor, x: ObjectiveInput) -> Tensor:
    """Sum over the masked-in tokens of each sequence, [num_sequences]."""
    return sum_by_sequence(values, x.mask, x.sequence, x.num_sequences)


def sequence_mean(values: Tensor, x: ObjectiveInput) -> Tensor:
    """Mean over the masked-in tokens of each sequence, [num_sequences]; 0 where it has none."""
    return sequence_sum(values, x) / sequence_sum(torch.ones_like(values), x).clamp(min=1.0)


def sum_by_sequence(values: Tensor, mask: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sum of values [R] over the masked-in tokens of each sequence, [num_sequences]; a masked token may hold NaN."""
    return values.new_zeros(num_sequences).index_add(0, sequence, torch.where(mask, values, 0.0))


def check_number(name: str, value: object, *, above: float | None = None, at_least: float | None = None) -> float:
    """The parameter as a finite number within its limits. Raises ValueError naming key, value and remedy."""
    key = f"{PARAMS}.{name}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{key}={value!r}: not a number; give a finite one")
    if above is not None and value <= above:
        raise ValueError(f"{key}={value}: must be above {above:g}; raise it")
    if at_least is not None and value < at_least:
        raise ValueError(f"{key}={value}: must not be below {at_least:g}; raise it")
    return float(value)


def check_clip_range(low: float, high: float) -> None:
    """Raises ValueError for a range [1 - low, 1 + high] that does not hold 1."""
    for name, value in (("clip_ratio_low", low), ("clip_ratio_high", high)):
        if not value >= 0.0:
            raise ValueError(f"{ACTOR}.{name}={value}: the clip range would not hold ratio 1; set it to 0 or more")


def check_clip_c(value: float) -> None:
    """Raises ValueError for a dual-clip constant that would cut off ratio 1."""
    if not value > 1.0:
        raise ValueError(f"{ACTOR}.clip_ratio_c={value}: bounds the ratio from above; set it above 1, e.g. 3.0")
