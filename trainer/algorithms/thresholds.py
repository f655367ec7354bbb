"""What algorithm.rollout_correction asks for, read from its keys. Imports nothing heavy: it is checked before start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.config.schema import RolloutCorrectionConfig

KEY = "algorithm.rollout_correction"
LEVELS = ("token", "sequence", "geometric")
STATISTICS = tuple(
    f"{level}_k{k}"
    for level in ("token", "seq_sum", "seq_mean", "seq_max")
    for k in (1, 2, 3)
    if (level, k) != ("seq_max", 1)
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """lower <= value <= upper. lower None: only an upper bound."""

    lower: float | None
    upper: float


@dataclass(frozen=True, slots=True)
class Rejection:
    """A token (or its sequence) outside the bounds of a statistic is rejected. statistic: one of STATISTICS."""

    statistic: str
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class Correction:
    """How the loss corrects for a sampler that differs from the trainer. The default corrects nothing.

    level: weigh tokens by trainer / sampler probability of the token, of the sequence (product) or its geometric mean.
    bounds: of that weight: truncated at the upper one, or, where there is a lower one too, 0 outside.
    rejections: tokens outside any of them have weight 0.
    bypass: the loss's ratio is taken against the sampler.
    batch_normalize: the mean weight of the step's batch is 1.
    """

    level: str | None = None
    bounds: Bounds = Bounds(None, 2.0)
    rejections: tuple[Rejection, ...] = ()
    bypass: bool = False
    batch_normalize: bool = False

    @property
    def weighs(self) -> bool:
        """Whether any token can get another weight than 1."""
        return self.level is not None or bool(self.rejections)

    @property
    def needs_sampler(self) -> bool:
        """Whether the sampler's log-probs of every token are needed."""
        return self.weighs or self.bypass


def read_correction(cfg: RolloutCorrectionConfig) -> Correction:
    """The section as a `Correction`. Raises ValueError naming key, value and remedy for a threshold that is none."""
    return Correction(
        level=cfg.rollout_is,
        bounds=weight_bounds(cfg.rollout_is_threshold),
        rejections=read_rejections(cfg.rollout_rs, cfg.rollout_rs_threshold),
        bypass=cfg.bypass_mode,
        batch_normalize=cfg.rollout_is_batch_normalize,
    )


def weight_bounds(threshold: float | str) -> Bounds:
    """A number: truncated at it. "lo_hi": 0 outside (IcePop; "0_hi": masked importance sampling)."""
    return _enclosing_one(f"{KEY}.rollout_is_threshold", str(threshold), remedy='"0.5_5.0" for IcePop')


def read_rejections(names: str | None, thresholds: float | str | None) -> tuple[Rejection, ...]:
    """Statistics and their thresholds, both lists with commas; one threshold serves all."""
    key = f"{KEY}.rollout_rs"
    if names is None:
        if thresholds is not None:
            raise ValueError(f"{key}_threshold={thresholds}: rejects nothing without {key}; set {key}, or this to null")
        return ()
    statistics = [name.strip() for name in names.split(",")]
    for name in statistics:
        if name not in STATISTICS:
            raise ValueError(
                f"{key}={names}: {name or 'an empty name'} is unknown; choose from {', '.join(STATISTICS)}"
            )
    if len(set(statistics)) < len(statistics):
        raise ValueError(f"{key}={names}: names a statistic twice; name each once")
    if thresholds is None:
        raise ValueError(f"{key}_threshold=null: {key}={names} needs it; set one number, or one for each name")
    values = [value.strip() for value in str(thresholds).split(",")]
    if len(values) not in (1, len(statistics)):
        raise ValueError(
            f"{key}_threshold={thresholds}: {len(values)} values for the {len(statistics)} of {key}={names}; "
            "give one, or one for each"
        )
    values *= len(statistics) // len(values)
    return tuple(Rejection(name, _limits(name, value)) for name, value in zip(statistics, values, strict=True))


def _limits(statistic: str, value: str) -> Bounds:
    """k1 is the log of a ratio, so its bounds are bounds of a ratio, and one number stands for 1/number and number."""
    key = f"{KEY}.rollout_rs_threshold"
    if not statistic.endswith("k1"):
        upper = _number(key, value, value)
        if upper <= 0.0:
            raise ValueError(f"{key}={value}: {statistic} is never below 0; set its upper bound above 0, e.g. 0.01")
        return Bounds(None, upper)
    ratio = _enclosing_one(key, value, remedy='"0.999_1.001" as bounds of the ratio')
    lower = 1.0 / ratio.upper if ratio.lower is None else ratio.lower
    if lower <= 0.0:
        raise ValueError(f"{key}={value}: a ratio is above 0; set the lower bound of {statistic} above 0, e.g. 0.5")
    return Bounds(math.log(lower), math.log(ratio.upper))


def _enclosing_one(key: str, text: str, *, remedy: str) -> Bounds:
    """Bounds of a ratio; an exactly matching sampler, whose ratios are 1, must lie inside."""
    parts = text.split("_")
    if len(parts) > 2:
        raise ValueError(f"{key}={text}: neither a number nor two joined by _; write 2.0, or {remedy}")
    numbers = [_number(key, part, text) for part in parts]
    lower, upper = (numbers[0] if len(numbers) == 2 else None), numbers[-1]
    if lower is not None and (lower < 0.0 or lower > upper):
        raise ValueError(f"{key}={text}: the lower bound must be within 0 and the upper bound; write it as {remedy}")
    if upper < 1.0 or (lower is not None and lower > 1.0):
        raise ValueError(f"{key}={text}: leaves out 1, the ratio where sampler and trainer agree; write e.g. {remedy}")
    return Bounds(lower, upper)


def _number(key: str, part: str, text: str) -> float:
    """A part of the text as a finite number."""
    try:
        value = float(part)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f'{key}={text}: not a number; write 2.0, or two joined by _ ("0.5_2.0")')
    return value
