"""Where the next batch of scored responses comes from.

`SyncSource` generates with the newest weights and waits. Asynchronous sources feed the same step: they differ in when
they start generating, not in what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.samples import Samples
from trainer.tracking.phases import Phases
from workers.group import Call, WorkerGroup
from workers.protocol import Prompt, ScoreRequest, Scores, SequenceMeta
from workers.reward.worker import RewardWorker
from workers.rollout.spec import GenerateRequest, GenerateStats, SamplingSpec
from workers.rollout.vllm.replica import VllmReplica


class SyncSource:
    """Generates on all replicas and scores each replica's responses as soon as they are there.

    It owns the replicas' memory: after a call they are asleep, until `wake_weights` and `wake_cache`.
    """

    def __init__(
        self, replicas: WorkerGroup, scorers: WorkerGroup, phases: Phases, *, timeout_s: float, seed: int
    ) -> None:
        self._replicas = replicas
        self._scorers = scorers
        self._phases = phases
        self._timeout_s = timeout_s
        self._seed = seed
        self._asleep = False
        self.peak_bytes = 0

    def generate(
        self,
        key: str,
        prompts: Sequence[Prompt],
        sampling: SamplingSpec,
        *,
        seed: Sequence[int],
        sleep: bool,
        phase: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> Samples:
        """Responses to the prompts, scored. seed: numbers that make this call's sampling its own.

        sleep: whether the replicas give their memory back afterwards (training follows).
        phase: times "generate" and "score"; None: as phases of the step.
        """
        phase = phase or self._phases
        shares = _shares(len(prompts), len(self._replicas))
        call_seed = int(np.random.SeedSequence([self._seed, *seed]).generate_state(1)[0] >> 1)
        with phase("generate"):
            requests = [(_request(prompts, share, sampling, call_seed),) for share in shares]
            call, blocks = self._replicas.scatter_with_payload(VllmReplica.generate, requests)
            scoring = self._score(prompts, shares, blocks)  # starts by itself, block by block
            answers: list[tuple[SequenceMeta, GenerateStats]] = call.result(self._timeout_s)
            if sleep:
                self._replicas.broadcast(VllmReplica.sleep).result(self._timeout_s)
                self._asleep = True
        with phase("score"):
            scores = scoring.result(self._timeout_s)
        self.peak_bytes = max(self.peak_bytes, *(stats.peak_bytes for _, stats in answers))
        return Samples.join(key, list(prompts), blocks, [meta for meta, _ in answers], scores)

    def wake_weights(self) -> None:
        """Replicas take the memory of their weights again (before a weight sync)."""
        if self._asleep:
            self._replicas.broadcast(VllmReplica.wake, "weights").result(self._timeout_s)

    def wake_cache(self) -> None:
        """Replicas take the memory of the KV cache again (after a weight sync)."""
        if self._asleep:
            self._replicas.broadcast(VllmReplica.wake, "kv_cache").result(self._timeout_s)
        self._asleep = False

    def _score(self, prompts: Sequence[Prompt], shares: Sequence[range], blocks: Sequence[Any]) -> Call[Scores]:
        refs = []
        for number, (share, block) in enumerate(zip(shares, blocks, strict=True)):
            chosen = [prompts[i] for i in share]
            request = ScoreRequest(
                data_source=tuple(p.data_source for p in chosen),
                ground_truth=tuple(p.ground_truth for p in chosen),
                extra_info=tuple(p.extra_info for p in chosen),
            )
            refs.append(self._scorers.actors[number % len(self._scorers)].score.remote(block, request))
        return Call(self._scorers.name, RewardWorker.score.__name__, tuple(refs))


def greedy(sampling: SamplingSpec) -> SamplingSpec:
    """The same sampling without chance."""
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=-1, n=1)


def _shares(num_prompts: int, num_replicas: int) -> list[range]:
    bounds = [num_prompts * r // num_replicas for r in range(num_replicas + 1)]
    return [range(bounds[r], bounds[r + 1]) for r in range(num_replicas)]


def _request(prompts: Sequence[Prompt], share: range, sampling: SamplingSpec, seed: int) -> GenerateRequest:
    chosen = [prompts[i].token_ids for i in share]
    return GenerateRequest(
        token_ids=np.fromiter((t for ids in chosen for t in ids), dtype=np.int32),
        lengths=np.fromiter((len(ids) for ids in chosen), dtype=np.int32),
        groups=np.asarray(share, dtype=np.int32),
        sampling=sampling,
        seed=seed,
    )
