"""Packing: every token once, a shared prompt once, and everything in its place, by hand and for arbitrary lengths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from workers.batch import Batch, MicroBatch
from workers.normalizers import Normalizers
from workers.protocol import RolloutBlock, Trajectory

CPU = torch.device("cpu")
NORM = Normalizers(1.0, 1.0)
Table = list[tuple[int, list[int], list[int]]]
"""(group, prompt, response) of each sequence."""


def make_batch(table: Table) -> Batch:
    """A batch whose only extra field numbers the response tokens."""
    total = sum(len(response) for _, _, response in table)
    number = torch.arange(total, dtype=torch.float32)
    tokens = TensorDict({"loss_mask": torch.ones(total, dtype=torch.bool), "number": number}, batch_size=[total])
    prompts, responses = ([np.array(row[i], dtype=np.int32) for row in table] for i in (1, 2))
    return Batch(prompts, responses, np.array([group for group, _, _ in table], dtype=np.int32), tokens)


def pack(table: Table, rows: Sequence[int] | None = None, *, share_prompt: bool = True) -> MicroBatch:
    chosen = range(len(table)) if rows is None else rows
    return make_batch(table).micro_batch(chosen, NORM, share_prompt=share_prompt, device=CPU)


def runs_of(micro: MicroBatch) -> list[list[int]]:
    """The packed rows each sequence attends along."""
    return [part.tolist() for part in torch.split(micro.segments.rows, micro.segments.lengths)]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Groups of responses to prompts of any length, in any order; no two tokens alike."""
    sizes = draw(
        st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 4), min_size=1, max_size=4)), max_size=5)
    )
    counter = iter(range(1, 10_000))
    table: Table = []
    for group, (prompt_length, responses) in enumerate(sizes):
        prompt = [next(counter) for _ in range(prompt_length)]
        table += [(group, prompt, [next(counter) for _ in range(length)]) for length in responses]
    return draw(st.permutations(table)) if draw(st.booleans()) else table


def test_two_responses_share_their_prompt() -> None:
    micro = pack([(0, [5, 6], [7, 8]), (0, [5, 6], [9])])
    assert micro.input_ids.tolist() == [5, 6, 7]
    assert micro.position_ids.tolist() == [0, 1, 2]
    assert micro.targets.tolist() == [7, 8, 9]
    assert micro.predictor.tolist() == [1, 2, 1]
    assert micro.sequence.tolist() == [0, 0, 1]
    assert runs_of(micro) == [[0, 1, 2], [0, 1]]
    assert micro.segments.owner.tolist() == [0, 1, 2]
    assert micro.num_sequences == 2


def test_two_responses_with_a_prompt_each() -> None:
    micro = pack([(0, [5, 6], [7, 8]), (0, [5, 6], [9])], share_prompt=False)
    assert micro.input_ids.tolist() == [5, 6, 7, 5, 6]
    assert micro.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert micro.targets.tolist() == [7, 8, 9]
    assert micro.predictor.tolist() == [1, 2, 4]
    assert runs_of(micro) == [[0, 1, 2], [3, 4]]


def test_a_prompt_is_shared_only_by_neighbours_of_one_group() -> None:
    micro = pack([(3, [5], [7]), (4, [5], [7]), (3, [5], [8])])
    assert micro.input_ids.tolist() == [5, 5, 5]
    assert micro.predictor.tolist() == [0, 1, 2]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_an_empty_response_has_no_targets(share_prompt: bool) -> None:
    micro = pack([(0, [5, 6], []), (0, [5, 6], [7]), (1, [8], [])], share_prompt=share_prompt)
    assert micro.targets.tolist() == [7]
    assert micro.sequence.tolist() == [1]
    assert micro.input_ids.tolist() == ([5, 6, 8] if share_prompt else [5, 6, 5, 6, 8])
    assert micro.num_sequences == 3
    assert len(micro.segments.lengths) == 3


def test_an_empty_micro_batch_is_one_token_without_targets() -> None:
    micro = pack([(0, [5, 6], [7])], rows=[])
    assert micro.input_ids.shape == micro.position_ids.shape == (1,)
    assert micro.predictor.shape == micro.targets.shape == micro.sequence.shape == micro.tokens.batch_size == (0,)
    assert micro.predictor.dtype == micro.targets.dtype == micro.input_ids.dtype == torch.int64
    assert micro.num_sequences == 0
    assert micro.segments.lengths == (1,)


def test_rows_come_in_the_order_asked_for() -> None:
    table: Table = [(0, [1], [10, 11]), (1, [2], [20]), (2, [3], [30, 31, 32])]
    micro = pack(table, rows=[2, 0])
    assert micro.targets.tolist() == [30, 31, 32, 10, 11]
    assert micro.sequence.tolist() == [0, 0, 0, 1, 1]
    assert micro.tokens["number"].tolist() == [3, 4, 5, 0, 1]
    assert make_batch(table).token_index([2, 0]).tolist() == [3, 4, 5, 0, 1]


@given(table=tables(), share=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_token_is_packed_once(table: Table, share: bool) -> None:
    micro = pack(table, share_prompt=share)
    expected = [token for _, _, response in table for token in response[:-1]]
    if share:
        neighbours = [next(rows) for _, rows in groupby(table, key=lambda row: row[0])]
        expected += [token for _, prompt, _ in neighbours for token in prompt]
    else:
        expected += [token for _, prompt, _ in table for token in prompt]
    assert sorted(micro.input_ids.tolist()) == sorted(expected or [0])
    assert micro.targets.tolist() == [token for _, _, response in table for token in response]
    assert micro.sequence.tolist() == [i for i, (_, _, response) in enumerate(table) for _ in response]


@given(table=tables(), share=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_sequence_sees_exactly_itself(table: Table, share: bool) -> None:
    micro = pack(table, share_prompt=share)
    predictors = torch.split(micro.predictor, [len(response) for _, _, response in table]) if table else ()
    for run, predictor, (_, prompt, response) in zip(runs_of(micro) if table else [], predictors, table, strict=True):
        assert micro.input_ids[run].tolist() == prompt + response[:-1]
        assert micro.position_ids[run].tolist() == list(range(len(run)))
        assert predictor.tolist() == run[len(prompt) - 1 : len(prompt) - 1 + len(response)]
    owner, rows = micro.segments.owner, micro.segments.rows
    assert rows[owner].tolist() == list(range(len(micro.input_ids)))


def test_several_blocks_become_one_batch_in_the_order_of_the_index() -> None:
    blocks = [
        RolloutBlock.collate([trajectory(0, 0, [1], [10, 11], logprobs=[-1.0, -2.0]), trajectory(1, 0, [2], [20])]),
        RolloutBlock.collate([trajectory(2, 0, [3], [30, 31], mask=[True, False])]),
    ]
    batch = Batch.from_blocks(blocks, np.array([[1, 0], [0, 1], [0, 0]], dtype=np.intp))
    assert [r.tolist() for r in batch.responses] == [[30, 31], [20], [10, 11]]
    assert [p.tolist() for p in batch.prompts] == [[3], [2], [1]]
    assert batch.group.tolist() == [2, 1, 0]
    assert batch.tokens["loss_mask"].tolist() == [True, False, True, True, True]
    logprobs = batch.tokens["rollout_logprobs"]
    assert torch.isnan(logprobs).tolist() == [True, True, True, False, False]
    assert logprobs[3:].tolist() == [-1.0, -2.0]
    assert batch.num_tokens == 5


def test_masks_and_missing_logprobs_reach_the_micro_batch() -> None:
    block = RolloutBlock.collate(
        [trajectory(0, 0, [1], [10, 11], mask=[False, True]), trajectory(0, 1, [1], [12], logprobs=[-0.5])]
    )
    batch = Batch.from_blocks([block], np.array([[0, 1], [0, 0]], dtype=np.intp))
    micro = batch.micro_batch([1], NORM, share_prompt=True, device=CPU)
    assert micro.tokens["loss_mask"].tolist() == [False, True]
    assert torch.isnan(micro.tokens["rollout_logprobs"]).all()


def test_without_masks_and_logprobs_nothing_is_made_up() -> None:
    batch = Batch.from_blocks([RolloutBlock.collate([trajectory(0, 0, [1], [10])])], index(1))
    assert batch.tokens["loss_mask"].tolist() == [True]
    assert "rollout_logprobs" not in batch.tokens.keys()  # noqa: SIM118 (a TensorDict is not a dict)


def test_a_rank_may_have_no_sequences() -> None:
    block = RolloutBlock.collate([trajectory(0, 0, [1], [10], mask=[True], logprobs=[-0.5])])
    batch = Batch.from_blocks([block], index(0))
    assert len(batch) == 0
    assert batch.num_tokens == 0
    assert batch.tokens["loss_mask"].dtype == torch.bool
    assert batch.tokens["rollout_logprobs"].dtype == torch.float32
    assert batch.micro_batch([], NORM, share_prompt=True, device=CPU).num_sequences == 0


def test_a_column_of_the_wrong_length_is_refused() -> None:
    batch = make_batch([(0, [1], [10, 11])])
    with pytest.raises(ValueError, match="column 'advantages' has 1 values for 2 response tokens"):
        batch.set_column("advantages", np.zeros(1, dtype=np.float32))
    values = np.array([1.0, 2.0], dtype=np.float32)
    values.flags.writeable = False  # as arrays from the object store are
    batch.set_column("advantages", values)
    assert batch.tokens["advantages"].tolist() == [1.0, 2.0]


def index(rows: int) -> npt.NDArray[np.intp]:
    """The first rows of block 0."""
    return np.array([[0, r] for r in range(rows)], dtype=np.intp).reshape(-1, 2)


def trajectory(
    group: int,
    sample: int,
    prompt: list[int],
    response: list[int],
    *,
    mask: list[bool] | None = None,
    logprobs: list[float] | None = None,
) -> Trajectory:
    return Trajectory(
        group=group,
        sample=sample,
        prompt_ids=tuple(prompt),
        response_ids=tuple(response),
        finish_reason="stop",
        weight_version=1,
        loss_mask=None if mask is None else tuple(mask),
        logprobs=None if logprobs is None else tuple(logprobs),
    )
