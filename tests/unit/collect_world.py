"""A source of responses whose rewards are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer.samples import Samples
from workers.protocol import Prompt, RolloutBlock, Scores, Trajectory
from workers.rollout.spec import SamplingSpec

Rewards = Callable[[int], Sequence[float]]
"""Rewards of the responses to the prompt of this index; NaN: the reward function failed."""


class Recorded:
    """Answers with rewards that are known beforehand, and remembers what it was asked."""

    def __init__(self, rewards: Rewards, parts: Rewards | None = None, length: int = 3) -> None:
        self.calls: list[tuple[list[int], dict[str, Any]]] = []
        self.is_asleep = False
        self._rewards, self._parts, self._length = rewards, parts, length

    def generate(
        self, key: str, prompts: Sequence[Prompt], sampling: SamplingSpec, *, first_group: int = 0, **options: Any
    ) -> Samples:
        self.calls.append(([p.index for p in prompts], options | {"n": sampling.n, "key": key}))
        self.is_asleep = self.is_asleep or options["sleep"]
        trajectories = [
            Trajectory(first_group + i, s, p.token_ids, (1,) * self._length, "stop", weight_version=1)
            for i, p in enumerate(prompts)
            for s in range(sampling.n)
        ]
        values = [r for p in prompts for r in list(self._rewards(p.index))[: sampling.n]]
        errors = tuple("failed" if np.isnan(v) else "" for v in values)
        parts = {} if self._parts is None else {"acc": [r for p in prompts for r in self._parts(p.index)]}
        arrays = {name: np.array(v, dtype=np.float32) for name, v in parts.items()}
        block = RolloutBlock.collate(trajectories)
        scores = Scores(np.array(values, dtype=np.float32), arrays, errors)
        return Samples.join(key, dict(enumerate(prompts, first_group)), (block,), [block.meta], [scores])

    def sleep(self) -> None:
        self.is_asleep = True
