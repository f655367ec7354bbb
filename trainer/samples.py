"""One step's batch as the driver holds it: references to the tokens, numbers about them.

Tokens stay in Ray's object store between the replica that made them and the training rank that learns from them. The
driver has lengths, rewards and per-token columns by name, wherever those are; it fetches one only if an algorithm
computes on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from workers.group import WorkerError
from workers.protocol import FINISH_REASONS, FloatArray, Prompt, RolloutBlock, Scores, SequenceMeta, concat_meta, split
from workers.train_worker import Column, RankBatch

INLINE_BYTES = 64 << 10
"""Columns up to this size travel inside the call; larger ones go to the object store once."""


@dataclass(slots=True)
class Samples:
    """Sequences in deterministic order: by prompt, then sample.

    key: names the batch; workers cache by it. prompts: group number -> prompt.
    blocks: RolloutBlock references, one per chunk.
    meta: [S]; where: [S, 2] = (block, row in block). rewards: [S]; parts: name -> [S]; errors: [S], "" if none.
    baseline: [S], reward of the greedy response to each row's prompt, or None where nobody asked for one.
    rank_of: number of training ranks -> [S], the rank each row was dealt to.
    """

    key: str
    prompts: Mapping[int, Prompt]
    blocks: tuple[Any, ...]
    meta: SequenceMeta
    where: npt.NDArray[np.intp]
    rewards: FloatArray
    parts: dict[str, FloatArray]
    errors: tuple[str, ...]
    baseline: FloatArray | None = None
    columns: dict[str, Column] = field(default_factory=dict)
    rank_of: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.meta)

    @property
    def num_tokens(self) -> int:
        """Response tokens in all."""
        return int(self.meta.response_length.sum())

    @staticmethod
    def join(
        key: str,
        prompts: Mapping[int, Prompt],
        blocks: tuple[Any, ...],
        metas: list[SequenceMeta],
        scores: list[Scores],
    ) -> Samples:
        """The blocks and their scores as one batch, the same whatever came in which block and when."""
        meta, where = concat_meta(metas)
        names = sorted({name for s in scores for name in s.parts})
        missing = [np.full(len(s.rewards), np.nan, dtype=np.float32) for s in scores]
        parts = {n: [s.parts.get(n, m) for s, m in zip(scores, missing, strict=True)] for n in names}
        errors = [s.errors for s in scores]
        return Samples(
            key=key,
            prompts=prompts,
            blocks=blocks,
            meta=meta,
            where=where,
            rewards=_ordered([s.rewards for s in scores], where),
            parts={name: _ordered(values, where) for name, values in parts.items()},
            errors=tuple(errors[b][r] for b, r in where),
        )

    def take(self, rows: npt.NDArray[np.intp]) -> Samples:
        """The batch with these rows only, in this order; before any column was added."""
        assert not self.columns
        return replace(
            self,
            meta=self.meta.take(rows),
            where=self.where[rows],
            rewards=self.rewards[rows],
            parts={name: values[rows] for name, values in self.parts.items()},
            errors=tuple(self.errors[r] for r in rows),
            baseline=None if self.baseline is None else self.baseline[rows],
            rank_of={},
        )

    @staticmethod
    def concat(key: str, several: Sequence[Samples]) -> Samples:
        """Batches whose groups have different numbers as one, one after the other; before any column was added.

        A part that only some have is NaN for the others.
        """
        assert not any(s.columns or s.baseline is not None for s in several)
        first_block = np.cumsum([0, *(len(s.blocks) for s in several)])
        shifted = [s.where + np.array([first, 0]) for s, first in zip(several, first_block, strict=False)]
        names = sorted({name for s in several for name in s.parts})
        lacking = [np.full(len(s), np.nan, dtype=np.float32) for s in several]
        return Samples(
            key=key,
            prompts={group: prompt for s in several for group, prompt in s.prompts.items()},
            blocks=tuple(block for s in several for block in s.blocks),
            meta=SequenceMeta.concat([s.meta for s in several]),
            where=np.concatenate(shifted),
            rewards=np.concatenate([s.rewards for s in several]),
            parts={
                n: np.concatenate([s.parts.get(n, x) for s, x in zip(several, lacking, strict=True)]) for n in names
            },
            errors=tuple(error for s in several for error in s.errors),
        )

    def rank_batch(self, rows: npt.NDArray[np.int64], num_ranks: int) -> RankBatch:
        """What a training rank needs to build its share, the given rows."""
        lengths = self.meta.response_length.astype(np.int64)
        return RankBatch(f"{self.key}/{num_ranks}/{hash(rows.tobytes())}", self.blocks, self.where[rows], rows, lengths)

    def put_column(self, name: str, values: FloatArray) -> None:
        """Adds a per-token field computed here, [total response tokens] in batch order."""
        assert len(values) == self.num_tokens, (name, len(values), self.num_tokens)
        source = values if values.nbytes <= INLINE_BYTES else ray.put(values)
        self.columns[name] = Column(name, ((source, np.arange(len(self))),))

    def fetch_column(self, name: str) -> FloatArray:
        """A per-token field made on the training ranks, [total response tokens] in batch order."""
        pieces: list[FloatArray] = [np.empty(0, dtype=np.float32)] * len(self)
        for source, rows in self.columns[name].parts:
            values = ray.get(source) if isinstance(source, ray.ObjectRef) else source
            for row, part in zip(rows, split(values, self.meta.response_length[rows]), strict=True):
                pieces[row] = part
        return np.concatenate(pieces)

    def sequence_means(self, name: str) -> FloatArray:
        """A column averaged over each sequence's tokens, [S]; 0 for an empty response."""
        lengths = self.meta.response_length
        sequence = np.repeat(np.arange(len(self)), lengths)
        sums = np.bincount(sequence, weights=self.fetch_column(name), minlength=len(self))
        means: FloatArray = (sums / np.maximum(lengths, 1)).astype(np.float32)
        return means

    def fetch_loss_mask(self) -> npt.NDArray[np.bool_] | None:
        """[total response tokens], or None where the model chose every token (no tool output)."""
        if bool((self.meta.loss_tokens == self.meta.response_length).all()):
            return None
        masks = [self._block_mask(ray.get(ref)) for ref in self.blocks]
        mask: npt.NDArray[np.bool_] = np.concatenate([masks[b][r] for b, r in self.where])
        return mask

    def fetch_sampler_logprobs(self) -> FloatArray:
        """What the sampler said of its tokens, [total response tokens]; NaN where it was not asked."""
        parts = [self._block_logprobs(ray.get(ref)) for ref in self.blocks]
        return np.concatenate([parts[b][r] for b, r in self.where])

    def fetch_tokens(self, row: int) -> tuple[list[int], list[int]]:
        """Prompt and response token ids of one sequence, for people to look at."""
        block_number, block_row = self.where[row]
        block: RolloutBlock = ray.get(self.blocks[block_number])
        return block.prompts()[block_row].tolist(), block.responses()[block_row].tolist()

    def finish_reason(self, row: int) -> str:
        """Why a sequence ended."""
        return FINISH_REASONS[int(self.meta.finish_reason[row])]

    @staticmethod
    def _block_mask(block: RolloutBlock) -> list[npt.NDArray[Any]]:
        mask = np.ones(len(block.response_ids), dtype=np.bool_) if block.loss_mask is None else block.loss_mask
        return split(mask, block.meta.response_length)

    @staticmethod
    def _block_logprobs(block: RolloutBlock) -> list[npt.NDArray[Any]]:
        unasked = np.full(len(block.response_ids), np.nan, dtype=np.float32)
        return split(unasked if block.logprobs is None else block.logprobs, block.meta.response_length)


def check_complete(metas: Sequence[SequenceMeta], *, num_prompts: int, n: int, first_group: int = 0) -> None:
    """Raises WorkerError unless each of the prompts has exactly its samples 0 .. n-1."""
    rows = [(m.group.astype(np.int64) - first_group) * n + m.sample for m in metas]
    counts = np.bincount(np.concatenate([np.zeros(0, dtype=np.int64), *rows]), minlength=num_prompts * n)
    wrong = np.flatnonzero(counts != 1)
    if len(wrong):
        named = ", ".join(f"prompt {i // n} sample {i % n} {counts[i]} times" for i in wrong[:8])
        raise WorkerError(
            f"rollout: {len(wrong)} of {num_prompts * n} responses did not come exactly once: {named}"
            f"{', ...' if len(wrong) > 8 else ''}"
        )


def _ordered(values: list[FloatArray], where: npt.NDArray[np.intp]) -> FloatArray:
    starts = np.concatenate([[0], np.cumsum([len(v) for v in values])])
    flat: FloatArray = np.concatenate(values)
    return flat[starts[where[:, 0]] + where[:, 1]]
