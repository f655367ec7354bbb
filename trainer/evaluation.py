"""Performance on held-out prompts, by sampling as configured and, if asked for, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from trainer.measure import Metrics
from trainer.samples import Samples
from trainer.scoring import Scored, drop_failed
from trainer.sources import SyncSource, greedy
from workers.protocol import Prompt
from workers.rollout.spec import SamplingSpec


@dataclass(frozen=True, slots=True)
class Evaluation:
    """prompts: none, and validation does nothing. batch_size: prompts per call; None: all at once."""

    prompts: Sequence[Prompt]
    sampling: SamplingSpec
    greedy: bool
    batch_size: int | None
    max_error_rate: float

    def run(self, source: SyncSource, *, seed: Sequence[int]) -> tuple[Metrics, Samples | None]:
        """Metrics val/*, and the last samples for people to look at."""
        if not self.prompts:
            return {}, None
        metrics, samples = self._measure(source, self.sampling, "val/", seed)
        if self.greedy:
            metrics |= self._measure(source, greedy(self.sampling), "val/greedy_", seed)[0]
        return metrics, samples

    def _measure(
        self, source: SyncSource, sampling: SamplingSpec, prefix: str, seed: Sequence[int]
    ) -> tuple[Metrics, Samples]:
        size = self.batch_size or len(self.prompts)
        batches = [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]
        measured: list[Samples] = []
        scored = Scored()
        for number, prompts in enumerate(batches):
            key = f"{prefix}{'-'.join(map(str, seed))}-{number}"
            samples = source.generate(key, prompts, sampling, seed=(*seed, number), sleep=False, phase=_untimed)
            kept, errors = drop_failed(samples, max_error_rate=self.max_error_rate, before=scored)
            measured.append(kept)
            scored = Scored(scored.asked + len(samples), scored.failed + int(errors["reward/errors"]))
        return _accuracies(measured, prefix) | {f"{prefix}reward_errors": float(scored.failed)}, measured[-1]


def _accuracies(measured: Sequence[Samples], prefix: str) -> Metrics:
    """Mean reward, of everything and of each data source if there are several, and mean response length."""
    rewards = np.concatenate([s.rewards for s in measured])
    lengths = np.concatenate([s.meta.response_length for s in measured])
    sources = np.array([s.prompts[g].data_source for s in measured for g in s.meta.group])
    metrics = {f"{prefix}accuracy": float(rewards.mean()), f"{prefix}response_length/mean": float(lengths.mean())}
    names = sorted(set(sources.tolist()))
    if len(names) > 1:
        kind = prefix.removeprefix("val/")
        metrics |= {f"val/{n}/{kind}accuracy": float(rewards[sources == n].mean()) for n in names}
    return metrics


def _untimed(name: str) -> AbstractContextManager[None]:
    """Validation is one phase of its own, whatever happens inside."""
    return nullcontext()
