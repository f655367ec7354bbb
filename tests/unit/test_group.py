"""What reaches which rank. Waiting, deadlines and failures need real actors: tests/engine/test_group_ray.py."""

from __future__ import annotations

import pytest

from workers.group import WorkerGroup


class Worker:
    """The class whose methods name the calls."""

    def add(self, number: int, to: int = 0) -> int:
        return number + to

    def make(self, size: int) -> tuple[int, bytes]:
        return size, bytes(size)


class FakeMethod:
    """Stands for `actor.method`: remembers how it was called and answers with what it would compute."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_returns = 1

    def options(self, num_returns: int) -> FakeMethod:
        self.num_returns = num_returns
        return self

    def remote(self, *args: int) -> object:
        result = getattr(Worker(), self.name)(*args)
        return list(result) if self.num_returns > 1 else result


class FakeActor:
    def __getattr__(self, name: str) -> FakeMethod:
        return FakeMethod(name)


@pytest.fixture
def group() -> WorkerGroup:
    return WorkerGroup("trainer", [FakeActor(), FakeActor(), FakeActor()])


def test_broadcast_gives_every_rank_the_same(group: WorkerGroup) -> None:
    call = group.broadcast(Worker.add, 2, 3)
    assert call.refs == (5, 5, 5)
    assert (call.group, call.method, len(group)) == ("trainer", "add", 3)


def test_scatter_gives_each_rank_its_own(group: WorkerGroup) -> None:
    assert group.scatter(Worker.add, [(1,), (2, 10), (3,)]).refs == (1, 12, 3)


def test_scatter_refuses_the_wrong_number_of_shares(group: WorkerGroup) -> None:
    with pytest.raises(AssertionError, match="add"):
        group.scatter(Worker.add, [(1,), (2,)])
    with pytest.raises(AssertionError, match="make"):
        group.scatter_with_payload(Worker.make, [(1,)] * 4)


def test_payloads_are_kept_apart_from_answers(group: WorkerGroup) -> None:
    call, payloads = group.scatter_with_payload(Worker.make, [(1,), (0,), (2,)])
    assert call.refs == (1, 0, 2)
    assert payloads == (b"\0", b"", b"\0\0")


def test_part_of_a_group_keeps_its_ranks() -> None:
    call = WorkerGroup("trainer", [FakeActor(), FakeActor()], ranks=[1, 3]).broadcast(Worker.add, 1)
    assert call.ranks == (1, 3)
    assert WorkerGroup("trainer", [FakeActor(), FakeActor()]).ranks == (0, 1)


def test_an_empty_group_answers_at_once() -> None:
    assert WorkerGroup("nobody", []).broadcast(Worker.add, 1).result(timeout_s=0.0) == []
