"""Where the next batch of scored responses comes from.

`SyncSource` generates with the newest weights and waits. Asynchronous sources feed the same step: they differ in when
they start generating, not in what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.memory import TrainingMemory
from trainer.samples import Samples, check_complete
from trainer.tracking.phases import Phases
from trainer.tracking.rollout import RolloutLog
from workers.group import Call, WorkerGroup
from workers.protocol import Prompt, ScoreRequest, Scores
from workers.reward.worker import RewardWorker
from workers.rollout.calls import Chunk
from workers.rollout.pool import RolloutPool
from workers.rollout.spec import GenerateRequest, SamplingSpec


class SyncSource:
    """Generates on all replicas and scores responses as soon as they are there, while others are still generated.

    It owns the replicas' memory: after a call they are asleep, until `wake_weights` and `wake_cache`. memory: of the
    training ranks, which make room before replicas wake.
    """

    def __init__(
        self,
        pool: RolloutPool,
        scorers: WorkerGroup,
        phases: Phases,
        *,
        log: RolloutLog,
        memory: TrainingMemory,
        timeout_s: float,
        seed: int,
    ) -> None:
        self._pool = pool
        self._scorers = scorers
        self._phases = phases
        self._log = log
        self._memory = memory
        self._timeout_s = timeout_s
        self._seed = seed
        self._asleep: dict[str, int] | None = None

    def generate(
        self,
        key: str,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        *,
        seed: Sequence[int],
        sleep: bool,
        first_group: int = 0,
        phase: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> Samples:
        """Responses to the prompts, scored. seed: numbers that make this call's sampling its own.

        sleep: whether the replicas give their memory back afterwards (training follows).
        first_group: number of the first prompt's group, where responses of several calls become one batch.
        phase: times "generate" and "score" (what is left of it when the last response is there); None: as phases of
        the step. Raises WorkerError unless every prompt has come back exactly once.
        """
        phase = phase or self._phases
        call_seed = int(np.random.SeedSequence([self._seed, *seed]).generate_state(1)[0] >> 1)
        shares = _shares(len(prompts), len(self._pool))
        requests = [_request(prompts, share, first_group, sampling, call_seed) for share in shares]
        with phase("generate"):
            chunks: list[Chunk] = []
            scores: list[Any] = []
            for chunk in self._pool.generate(requests):
                scores.append(self._score(chunk, prompts, first_group, len(chunks)))
                chunks.append(chunk)
            check_complete([c.meta for c in chunks], num_prompts=len(prompts), n=sampling.n, first_group=first_group)
            if sleep:
                self.sleep()
        with phase("score"):
            scored = self._scores(scores)
        by_group = dict(enumerate(prompts, first_group))
        return Samples.join(key, by_group, tuple(c.block for c in chunks), [c.meta for c in chunks], scored)

    def sleep(self, *, keep_weights: bool = False) -> None:
        """Replicas give their memory back. keep_weights: in host memory, where no weight sync follows."""
        if self._asleep is None:
            self._asleep = self._pool.sleep(keep_weights=keep_weights)

    def wake_weights(self) -> None:
        """Replicas take the memory of their weights again (before a weight sync)."""
        self._wake("weights", in_sync=True)

    def wake_cache(self) -> None:
        """Replicas take the memory of the KV cache again (after a weight sync)."""
        self._wake("kv_cache", in_sync=True)
        self._asleep = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, training may need all it has: awake replicas sleep meanwhile if they leave no room for that."""
        if self._asleep is not None or not self._memory.is_crowded():
            yield
            return
        self.sleep(keep_weights=True)
        try:
            yield
        finally:
            self._wake("weights", in_sync=False)
            self._wake("kv_cache", in_sync=False)
            self._asleep = None

    def take_metrics(self) -> dict[str, float]:
        """What the replicas did, and what happened to memory, since the last call, for the line of a step."""
        metrics = self._log.take() | {"rollout/replaced": float(self._pool.take_replaced())}
        metrics |= self._memory.take_metrics(self._pool.take_peaks())
        return metrics | {"memory/rollout_peak_bytes": float(self._pool.peak_bytes)}

    def _wake(self, tag: str, *, in_sync: bool) -> None:
        if self._asleep is not None:
            self._memory.make_room(self._asleep[tag])
            self._pool.wake(tag, in_sync=in_sync)

    def _score(self, chunk: Chunk, prompts: Sequence[Prompt], first_group: int, number: int) -> Any:
        """Starts to score one chunk. Its groups, in order of first use, are what its block's `prompt_of` means."""
        chosen = [prompts[group - first_group] for group in dict.fromkeys(chunk.meta.group.tolist())]
        request = ScoreRequest(
            data_source=tuple(p.data_source for p in chosen),
            ground_truth=tuple(p.ground_truth for p in chosen),
            extra_info=tuple(p.extra_info for p in chosen),
        )
        return self._scorers.actors[number % len(self._scorers)].score.remote(chunk.block, request)

    def _scores(self, refs: Sequence[Any]) -> list[Scores]:
        ranks = tuple(number % len(self._scorers) for number in range(len(refs)))
        call: Call[Scores] = Call(self._scorers.name, RewardWorker.score.__name__, tuple(refs), ranks)
        return call.result(self._timeout_s)


def greedy(sampling: SamplingSpec) -> SamplingSpec:
    """The same sampling without chance."""
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=-1, n=1)


def _shares(num_prompts: int, num_replicas: int) -> list[range]:
    bounds = [num_prompts * r // num_replicas for r in range(num_replicas + 1)]
    return [range(bounds[r], bounds[r + 1]) for r in range(num_replicas)]


def _request(
    prompts: Sequence[Prompt], share: range, first_group: int, sampling: SamplingSpec, seed: int
) -> GenerateRequest:
    chosen = [prompts[i].token_ids for i in share]
    return GenerateRequest(
        token_ids=np.fromiter((t for ids in chosen for t in ids), dtype=np.int32),
        lengths=np.fromiter((len(ids) for ids in chosen), dtype=np.int32),
        groups=np.asarray(share, dtype=np.int32) + np.int32(first_group),
        sampling=sampling,
        seed=seed,
    )
