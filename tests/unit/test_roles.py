"""A role deals a batch to data-parallel ranks: ranks that hold a model together get the same, and answer once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_samples import make_samples
from torch import Tensor

from trainer.batching import Limits
from trainer.roles import Passes, TrainRole, UpdateSettings
from trainer.samples import Samples
from workers.batch import MicroBatch
from workers.engines.base import ParallelSpec, StepResult, Update
from workers.train_worker import RankBatch

LAYOUTS = [
    (ParallelSpec(), 2),
    (ParallelSpec(tensor=2), 2),
    (ParallelSpec(tensor=2), 4),
    (ParallelSpec(pipeline=2), 4),
    (ParallelSpec(tensor=2, pipeline=2), 8),
]
"""How a model is cut, and the number of training ranks."""


class Answer:
    """A call that has ended."""

    def __init__(self, results: list[Any]) -> None:
        self._results = results

    def result(self, timeout_s: float) -> list[Any]:
        return self._results


class Ranks:
    """Training ranks that write down what they are asked, and answer as Megatron's do: the last stage's first."""

    def __init__(self, parallel: ParallelSpec, size: int) -> None:
        self.parallel = parallel
        self.size = size
        self.asked: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return self.size

    def share_of(self, rank: int) -> tuple[int, bool]:
        """The data-parallel rank, and whether this rank holds its outputs; independent of ParallelSpec's formula."""
        order = np.arange(self.size).reshape(self.parallel.pipeline, -1, self.parallel.tensor)
        ((stage, share, part),) = np.argwhere(order == rank)
        return int(share), bool(stage == self.parallel.pipeline - 1 and part == 0)

    def scatter_with_payload(self, method: Any, arguments: Sequence[tuple[Any, ...]]) -> tuple[Answer, tuple[Any, ...]]:
        self.asked = list(arguments)
        every_rank = self.parallel == ParallelSpec()
        holds = [every_rank or self.share_of(rank)[1] for rank in range(self.size)]
        payloads = [
            said_of(call[1]) if h else np.zeros(0, np.float32) for call, h in zip(arguments, holds, strict=True)
        ]
        return Answer(holds), tuple(payloads)

    def scatter(self, method: Any, arguments: Sequence[tuple[Any, ...]]) -> Answer:
        self.asked = list(arguments)
        result = StepResult({"loss": 1.0}, grad_norm=2.0, lr=0.1, skipped=False)
        return Answer([([result] * len(call[3]), 100 + rank) for rank, call in enumerate(arguments)])


def said_of(batch: RankBatch) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What the model says of the tokens: the number of their row."""
    return np.concatenate([np.full(batch.lengths[row], row, np.float32) for row in batch.rows])


def no_loss(outputs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.zeros(()), {}


def make_role(ranks: Ranks) -> TrainRole:
    passes = Passes(groups_per_minibatch=3, epochs=2, shuffle_seed=None)
    return TrainRole(
        "actor",
        ranks,  # type: ignore[arg-type]
        parallel=ranks.parallel,
        limits=Limits(max_tokens=8),
        temperature=1.0,
        hidden_size=8,
        timeout_s=1.0,
        balance=passes,
        settings=UpdateSettings(no_loss, entropy=False, passes=passes, length=1.0, columns=("old_logprobs",)),
    )


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"tp{layout[0].tensor}-pp{layout[0].pipeline}-of-{layout[1]}")
def ranks(request: pytest.FixtureRequest) -> Ranks:
    return Ranks(*request.param)


def shares(ranks: Ranks) -> dict[int, list[tuple[Any, ...]]]:
    """Data-parallel rank -> what each of its ranks was asked."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for rank, call in enumerate(ranks.asked):
        found.setdefault(ranks.share_of(rank)[0], []).append(call)
    return found


def rows_of(calls: Sequence[tuple[Any, ...]]) -> list[int]:
    """The rows that the ranks of one share work on: the same on each."""
    rows = [call[1].rows.tolist() for call in calls]
    assert all(own == rows[0] for own in rows)
    assert len({call[1].key for call in calls}) == 1, "workers cache a batch by its key"
    return list(rows[0])


def test_every_row_has_one_share_and_its_values_come_back_once(ranks: Ranks) -> None:
    samples = make_samples()
    make_role(ranks).annotate(samples, "old_logprobs", step=1)
    found = shares(ranks)
    assert sorted(row for calls in found.values() for row in rows_of(calls)) == list(range(len(samples)))
    for calls in found.values():
        assert all(call[3] == calls[0][3] for call in calls), "the same micro-batches"
    column = samples.columns["old_logprobs"]
    assert len(column.parts) == len(found)
    expected = np.repeat(np.arange(len(samples)), samples.meta.response_length)
    np.testing.assert_array_equal(samples.fetch_column("old_logprobs"), expected)


@pytest.mark.parametrize(
    ("column", "output"), [("old_logprobs", "outputs"), ("values", "outputs"), ("sum_pi_squared", "sum_pi_squared")]
)
def test_a_column_says_what_the_forward_pass_is_for(column: str, output: str) -> None:
    ranks = Ranks(ParallelSpec(tensor=2), 4)
    make_role(ranks).annotate(make_samples(), column, step=1)
    assert [call[-1] for call in ranks.asked] == [output] * 4


def test_ranks_of_one_share_make_the_same_updates(ranks: Ranks) -> None:
    samples = make_samples()
    role = make_role(ranks)
    report = role.update(samples, step=1)
    found = shares(ranks)
    assert sorted(row for calls in found.values() for row in rows_of(calls)) == list(range(len(samples)))
    for calls in found.values():
        updates: list[list[Update]] = [call[3] for call in calls]
        assert len(updates[0]) == 2, "one mini-batch, two epochs"
        assert all(own == updates[0] for own in updates)
    assert report.num_updates == 2, "not once per rank"
    assert report.metrics == {"loss": 1.0}
    assert report.peak_bytes == 100 + ranks.size - 1


def test_roles_with_the_same_shares_find_rows_on_the_same_rank() -> None:
    """Megatron with tp 2 on four ranks, and FSDP on two: two shares either way."""
    samples: Samples = make_samples()
    first, second = Ranks(ParallelSpec(tensor=2), 4), Ranks(ParallelSpec(), 2)
    for ranks in (first, second):
        make_role(ranks).annotate(samples, "values", step=1)
    dealt = [{share: rows_of(calls) for share, calls in shares(ranks).items()} for ranks in (first, second)]
    assert dealt[0] == dealt[1]
