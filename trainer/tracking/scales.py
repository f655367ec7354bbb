"""Numbers to positions and labels: ticks, domains, downsampling. Pure functions, no drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
SMALLEST = 1e-300
"""Numbers below are shown as 0: between them there is no room for marks."""


@dataclass(frozen=True)
class Bucketed:
    """A series short enough to draw: `num_steps` original points in at most `limit` buckets.

    points: mean x and mean y of each bucket. low, high: extremes of y in each bucket, empty if nothing was merged.
    """

    points: list[Point]
    low: list[float]
    high: list[float]


def downsample(points: Sequence[Point], limit: int) -> Bucketed:
    """Merge neighbours until at most `limit` are left. The first and the last point keep buckets of their own, so
    that a curve begins and ends where the run did."""
    if len(points) <= limit:
        return Bucketed(list(points), [], [])
    inner = points[1:-1]
    num_buckets = limit - 2
    edges = [index * len(inner) // num_buckets for index in range(num_buckets + 1)]
    buckets = [[points[0]], *(list(inner[a:b]) for a, b in pairwise(edges)), [points[-1]]]
    merged = [(_mean([x for x, _ in bucket]), _mean([y for _, y in bucket])) for bucket in buckets]
    low = [min(y for _, y in bucket) for bucket in buckets]
    high = [max(y for _, y in bucket) for bucket in buckets]
    return Bucketed(merged, low, high)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that cover [low, high]: 1, 2, 2.5 or 5 times a power of ten apart."""
    assert high > low, (low, high)
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def step_ticks(low: float, high: float, count: int) -> list[float]:
    """Whole numbers within [low, high] for the axis of steps."""
    if high <= low:
        return [low]
    candidates = ticks(low, high, count)
    return [value for value in candidates if low <= value <= high and value == int(value)] or [low, high]


def domain(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Range of an axis that shows the values, and zero if asked. A few extreme values, over 3 times the 95th
    percentile of the size of all, are left outside: they would flatten the rest."""
    sizes = sorted(abs(value) for value in values)
    typical = sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]
    shown = [value for value in values if abs(value) <= 3 * typical] if typical > 0 and len(values) >= 10 else values
    low, high = min(shown), max(shown)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), SMALLEST):
        pad = abs(high) * 0.5 if abs(high) > SMALLEST else 1.0
        low, high = (low, high + pad) if low >= 0 else (low - pad, high + pad)
    return low, high


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels with as many digits as tell neighbours apart, all in one notation."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 10000 or 0 < largest < 0.001:
        return [_scientific(value, digits=2) for value in values]
    step = min((b - a for a, b in pairwise(values)), default=largest or 1.0)
    digits = max(0, min(6, -math.floor(math.log10(step) + 1e-9)))
    if any(abs(round(value, digits) - value) > step * 1e-6 for value in values):
        digits += 1
    return [f"{value:.{digits}f}" if value else "0" for value in values]


def readable(value: float) -> str:
    """One value with up to three significant digits: 0.0123, 45.1, 3.2e-6, 12,345."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 999.5:
        return f"{value:,.0f}" if size < 1e7 else _scientific(value)
    if size < 0.001:
        return _scientific(value)
    return f"{value:.3g}"


def _scientific(value: float, *, digits: int = 1) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa.rstrip('0').removesuffix('.')}e{int(exponent)}"
