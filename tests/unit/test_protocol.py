"""Trajectories to flat blocks and back, and one order for all of them, whatever finished first."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.protocol import FINISH_REASONS, RolloutBlock, SequenceMeta, Trajectory, concat_meta, split


def trajectory(group: int, sample: int, response: tuple[int, ...] = (7, 8), **changes: object) -> Trajectory:
    """A response whose prompt names its group."""
    values: dict[str, object] = {
        "group": group,
        "sample": sample,
        "prompt_ids": (100, group),
        "response_ids": response,
        "finish_reason": "stop",
        "weight_version": 3,
    }
    return Trajectory(**(values | changes))  # type: ignore[arg-type]


def test_collate_keeps_order_and_stores_each_prompt_once() -> None:
    block = RolloutBlock.collate(
        [trajectory(4, 0), trajectory(2, 0, (9,), finish_reason="length"), trajectory(4, 1, ())]
    )
    assert block.prompt_ids.tolist() == [100, 4, 100, 2]
    assert block.prompt_lengths.tolist() == [2, 2]
    assert block.prompt_of.tolist() == [0, 1, 0]
    assert [p.tolist() for p in block.prompts()] == [[100, 4], [100, 2], [100, 4]]
    assert [r.tolist() for r in block.responses()] == [[7, 8], [9], []]
    assert block.meta.response_length.tolist() == block.meta.loss_tokens.tolist() == [2, 1, 0]
    assert block.meta.prompt_length.tolist() == [2, 2, 2]
    assert [FINISH_REASONS[i] for i in block.meta.finish_reason] == ["stop", "length", "stop"]
    assert block.meta.weight_version.tolist() == [3, 3, 3]
    assert block.loss_mask is None
    assert block.logprobs is None


def test_masks_and_logprobs_are_filled_in_where_only_some_have_them() -> None:
    block = RolloutBlock.collate(
        [
            trajectory(0, 0, loss_mask=(False, True)),
            trajectory(0, 1, (5,), logprobs=(-0.25,)),
        ]
    )
    assert block.loss_mask is not None
    assert block.logprobs is not None
    assert block.loss_mask.tolist() == [False, True, True]
    assert block.meta.loss_tokens.tolist() == [1, 1]
    assert np.isnan(block.logprobs).tolist() == [True, True, False]
    assert block.logprobs.dtype == np.float32
    assert block.logprobs[2] == -0.25


def test_an_empty_block_is_a_block() -> None:
    """A replica that got no prompts answers with one."""
    block = RolloutBlock.collate([])
    assert len(block.meta) == 0
    assert block.prompts() == block.responses() == []
    table, where = concat_meta([block.meta, RolloutBlock.collate([trajectory(0, 0)]).meta])
    assert len(table) == 1
    assert where.tolist() == [[1, 0]]


def test_blocks_survive_pickling() -> None:
    block = RolloutBlock.collate([trajectory(0, 0, logprobs=(-1.0, -2.0)), trajectory(1, 0)])
    again: RolloutBlock = pickle.loads(pickle.dumps(block))
    assert [r.tolist() for r in again.responses()] == [[7, 8], [7, 8]]
    np.testing.assert_array_equal(again.logprobs, block.logprobs)


@given(order=st.permutations([(g, s) for g in range(4) for s in range(3)]), cut=st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_the_order_is_prompt_then_sample_whatever_finished_first(order: list[tuple[int, int]], cut: int) -> None:
    sequences = [trajectory(g, s, (10 * g + s,)) for g, s in order]
    blocks = [RolloutBlock.collate(sequences[:cut]), RolloutBlock.collate(sequences[cut:])]
    table, where = concat_meta([b.meta for b in blocks])
    assert list(zip(table.group.tolist(), table.sample.tolist(), strict=True)) == sorted(order)
    responses = [b.responses() for b in blocks]
    assert [int(responses[b][r][0]) for b, r in where] == [10 * g + s for g, s in sorted(order)]


def test_tables_can_be_cut_and_joined() -> None:
    meta = RolloutBlock.collate([trajectory(g, 0) for g in range(3)]).meta
    picked = meta.take(np.array([2, 0]))
    assert picked.group.tolist() == [2, 0]
    assert SequenceMeta.concat([picked, meta]).group.tolist() == [2, 0, 0, 1, 2]


def test_split_gives_one_view_per_length() -> None:
    flat = np.arange(5)
    parts = split(flat, np.array([2, 0, 3], dtype=np.int32))
    assert [p.tolist() for p in parts] == [[0, 1], [], [2, 3, 4]]
    assert all(np.shares_memory(p, flat) for p in parts if len(p))
    assert split(flat[:0], np.zeros(0, dtype=np.int32)) == []
