"""When a replica hangs, and when it does not: the rule, with a clock and a replica of the test's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from workers.group import WorkerLost
from workers.rollout import watch
from workers.rollout.spec import ReplicaStatus
from workers.rollout.watch import Pulse, Reading


class World:
    """A replica, its driver's clock, and Ray between them. answers: whether questions are answered, at once."""

    pulse: Pulse

    def __init__(self) -> None:
        self.now = 1000.0
        self.answers = True
        self.state = ReplicaStatus(7, True, 0, 1, 0, 0.0, 0, 0)
        self.asked = 0
        self.actor = SimpleNamespace(status=SimpleNamespace(remote=self._ask))

    def _ask(self) -> object:
        self.asked += 1
        return object()

    def wait(self, refs: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return (refs, []) if self.answers else ([], refs)

    def get(self, ref: object) -> ReplicaStatus:
        return self.state

    def pass_time(self, seconds: float, *, busy: bool = True, steps: int = 0, tokens: int = 0) -> list[Reading]:
        """Second by second; steps, tokens: made in each."""
        readings = []
        for _ in range(round(seconds)):
            self.now += 1.0
            done = self.state
            self.state = ReplicaStatus(7, busy, done.steps + steps, 1, 0, 0.0, 0, done.tokens + tokens)
            readings += [self.pulse.look(), self.pulse.look()]
        return [r for r in readings if r is not None]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A replica that has just been built."""
    made = World()
    monkeypatch.setattr(watch, "time", SimpleNamespace(time=lambda: made.now, monotonic=lambda: made.now))
    monkeypatch.setattr(watch, "ray", SimpleNamespace(wait=made.wait, get=made.get))
    made.pulse = Pulse(3, made.actor, hang_timeout_s=10, startup_timeout_s=100)
    return made


def test_one_reading_a_second_with_what_was_done_in_it(world: World) -> None:
    readings = world.pass_time(5, steps=10, tokens=100)
    assert len(readings) in (4, 5)
    assert world.asked <= 6
    assert {r.tokens for r in readings[1:]} == {100}
    assert {r.seconds for r in readings[1:]} == {1.0}
    assert {r.replica for r in readings} == {3}


def test_busy_without_a_step_is_a_hang(world: World) -> None:
    world.pass_time(3, steps=1, tokens=1)
    world.pass_time(8)
    with pytest.raises(WorkerLost, match="rollout rank 3, status: hangs: no engine step for 1"):
        world.pass_time(4)


def test_silence_is_a_hang(world: World) -> None:
    world.pass_time(3, steps=1, tokens=1)
    world.answers = False
    world.pass_time(8, steps=1)
    with pytest.raises(WorkerLost, match="hangs: no answer for 1"):
        world.pass_time(4, steps=1)


def test_before_the_first_token_it_may_compile(world: World) -> None:
    world.pass_time(90)
    with pytest.raises(WorkerLost, match="no engine step for 10"):
        world.pass_time(15)


def test_a_response_that_was_seen_ends_that_time(world: World) -> None:
    world.pass_time(20)
    world.pulse.responded()
    world.pass_time(8)
    with pytest.raises(WorkerLost, match="no engine step for 1"):
        world.pass_time(4)


def test_idle_or_paused_is_no_hang(world: World) -> None:
    world.pass_time(3, steps=1, tokens=1)
    world.pass_time(60, busy=False)
    world.pass_time(8)


def test_steps_without_tokens_are_life(world: World) -> None:
    """A long prompt is computed in pieces."""
    world.pass_time(3, steps=1, tokens=1)
    world.pass_time(60, steps=1)


def test_a_driver_that_was_held_does_not_blame_the_replica(world: World) -> None:
    world.pass_time(3, steps=1, tokens=1)
    world.answers = False
    world.now += 3600
    world.pulse.look()
    world.answers = True
    world.pass_time(3, steps=1, tokens=1)


def test_each_call_begins_anew(world: World) -> None:
    world.pass_time(3, steps=1, tokens=1)
    world.pass_time(8)
    world.pulse.begin()
    world.pass_time(8)


def test_an_answer_from_before_the_call_is_no_reading_of_it(world: World) -> None:
    world.pass_time(2, steps=1, tokens=1)
    world.answers = False
    world.pass_time(2)
    assert world.pulse.question is not None
    world.now += 100
    world.pulse.begin()
    world.answers = True
    assert world.pulse.look() is None
    assert [r.time >= 1100 for r in world.pulse.last()] == [True]
