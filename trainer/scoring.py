"""What becomes of rewards that could not be computed: counted, told, left out; too many of them end the run."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np

from trainer.samples import Samples

_log = logging.getLogger(__name__)  # not configured: warnings go to standard error as they are


class RewardErrorRate(RuntimeError):
    """More rewards failed in one step than reward.max_error_rate allows."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Responses of a step that were scored before, by other calls: how many, and how many of these failed."""

    asked: int = 0
    failed: int = 0


def drop_failed(
    samples: Samples, *, max_error_rate: float, before: Scored = Scored()
) -> tuple[Samples, dict[str, float]]:
    """The samples whose reward is known, and the metrics that count the others of this call.

    A failed reward is never a zero: the response takes no part in the step. before: what else counts for the rate, as
    one failure in a call of a few responses says little. Raises RewardErrorRate above the rate, or where no response
    is left.
    """
    kept = np.flatnonzero(np.fromiter((not e for e in samples.errors), dtype=np.bool_, count=len(samples.errors)))
    failed = len(samples) - len(kept)
    metrics = {"reward/errors": float(failed), "reward/error_rate": failed / max(1, len(samples))}
    all_failed, asked = before.failed + failed, before.asked + len(samples)
    rate = all_failed / max(1, asked)
    if failed:
        common = Counter(e for e in samples.errors if e).most_common(3)
        told = "; ".join(f"{count} x {message}" for message, count in common)
        if rate > max_error_rate or all_failed == asked:
            raise RewardErrorRate(
                f"{all_failed} of {asked} rewards failed ({rate:.1%}), more than reward.max_error_rate="
                f"{max_error_rate}: {told}. Mend the reward function, or raise reward.timeout_s or "
                "reward.max_error_rate"
            )
        _log.warning("warning: %d of %d rewards failed and are left out: %s", failed, len(samples), told)
    return (samples.take(kept) if failed else samples), metrics
