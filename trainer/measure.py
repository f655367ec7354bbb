"""What a step logs about its samples. Names are those of docs/metrics.md."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from trainer.roles import UpdateReport
from trainer.samples import Samples
from workers.protocol import FINISH_REASONS

Metrics = dict[str, float]


def sample_metrics(samples: Samples) -> Metrics:
    """Rewards and lengths of the sequences that count."""
    meta, rewards = samples.meta, samples.rewards
    groups = np.unique(meta.group)
    low = np.full(int(meta.group.max()) + 1, np.inf)
    high = -low
    np.minimum.at(low, meta.group, rewards)
    np.maximum.at(high, meta.group, rewards)
    cut = FINISH_REASONS.index("length")
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/max": float(rewards.max()),
        "reward/min": float(rewards.min()),
        "reward/frac_zero_std_groups": float((low[groups] == high[groups]).mean()),
        "response_length/mean": float(meta.response_length.mean()),
        "response_length/max": float(meta.response_length.max()),
        "response_length/min": float(meta.response_length.min()),
        "response_length/clip_ratio": float((meta.finish_reason == cut).mean()),
        "prompt_length/mean": float(meta.prompt_length.mean()),
        "prompt_length/max": float(meta.prompt_length.max()),
    }
    return metrics | {f"reward/part/{name}": float(np.nanmean(v)) for name, v in samples.parts.items()}


def advantage_metrics(advantages: Tensor) -> Metrics:
    """Over all response tokens."""
    return {
        "advantage/mean": float(advantages.mean()),
        "advantage/std": float(advantages.std(unbiased=False)),
        "advantage/max": float(advantages.max()),
        "advantage/min": float(advantages.min()),
    }


def update_metrics(role: str, report: UpdateReport | None) -> Metrics:
    """What a role's optimizer steps gave; sums become means here, and means of weights the effective sample size."""
    if report is None:
        return {}
    metrics = dict(report.metrics)
    count = metrics.get("mismatch/num_tokens", 0.0)
    for name, mean in (
        ("mismatch/logprob_abs_diff_sum", "mismatch/logprob_abs_diff_mean"),
        ("mismatch/kl_sum", "mismatch/kl"),
    ):
        if name in metrics:
            total = metrics.pop(name)
            metrics[mean] = total / count if count else float("nan")
    if "correction/weight_square_mean" in metrics:
        square = metrics.pop("correction/weight_square_mean")
        metrics["correction/effective_sample_size"] = metrics["correction/weight_mean"] ** 2 / square if square else 0.0
    return metrics | {
        f"{role}/grad_norm": report.grad_norm,
        f"{role}/lr": report.lr,
        f"{role}/num_updates": float(report.num_updates),
        f"{role}/skipped_updates": float(report.num_skipped),
        "memory/train_peak_bytes": float(report.peak_bytes),
    }
