"""One generate call of one replica: its stream of finished responses, and what is still to come."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ray

from workers.group import failure
from workers.protocol import IntArray, SequenceMeta, split
from workers.rollout.spec import GenerateRequest, GenerateStats
from workers.rollout.watch import GROUP, Pulse


@dataclass(frozen=True, slots=True)
class Chunk:
    """Finished responses: all of some prompts'. block: reference to a RolloutBlock; meta: its rows."""

    replica: int
    block: Any
    meta: SequenceMeta


@dataclass(slots=True)
class GenerateCall:
    """A generate call of one replica. block: received, its meta not yet; done: groups of the chunks that came."""

    rank: int
    pulse: Pulse
    request: GenerateRequest
    stream: Any
    deadline: float
    block: Any = None
    done: list[IntArray] = field(default_factory=list)

    def take(self) -> Chunk | GenerateStats | None:
        """The next of the stream, which has something: block, meta, ..., statistics. None: half a chunk."""
        try:
            ref = next(self.stream)
        except StopIteration:
            stats: GenerateStats = self._get(self.block)
            return stats
        if self.block is None:
            self.block = ref
            return None
        meta: SequenceMeta = self._get(ref)
        block, self.block = self.block, None
        self.done.append(meta.group)
        self.pulse.responded()
        return Chunk(self.rank, block, meta)

    def rest(self) -> GenerateRequest | None:
        """The prompts that have not come back."""
        request = self.request
        left = np.flatnonzero(~np.isin(request.groups, np.concatenate([*self.done, request.groups[:0]])))
        if not len(left):
            return None
        tokens = split(request.token_ids, request.lengths)
        return replace(
            request,
            token_ids=np.concatenate([tokens[row] for row in left]),
            lengths=request.lengths[left],
            groups=request.groups[left],
        )

    def _get(self, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except Exception as error:
            raise failure(GROUP, self.rank, "generate", error) from error
