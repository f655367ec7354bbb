"""The samples that one step trains on: generated, scored, and, where the algorithm says so, chosen and reshaped.

Dynamic sampling and overlong shaping are DAPO's (https://arxiv.org/abs/2503.14476, sections 3.2 and 3.4); the greedy
baseline is ReMax's (https://arxiv.org/abs/2310.10505, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trainer.config.errors import UserError
from trainer.data.order import PromptOrder
from trainer.measure import Metrics
from trainer.samples import Samples
from trainer.scoring import Scored, drop_failed
from trainer.sources import SyncSource, greedy
from trainer.tracking.phases import Phases
from workers.protocol import FloatArray, Prompt
from workers.rollout.spec import SamplingSpec

TRAIN, VALIDATE, BASELINE = 0, 1, 2
"""Kinds of generate calls, part of their seeds."""


@dataclass(frozen=True, slots=True)
class GroupFilter:
    """Dynamic sampling: groups whose responses are all equally good teach nothing, and others take their place.

    metric: part of the reward that is compared; None: the reward itself. max_rounds: generate calls of one step; what
    is still missing then is filled up with groups that were taken out.
    """

    metric: str | None
    max_rounds: int

    def has_signal(self, samples: Samples) -> npt.NDArray[np.bool_]:
        """Of every row, whether the values of its group differ, [S].

        Raises UserError where the reward has no such part.
        """
        if not len(samples):
            return np.zeros(0, dtype=np.bool_)
        values = samples.rewards if self.metric is None else self._part(samples, self.metric)
        member = np.unique(samples.meta.group, return_inverse=True)[1]
        low = np.full(int(member.max(initial=-1)) + 1, np.inf, dtype=np.float32)
        high = -low
        np.fmin.at(low, member, values)
        np.fmax.at(high, member, values)
        return np.asarray((low < high)[member], dtype=np.bool_)

    @staticmethod
    def _part(samples: Samples, metric: str) -> FloatArray:
        if metric not in samples.parts:
            known = ", ".join(sorted(samples.parts)) or "none"
            raise UserError(
                f"algorithm.filter_groups.metric={metric}: the reward function gives no such part (it gives: {known}); "
                "set it to one of these, or to null for the reward itself"
            )
        return samples.parts[metric]


@dataclass(frozen=True, slots=True)
class Overlong:
    """Soft punishment of length: 0 up to max_length - buffer tokens, then linear down to -factor at max_length."""

    max_length: int
    buffer: int
    factor: float

    def penalty(self, lengths: npt.NDArray[np.integer]) -> FloatArray:
        """What is added to the rewards of responses of these lengths, [S], never positive."""
        over = np.clip(lengths - (self.max_length - self.buffer), 0, self.buffer)
        return (-self.factor * over / self.buffer).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Collector:
    """Takes prompts until a step has its `batch_size` groups.

    groups: dynamic sampling, or None. overlong: length penalty, or None. greedy_baseline: whether every prompt is also
    answered greedily, and the reward of that answer put beside the others (`Samples.baseline`).
    """

    source: SyncSource
    prompts: Sequence[Prompt]
    sampling: SamplingSpec
    phases: Phases
    batch_size: int
    max_error_rate: float
    groups: GroupFilter | None
    overlong: Overlong | None
    greedy_baseline: bool

    def collect(self, order: PromptOrder, step: int) -> tuple[Samples, Metrics]:
        """The samples of one step, and metrics of how they were come by. The replicas are asleep afterwards.

        Raises what `SyncSource.generate`, `drop_failed` and `GroupFilter.has_signal` raise.
        """
        if self.groups is None:
            sleep = not self.greedy_baseline
            samples, scored = self._generate(order, step, [], self.batch_size, Scored(), sleep=sleep)
            metrics: Metrics = {}
        else:
            samples, scored, metrics = self._with_signal(self.groups, order, step)
        if self.greedy_baseline:
            samples, scored = self._with_baseline(samples, step, scored)
        with self.phases("generate"):
            self.source.sleep()
        metrics |= {"reward/errors": float(scored.failed), "reward/error_rate": scored.failed / max(1, scored.asked)}
        return samples, metrics | self._punish_length(samples)

    def _generate(
        self,
        order: PromptOrder,
        step: int,
        before: Sequence[Samples],
        num_prompts: int,
        scored: Scored,
        *,
        sleep: bool = False,
    ) -> tuple[Samples, Scored]:
        """Responses to the next prompts, and `scored` with them. before: what this step has generated already."""
        number = len(before)
        prompts = [self.prompts[row] for row in order.next_batch(num_prompts)]
        samples = self.source.generate(
            f"train-{step}" + (f"-{number}" if number else ""),
            prompts,
            self.sampling,
            seed=(TRAIN, step, number) if number else (TRAIN, step),
            sleep=sleep,
            first_group=sum(len(s.prompts) for s in before),
        )
        return self._known(samples, scored)

    def _known(self, samples: Samples, scored: Scored) -> tuple[Samples, Scored]:
        """The samples whose reward is known. scored: what the step scored before; the share that failed is a step's."""
        known, counted = drop_failed(samples, max_error_rate=self.max_error_rate, before=scored)
        return known, Scored(scored.asked + len(samples), scored.failed + int(counted["reward/errors"]))

    def _with_signal(self, groups: GroupFilter, order: PromptOrder, step: int) -> tuple[Samples, Scored, Metrics]:
        """As many groups whose rewards differ as a batch has, from as many rounds as are needed and allowed."""
        rounds: list[Samples] = []
        scored, found = Scored(), 0
        while found < self.batch_size and len(rounds) < groups.max_rounds:
            samples, scored = self._generate(order, step, rounds, self._ask_for(found, rounds), scored)
            found += len(np.unique(samples.meta.group[groups.has_signal(samples)]))
            rounds.append(samples)
        samples = Samples.concat(f"train-{step}", rounds)
        has_signal = groups.has_signal(samples)
        chosen = _first_groups(samples.meta.group, has_signal, self.batch_size)
        metrics = {
            "filter_groups/rounds": float(len(rounds)),
            "filter_groups/generated": float(len(samples.prompts)),
            "filter_groups/without_signal": float(len(np.unique(samples.meta.group[~has_signal]))),
            "filter_groups/filled_up": float(len(np.unique(samples.meta.group[chosen][~has_signal[chosen]]))),
        }
        return samples.take(chosen), scored, metrics

    def _ask_for(self, found: int, rounds: Sequence[Samples]) -> int:
        """Prompts of the next round: as many as will do if the share with signal stays, at most a whole batch."""
        tried = sum(len(s.prompts) for s in rounds)
        missing = self.batch_size - found
        return min(self.batch_size, -(-missing * tried // found) if found else self.batch_size)

    def _with_baseline(self, samples: Samples, step: int, scored: Scored) -> tuple[Samples, Scored]:
        """With the greedy responses' rewards, without rows whose greedy response has none; and `scored` with them."""
        groups, member = np.unique(samples.meta.group, return_inverse=True)
        prompts = [samples.prompts[int(group)] for group in groups]
        sampling = replace(greedy(self.sampling), logprobs="none")
        answers = self.source.generate(f"{samples.key}-greedy", prompts, sampling, seed=(BASELINE, step), sleep=True)
        known, scored = self._known(answers, scored if not all(answers.errors) else Scored())  # all failed: an error
        rewards = np.full(len(groups), np.nan, dtype=np.float32)
        rewards[known.meta.group] = known.rewards
        samples.baseline = rewards[member]
        return samples.take(np.flatnonzero(~np.isnan(samples.baseline))), scored

    def _punish_length(self, samples: Samples) -> Metrics:
        """Adds the length penalty to the rewards, once all that compares rewards as they were given is done."""
        if self.overlong is None:
            return {}
        penalty = self.overlong.penalty(samples.meta.response_length)
        samples.rewards = samples.rewards + penalty
        return {
            "reward/overlong_penalty": float(penalty.mean()),
            "reward/overlong_ratio": float((penalty < 0).mean()),
        }


def _first_groups(group: npt.NDArray[np.integer], has_signal: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.intp]:
    """Rows of the first `size` groups with signal, and of the first others where there are too few; in batch order."""
    numbers, first = np.unique(group, return_index=True)
    wanted = np.lexsort((numbers, ~has_signal[first]))[:size]
    return np.flatnonzero(np.isin(group, numbers[wanted]))
