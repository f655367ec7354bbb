"""Batches as training sees them: ragged tensors, no padding, and the packed micro-batch a model runs on.

A `Batch` holds the sequences of one training rank. `Batch.micro_batch(rows)` packs some of them into one flat
`MicroBatch`: every token once, the tokens of a prompt that several responses share only once (`share_prompt`), and
the last token of each response not at all, because nothing is predicted from it.

Example, two responses to the prompt `5 6`, share_prompt on:

    responses        [7 8], [9]
    input_ids        5 6 7              (8 and 9 predict nothing)
    position_ids     0 1 2
    targets          7 8 9              (one row per response token)
    predictor        1 2 1              (input row whose hidden state predicts the target)
    segments         [0 1 2], [0 1]     (what each response's queries may look back on)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tensordict import TensorDict
from torch import Tensor

from workers.normalizers import Normalizers
from workers.protocol import RolloutBlock, SequenceMeta, split

IndexArray = npt.NDArray[np.int64]
CHOOSE = -1
"""In place of an expert's number: the router chooses."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Which rows of the packed input attend to which: causal runs of rows, one run per response.

    rows: [num_expanded] int64, the runs one after the other, as rows of the packed input (a shared prompt's rows
        appear once per response).
    lengths: run lengths, on the host.
    owner: [num_tokens] int64, for each packed row the place in `rows` whose attention output is its own.
    borrowed: for each run (first row, number of rows) of the prompt it begins with, where an earlier run has computed
        it; number 0 where it has its own. The rows of a run that are not borrowed follow those of the run before.
    """

    rows: Tensor
    lengths: tuple[int, ...]
    owner: Tensor
    borrowed: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass works on.

    input_ids, position_ids: [num_tokens] int64.
    segments: the attention pattern.
    predictor, targets, sequence: [R] int64 for R response tokens: the packed row that predicts the token, the token,
        and which of the micro-batch's sequences it belongs to (nondecreasing).
    tokens: tensordict [R] with the per-token fields losses use (loss_mask, advantages, ...).
    num_sequences: of this micro-batch.
    norm: global counts of the mini-batch this is a part of.
    routing: [num_tokens, num_layers, experts per token] integers, the experts that each packed row goes to in each
        layer; CHOOSE: the router chooses. None: everywhere. (Nothing sets it yet; see docs/routing_replay.md.)
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    predictor: Tensor
    targets: Tensor
    sequence: Tensor
    tokens: TensorDict
    num_sequences: int
    norm: Normalizers
    routing: Tensor | None = None


class Batch:
    """Sequences of one rank and their per-token fields, ragged.

    prompts, responses: one int array per sequence; sequences of one group share the prompt object.
    group: [num_sequences], sequences with equal group have the same prompt.
    tokens: tensordict [total_response_tokens], always with `loss_mask` (bool).
    """

    def __init__(
        self,
        prompts: Sequence[npt.NDArray[np.int32]],
        responses: Sequence[npt.NDArray[np.int32]],
        group: npt.NDArray[np.int32],
        tokens: TensorDict,
    ) -> None:
        self.prompts = prompts
        self.responses = responses
        self.group = group
        self.tokens = tokens
        self.lengths = np.fromiter((len(r) for r in responses), dtype=np.int64, count=len(responses))
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def num_tokens(self) -> int:
        """Response tokens in all."""
        return int(self._starts[-1])

    @staticmethod
    def from_blocks(blocks: Sequence[RolloutBlock], index: npt.NDArray[np.intp]) -> Batch:
        """The sequences named by `index` [num_sequences, 2] = (block, row in block), in that order."""
        split_prompts = [b.prompts() for b in blocks]
        split_responses = [b.responses() for b in blocks]
        metas = [b.meta for b in blocks]
        prompts = [split_prompts[b][r] for b, r in index]
        responses = [split_responses[b][r] for b, r in index]
        group = np.fromiter((metas[b].group[r] for b, r in index), dtype=np.int32, count=len(index))
        total = sum(len(r) for r in responses)
        tokens = TensorDict({"loss_mask": _picked_mask(blocks, index, total)}, batch_size=[total])
        if any(b.logprobs is not None for b in blocks):
            tokens["rollout_logprobs"] = _picked_logprobs(blocks, metas, index)
        return Batch(prompts, responses, group, tokens)

    def set_column(self, name: str, values: npt.NDArray[np.float32]) -> None:
        """Adds a per-token field, flat [total_response_tokens] in this batch's order."""
        if len(values) != self.num_tokens:
            raise ValueError(f"column {name!r} has {len(values)} values for {self.num_tokens} response tokens")
        self.tokens[name] = torch.from_numpy(np.array(values, dtype=np.float32))

    def token_index(self, rows: Sequence[int]) -> IndexArray:
        """Places of the response tokens of these sequences in the flat fields, [sum of their lengths]."""
        if not len(rows):
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([np.arange(self._starts[r], self._starts[r + 1]) for r in rows])

    def packed_tokens(self, rows: Sequence[int], *, share_prompt: bool) -> int:
        """Number of tokens `micro_batch` packs these sequences into."""
        before = [None, *(int(self.group[row]) for row in rows)] if share_prompt else [None] * len(rows)
        own = (len(self.prompts[row]) for row, last in zip(rows, before, strict=False) if last != self.group[row])
        return max(1, sum(own) + sum(max(0, int(self.lengths[row]) - 1) for row in rows))

    def micro_batch(
        self, rows: Sequence[int], norm: Normalizers, *, share_prompt: bool, device: torch.device
    ) -> MicroBatch:
        """Packs these sequences. Sequences of one group must follow each other to share their prompt.

        An empty `rows` gives a micro-batch of one token and no targets: ranks must run the same number of passes.
        """
        packer = _Packer(share_prompt)
        for place, row in enumerate(rows):
            packer.add(place, int(self.group[row]), self.prompts[row], self.responses[row])
        return packer.finish(self.tokens[torch.from_numpy(self.token_index(rows))], len(rows), norm, device)


class _Packer:
    """Builds the flat arrays of a MicroBatch, one sequence after the other."""

    def __init__(self, share_prompt: bool) -> None:
        self._share = share_prompt
        self._ids: list[npt.NDArray[np.int32]] = []
        self._positions: list[IndexArray] = []
        self._segment_rows: list[IndexArray] = []
        self._owner: list[IndexArray] = []
        self._borrowed: list[tuple[int, int]] = []
        self._predictor: list[IndexArray] = []
        self._targets: list[npt.NDArray[np.int32]] = []
        self._sequence: list[IndexArray] = []
        self._size = 0
        self._expanded = 0
        self._group: int | None = None
        self._prompt_rows = np.zeros(0, dtype=np.int64)

    def add(self, place: int, group: int, prompt: npt.NDArray[np.int32], response: npt.NDArray[np.int32]) -> None:
        """Appends one response, and its prompt unless the one before it already brought it."""
        new_prompt = not (self._share and group == self._group)
        if new_prompt:
            self._group = group
            self._prompt_rows = self._append(prompt, 0)
        tail = self._append(response[:-1], len(prompt))
        segment = np.concatenate([self._prompt_rows, tail])
        self._segment_rows.append(segment)
        first_own = 0 if new_prompt else len(prompt)
        self._borrowed.append((int(self._prompt_rows[0]) if len(prompt) else 0, first_own))
        self._owner.append(np.arange(first_own, len(segment)) + self._expanded)
        self._expanded += len(segment)
        if len(response):
            self._predictor.append(np.concatenate([self._prompt_rows[-1:], tail]))
            self._targets.append(response)
            self._sequence.append(np.full(len(response), place, dtype=np.int64))

    def _append(self, ids: npt.NDArray[np.int32], start: int) -> IndexArray:
        rows = np.arange(self._size, self._size + len(ids), dtype=np.int64)
        self._ids.append(ids)
        self._positions.append(np.arange(start, start + len(ids), dtype=np.int64))
        self._size += len(ids)
        return rows

    def finish(self, tokens: TensorDict, num_sequences: int, norm: Normalizers, device: torch.device) -> MicroBatch:
        """The packed micro-batch on `device`."""
        if self._size == 0:
            self.add(0, -1, np.zeros(1, dtype=np.int32), np.zeros(0, dtype=np.int32))
        segments = Segments(
            rows=_tensor(self._segment_rows, device),
            lengths=tuple(len(s) for s in self._segment_rows),
            owner=_tensor(self._owner, device),
            borrowed=tuple(self._borrowed),
        )
        return MicroBatch(
            input_ids=_tensor(self._ids, device),
            position_ids=_tensor(self._positions, device),
            segments=segments,
            predictor=_tensor(self._predictor, device),
            targets=_tensor(self._targets, device),
            sequence=_tensor(self._sequence, device),
            tokens=tokens.to(device),
            num_sequences=num_sequences,
            norm=norm,
        )


def _tensor(parts: Sequence[npt.NDArray[np.int32] | IndexArray], device: torch.device) -> Tensor:
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(flat.astype(np.int64, copy=False)).to(device, non_blocking=True)


def _picked_mask(blocks: Sequence[RolloutBlock], index: npt.NDArray[np.intp], total: int) -> Tensor:
    if all(b.loss_mask is None for b in blocks):
        return torch.ones(total, dtype=torch.bool)
    parts = [
        split(
            np.ones(len(b.response_ids), dtype=np.bool_) if b.loss_mask is None else b.loss_mask, b.meta.response_length
        )
        for b in blocks
    ]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.bool_), *(parts[b][r] for b, r in index)]))


def _picked_logprobs(
    blocks: Sequence[RolloutBlock], metas: Sequence[SequenceMeta], index: npt.NDArray[np.intp]
) -> Tensor:
    flat = [
        np.full(len(b.response_ids), np.nan, dtype=np.float32) if b.logprobs is None else b.logprobs for b in blocks
    ]
    parts = [split(f, m.response_length) for f, m in zip(flat, metas, strict=True)]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.float32), *(parts[b][r] for b, r in index)]))
