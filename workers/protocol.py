"""What rollout, reward and training say to each other.

One record per response (`Trajectory`), one numpy block per replica and call (`RolloutBlock`), both free of torch so
that processes which only score text stay light. `workers.batch` turns blocks into the tensordict that training uses.

Ragged data is one flat array plus lengths; nothing is padded between the rollout and the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
"""Why a response ended; `RolloutBlock.finish_reason` holds indices into this."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, tokenised once.

    index: row number in the (filtered) data set, unique within it.
    token_ids: prompt tokens, chat template and special tokens included.
    data_source, ground_truth, extra_info: what the reward function gets.
    """

    index: int
    token_ids: tuple[int, ...]
    data_source: str = ""
    ground_truth: Any = None
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Trajectory:
    """One response to one prompt.

    group: position of the prompt in the batch; responses of one prompt share it.
    sample: which of the prompt's responses, 0 .. n-1.
    loss_mask: per response token, False where the model did not choose it (tool output); None: all True.
    logprobs: per response token, as the sampler saw it (temperature and truncation applied); None: not asked for.
    weight_version: version of the weights that produced the first token.
    """

    group: int
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finish_reason: str
    weight_version: int
    loss_mask: tuple[bool, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    reward: float = float("nan")
    reward_parts: dict[str, float] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SequenceMeta:
    """What the driver knows of every sequence without holding its tokens; all arrays are [num_sequences].

    loss_tokens: response tokens that the loss mask keeps. finish_reason: index into FINISH_REASONS.
    """

    group: IntArray
    sample: IntArray
    prompt_length: IntArray
    response_length: IntArray
    loss_tokens: IntArray
    finish_reason: IntArray
    weight_version: IntArray

    def __len__(self) -> int:
        return len(self.group)

    def take(self, rows: npt.NDArray[np.intp]) -> SequenceMeta:
        """The same table with these rows, in this order."""
        return SequenceMeta(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})

    @staticmethod
    def concat(tables: list[SequenceMeta]) -> SequenceMeta:
        """All rows of several tables, in order."""
        names = SequenceMeta.__dataclass_fields__
        return SequenceMeta(**{name: np.concatenate([getattr(t, name) for t in tables]) for name in names})


@dataclass(frozen=True, slots=True)
class RolloutBlock:
    """The trajectories of one generate call of one replica, ragged and flat.

    meta: one row per sequence.
    prompt_ids: [sum of prompt lengths over the block's groups], each prompt once, in order of first use.
    prompt_lengths: [num_groups].
    prompt_of: [num_sequences], which of those prompts a sequence continues.
    response_ids: [total_response_tokens].
    loss_mask: [total_response_tokens] or None (all True).
    logprobs: [total_response_tokens], NaN where the sampler was not asked, or None (asked nowhere).
    """

    meta: SequenceMeta
    prompt_ids: IntArray
    prompt_lengths: IntArray
    prompt_of: IntArray
    response_ids: IntArray
    loss_mask: BoolArray | None = None
    logprobs: FloatArray | None = None

    def responses(self) -> list[IntArray]:
        """Token ids of each response, as views."""
        return split(self.response_ids, self.meta.response_length)

    def prompts(self) -> list[IntArray]:
        """Token ids of the prompt of each sequence, as views."""
        prompts = split(self.prompt_ids, self.prompt_lengths)
        return [prompts[i] for i in self.prompt_of]

    @staticmethod
    def collate(trajectories: list[Trajectory]) -> RolloutBlock:
        """Trajectories to one block, in the order given. Sequences of one group must share their prompt."""
        prompt_row: dict[int, int] = {}
        prompts: list[tuple[int, ...]] = []
        for t in trajectories:
            if t.group not in prompt_row:
                prompt_row[t.group] = len(prompts)
                prompts.append(t.prompt_ids)
        meta = SequenceMeta(
            group=_ints(t.group for t in trajectories),
            sample=_ints(t.sample for t in trajectories),
            prompt_length=_ints(len(t.prompt_ids) for t in trajectories),
            response_length=_ints(len(t.response_ids) for t in trajectories),
            loss_tokens=_ints(_loss_tokens(t) for t in trajectories),
            finish_reason=_ints(FINISH_REASONS.index(t.finish_reason) for t in trajectories),
            weight_version=_ints(t.weight_version for t in trajectories),
        )
        return RolloutBlock(
            meta=meta,
            prompt_ids=_ints(token for p in prompts for token in p),
            prompt_lengths=_ints(len(p) for p in prompts),
            prompt_of=_ints(prompt_row[t.group] for t in trajectories),
            response_ids=_ints(token for t in trajectories for token in t.response_ids),
            loss_mask=_flat_mask(trajectories),
            logprobs=_flat_logprobs(trajectories),
        )


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """What a reward worker needs to score one block: the prompts' answers, by position in the block's `prompt_of`."""

    data_source: tuple[str, ...]
    ground_truth: tuple[Any, ...]
    extra_info: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards of one block. `rewards` [num_sequences] float32, 0 where `error` is set.

    parts: name -> [num_sequences], the other numbers a reward function returned in its dictionary.
    errors: [num_sequences], "" or what went wrong ("raised ValueError: ...", "timed out after 10 s", "returned nan").
    """

    rewards: FloatArray
    parts: dict[str, FloatArray]
    errors: tuple[str, ...]


def concat_meta(blocks: list[SequenceMeta]) -> tuple[SequenceMeta, npt.NDArray[np.intp]]:
    """One table over several blocks, in deterministic order (group, then sample), whatever finished first.

    Returns the table and, for each of its rows, (block, row in block) [num_sequences, 2].
    """
    table = SequenceMeta.concat(blocks)
    where = np.concatenate([np.stack([np.full(len(m), b), np.arange(len(m))], axis=1) for b, m in enumerate(blocks)])
    order = np.lexsort((table.sample, table.group))
    return table.take(order), where[order]


def split(flat: npt.NDArray[Any], lengths: IntArray) -> list[npt.NDArray[Any]]:
    """Views of a flat array, one per length."""
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _ints(values: Any) -> IntArray:
    return np.fromiter(values, dtype=np.int32)


def _loss_tokens(trajectory: Trajectory) -> int:
    return len(trajectory.response_ids) if trajectory.loss_mask is None else sum(trajectory.loss_mask)


def _flat_mask(trajectories: list[Trajectory]) -> BoolArray | None:
    if all(t.loss_mask is None for t in trajectories):
        return None
    masks = [(True,) * len(t.response_ids) if t.loss_mask is None else t.loss_mask for t in trajectories]
    return np.fromiter((m for mask in masks for m in mask), dtype=np.bool_)


def _flat_logprobs(trajectories: list[Trajectory]) -> FloatArray | None:
    if all(t.logprobs is None for t in trajectories):
        return None
    parts = [
        np.full(len(t.response_ids), np.nan, dtype=np.float32)
        if t.logprobs is None
        else np.asarray(t.logprobs, dtype=np.float32)
        for t in trajectories
    ]
    flat: FloatArray = np.concatenate(parts)
    return flat
