"""What a weight sync says of the weights that replicas hold. The groups are stand-ins that answer by a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from workers.group import WorkerError, WorkerGroup
from workers.rollout.pool import RolloutPool
from workers.rollout.spec import UpdateReport
from workers.sync.buckets import Bucket
from workers.sync.relay import Routes
from workers.sync.sync import SyncReport, WeightSync


class Answer:
    """A call that is done."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def result(self, timeout_s: float) -> list[Any]:
        return self._values


class Group:
    """Answers each method by its name."""

    def __init__(self, **answers: list[Any]) -> None:
        self._answers = answers
        self.ranks = range(len(next(iter(answers.values()))))

    def broadcast(self, method: Callable[..., Any], *args: object) -> Answer:
        return Answer(self._answers[method.__name__])

    def scatter(self, method: Callable[..., Any], arguments: Sequence[tuple[object, ...]]) -> Answer:
        return self.broadcast(method)


class Pool:
    """Replicas that answer so at the end of an update."""

    def __init__(self, *reports: UpdateReport) -> None:
        nothing = [None] * len(reports)
        self._group = Group(begin_update=nothing, load_bucket=nothing, finish_update=list(reports))

    def update(self, publish: Callable[[Any], SyncReport]) -> SyncReport:
        return publish(self._group)


def bucket(checksum: int) -> Bucket:
    return Bucket("name", "float32", (), num_bytes=100, checksum=checksum)


def publish(*checksums: int | None) -> SyncReport:
    """Two ranks send weights with the checksums 3 and 4; the replicas answer with these."""
    trainers = Group(open_weights=[1, 1], publish_bucket=[bucket(3), bucket(4)])
    pool = Pool(*(UpdateReport(5, checksum) for checksum in checksums))
    sync = WeightSync(
        cast(WorkerGroup, trainers), cast(RolloutPool, pool), "actor", 1.0, Routes((0, 0), (0,) * len(checksums))
    )
    sync.open("float32", 1 << 20, "shared_memory")
    return sync.publish(9)


def test_weights_are_verified_where_every_replica_has_a_checksum() -> None:
    assert publish(7, 7) == SyncReport(9, 5, 200, 2, verified=True, bytes_between_nodes=0)
    assert not publish(7, None).verified, "a replica of several devices has none"
    assert not publish(None).verified


def test_another_checksum_is_an_error() -> None:
    with pytest.raises(WorkerError, match="replica 1 does not hold the trainers' weights"):
        publish(7, 8)
