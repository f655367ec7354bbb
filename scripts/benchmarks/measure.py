"""What a run directory says about speed. Pure: reads metrics.jsonl and summary.json, starts nothing.

The first step is left out of everything per step: it warms caches and allocators. Validation is left out of a step,
since how often to validate is the user's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.tracking.run_data import History

WORK = ("generate", "update", "sync")
"""Phases that a step is for. All else (score, annotate, other, between) is overhead of driver and Ray."""
PHASES = ("generate", "score", "annotate", "update", "sync", "other", "between")
MEMORY = {
    "driver": "memory/driver_rss_bytes",
    "training": "memory/train_peak_bytes",
    "rollout": "memory/rollout_peak_bytes",
}

Result = dict[str, Any]


def measure(history: History, summary: Mapping[str, Any]) -> Result:
    """Speed of one run, as JSON. Seconds, bytes, tokens; shares are of the time of all steps but the first.

    "between" is what happens between the end of one step's clock and the start of the next: writing the step's line,
    showing completions. No step's line can hold it, so it is what the summary's total has more than the lines, spread
    evenly. seconds_per_step contains it.

    Raises ValueError for a run of fewer than two steps.
    """
    phases = phase_seconds(history, summary)
    steps = np.sum(list(phases.values()), axis=0)
    shares = share_of_each(phases)
    return {
        "steps": len(steps) + 1,
        "seconds_per_step": spread(steps),
        "phases": {name: {"seconds": float(np.median(phases[name])), "share": shares[name]} for name in phases},
        "overhead_share": sum(share for name, share in shares.items() if name not in WORK),
        "seconds_to_first_step": summary["seconds_to_first_step"],
        "seconds_total": summary["seconds_total"],
        "tokens_per_second": sum(history.values("perf/tokens")[1:]) / float(steps.sum()),
        "generate_tokens_per_second": float(np.median(history.values("perf/generate_tokens_per_second")[1:])),
        "peak_memory_bytes": {kind: max(history.values(name)) for kind, name in MEMORY.items() if history.of(name)},
        "accuracy_after": summary["accuracy_after"],
        "greedy_after": summary["greedy_after"],
        "mismatch_logprob_abs_diff_mean": _mean(history.values("mismatch/logprob_abs_diff_mean")),
    }


def phase_seconds(history: History, summary: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Per phase of PHASES the seconds of each step but the first [num_steps - 1], zeros where a step had none."""
    steps = [step for step, _ in history.of("time/step") if step > 0]
    if len(steps) < 2:
        raise ValueError(f"a run of {len(steps)} step(s) tells no seconds per step; run at least two")
    counted = {name: dict(history.of(f"time/{name}")) for name in PHASES if name != "between"}
    between = _seconds_between(counted["other"], summary, num_steps=len(steps))
    seconds = {name: np.array([found.get(step, 0.0) for step in steps[1:]]) for name, found in counted.items()}
    return seconds | {"between": np.full(len(steps) - 1, between)}


def share_of_each(phases: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Of the time of all phases and steps, each phase's share."""
    total = sum(float(seconds.sum()) for seconds in phases.values())
    return {name: float(seconds.sum()) / total for name, seconds in phases.items()}


def phase_memory(history: History) -> dict[str, list[float]]:
    """Per phase the most memory in use on the device during it, bytes, in every step; only what the run measured."""
    found = {name: history.of(f"memory/{name}_peak_bytes") for name in PHASES}
    return {name: [value for step, value in points if step > 0] for name, points in found.items() if points}


def memory_growth(peaks: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Bytes of the last step's peak over the second's, per phase; the first step fills caches."""
    return {name: steps[-1] - steps[min(1, len(steps) - 1)] for name, steps in peaks.items()}


def memory_growth_share(peaks: Mapping[str, Sequence[float]]) -> float | None:
    """The phase that grew most: its growth as a share of its largest peak. None: no memory was measured."""
    growth = memory_growth(peaks)
    return max((growth[name] / max(steps) for name, steps in peaks.items()), default=None)


def spread(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 10th and 90th percentile and mean."""
    p10, median, p90 = (float(value) for value in np.percentile(seconds, (10, 50, 90)))
    return {"median": median, "p10": p10, "p90": p90, "mean": float(np.mean(seconds))}


def combine(results: Sequence[Result]) -> Result:
    """One result of several runs of the same command: of each number the median over the runs, None where one is."""
    first = results[0]
    return {key: _median([result[key] for result in results]) for key in first}


def _median(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _median([value[key] for value in values]) for key in values[0]}
    return None if None in values else float(np.median(values))


def _seconds_between(other: Mapping[int, float], summary: Mapping[str, Any], *, num_steps: int) -> float:
    """Seconds per step that the summary counts as "other" and no line does."""
    return max(0.0, float(summary["seconds_per_phase"].get("other", 0.0)) - sum(other.values())) / num_steps


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
