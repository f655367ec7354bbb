"""A step's batch as the driver holds it: one order over all replicas, columns in parts, nothing copied without need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import ray

from trainer import samples as module
from trainer.samples import Samples, check_complete
from workers.group import WorkerError
from workers.protocol import FloatArray, Prompt, RolloutBlock, Scores, Trajectory
from workers.train_worker import Column, RankBatch, _collect

LENGTHS = {(0, 0): 2, (0, 1): 0, (1, 0): 3, (1, 1): 1, (2, 0): 1, (2, 1): 2}
"""Response length of (group, sample)."""


def trajectory(group: int, sample: int, *, masked: bool = False) -> Trajectory:
    length = LENGTHS[group, sample]
    return Trajectory(
        group=group,
        sample=sample,
        prompt_ids=(group,) * (group + 1),
        response_ids=tuple(range(10 * group, 10 * group + length)),
        finish_reason="stop" if sample else "length",
        weight_version=1,
        loss_mask=tuple(i > 0 for i in range(length)) if masked else None,
    )


def scores(values: list[float], parts: dict[str, list[float]] | None = None, errors: list[str] | None = None) -> Scores:
    arrays = {name: np.array(part, dtype=np.float32) for name, part in (parts or {}).items()}
    return Scores(np.array(values, dtype=np.float32), arrays, tuple(errors or [""] * len(values)))


def blocks(*, masked: bool = False) -> list[RolloutBlock]:
    """Two replicas; the second one's responses finished in another order."""
    first = [(0, 0), (0, 1), (1, 0)]
    second = [(2, 1), (1, 1), (2, 0)]
    return [
        RolloutBlock.collate([trajectory(*pair) for pair in first]),
        RolloutBlock.collate([trajectory(*pair, masked=masked) for pair in second]),
    ]


def make_samples(*, masked: bool = False) -> Samples:
    """The blocks stand for their references."""
    made = blocks(masked=masked)
    prompts = {g: Prompt(index=100 + g, token_ids=(g,) * (g + 1)) for g in range(3)}
    given = [
        scores([1.0, 2.0, 3.0], {"format": [0.1, 0.2, 0.3]}),
        scores([6.0, 4.0, 5.0], {"answer": [0.6, 0.4, 0.5]}, ["", "timed out after 1 s", ""]),
    ]
    return Samples.join("train-1", prompts, tuple(made), [b.meta for b in made], given)


@pytest.fixture
def local_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """References are the objects themselves."""
    monkeypatch.setattr(module.ray, "get", lambda reference: reference)


def test_scores_follow_their_sequences_into_the_common_order() -> None:
    batch = make_samples()
    assert list(zip(batch.meta.group.tolist(), batch.meta.sample.tolist(), strict=True)) == sorted(LENGTHS)
    assert batch.meta.response_length.tolist() == [2, 0, 3, 1, 1, 2]
    assert batch.rewards.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.errors == ("", "", "", "timed out after 1 s", "", "")
    assert batch.num_tokens == 9
    np.testing.assert_allclose(batch.parts["format"], [0.1, 0.2, 0.3, np.nan, np.nan, np.nan], rtol=1e-6)
    np.testing.assert_allclose(batch.parts["answer"], [np.nan, np.nan, np.nan, 0.4, 0.5, 0.6], rtol=1e-6)
    assert [batch.finish_reason(row) for row in (0, 1)] == ["length", "stop"]


def test_a_replica_without_prompts_changes_nothing() -> None:
    made = [*blocks(), RolloutBlock.collate([])]
    given = [scores([1.0, 2.0, 3.0]), scores([6.0, 4.0, 5.0]), scores([])]
    batch = Samples.join("k", {}, tuple(made), [b.meta for b in made], given)
    assert batch.rewards.tolist() == [1, 2, 3, 4, 5, 6]


def test_every_response_must_have_come_exactly_once() -> None:
    metas = [b.meta for b in blocks()]
    check_complete(metas, num_prompts=3, n=2)
    check_complete(metas[::-1], num_prompts=3, n=2)
    with pytest.raises(WorkerError, match=r"3 of 6 responses .*prompt 1 sample 1 0 times, prompt 2 sample 0 0 times"):
        check_complete(metas[:1], num_prompts=3, n=2)
    with pytest.raises(WorkerError, match=r"3 of 6 responses .*prompt 0 sample 0 2 times"):
        check_complete([*metas, metas[0]], num_prompts=3, n=2)
    with pytest.raises(WorkerError, match=r"2 of 8 responses .*prompt 3 sample 0 0 times"):
        check_complete(metas, num_prompts=4, n=2)


def test_rows_can_be_dropped() -> None:
    batch = make_samples().take(np.array([0, 2, 5]))
    assert batch.rewards.tolist() == [1, 3, 6]
    assert batch.where.tolist() == [[0, 0], [0, 2], [1, 0]]
    assert batch.num_tokens == 7
    assert batch.errors == ("", "", "")


def column(parts: list[tuple[list[int], list[float]]]) -> Column:
    """(rows, values) of each part."""
    return Column("x", tuple((np.array(v, dtype=np.float32), np.array(r, dtype=np.int64)) for r, v in parts))


def test_a_column_made_on_several_ranks_is_put_together() -> None:
    batch = make_samples()
    batch.columns["x"] = column([([1, 2, 5], [20, 21, 22, 50, 51]), ([0, 3, 4], [0, 1, 30, 40]), ([], [])])
    assert batch.fetch_column("x").tolist() == [0, 1, 20, 21, 22, 30, 40, 50, 51]
    np.testing.assert_allclose(batch.sequence_means("x"), [0.5, 0, 21, 30, 40, 50.5])


def test_means_of_a_batch_that_ends_with_an_empty_response() -> None:
    batch = make_samples().take(np.array([0, 1]))
    batch.put_column("x", np.array([1.0, 3.0], dtype=np.float32))
    assert batch.sequence_means("x").tolist() == [2.0, 0.0]


def test_columns_travel_inline_or_through_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[FloatArray] = []
    monkeypatch.setattr(module.ray, "put", lambda values: stored.append(values) or "reference")
    batch = make_samples()
    small = np.zeros(batch.num_tokens, dtype=np.float32)
    batch.put_column("small", small)
    assert not stored
    monkeypatch.setattr(module, "INLINE_BYTES", small.nbytes - 1)
    batch.put_column("large", small)
    assert len(stored) == 1
    assert batch.columns["large"].parts[0][0] == "reference"
    with pytest.raises(AssertionError, match="short"):
        batch.put_column("short", small[:-1])


@pytest.mark.usefixtures("local_blocks")
def test_the_loss_mask_is_fetched_only_where_there_is_one() -> None:
    assert make_samples().fetch_loss_mask() is None
    mask = make_samples(masked=True).fetch_loss_mask()
    assert mask is not None
    assert mask.tolist() == [True, True, True, True, True, False, False, False, True]


@pytest.mark.usefixtures("local_blocks")
def test_tokens_of_one_sequence_can_be_looked_at() -> None:
    assert make_samples().fetch_tokens(5) == ([2, 2, 2], [20, 21])
    assert make_samples().fetch_tokens(1) == ([0], [])


def rank_batch(batch: Samples, rows: list[int]) -> RankBatch:
    return batch.rank_batch(np.array(rows, dtype=np.int64), 2)


@pytest.mark.parametrize("rows", [[0, 2, 4], [1, 3, 5], [0, 1, 2, 3, 4, 5], [1], []])
def test_a_rank_collects_its_own_values(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From whichever ranks made them, in its own order."""
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    batch = make_samples()
    parts = column([([1, 2, 5], [20, 21, 22, 50, 51]), ([0, 3, 4], [0, 1, 30, 40])])
    values = [[0, 1], [], [20, 21, 22], [30], [40], [50, 51]]
    assert _collect(parts, rank_batch(batch, rows)).tolist() == [v for row in rows for v in values[row]]


def test_a_ranks_own_part_is_used_as_it_is() -> None:
    own: Any = np.array([20, 21, 22, 50, 51], dtype=np.float32)
    parts = Column("x", ((own, np.array([1, 2, 5])),))
    assert _collect(parts, rank_batch(make_samples(), [1, 2, 5])) is own


def test_a_rank_gets_references_and_lengths_not_tokens() -> None:
    batch = make_samples()
    share = rank_batch(batch, [1, 4])
    assert share.blocks is batch.blocks
    assert share.index.tolist() == [[0, 1], [1, 2]]
    assert share.lengths.tolist() == [2, 0, 3, 1, 1, 2]
    assert share.key != rank_batch(batch, [1, 2, 4]).key
