"""Signs of life of one replica: what it is doing, once a second, and whether it hangs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import ray

from workers.group import DEATHS, WorkerError, WorkerLost
from workers.rollout.spec import ReplicaStatus

GROUP = "rollout"
"""Name of the replicas in errors."""
EVERY_S = 1.0
"""How often a replica is asked for its status."""
FIRST_S = 0.1
"""When it is first asked in a call: a short one shall have a reading from its middle."""
LAST_READING_S = 1.0
"""How long the reading at the end of a call may take: it delays the step."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A replica's status at one moment of a generate call.

    time: seconds since the epoch. seconds: since the reading before, or since the call began; tokens, preemptions: in
    those seconds.
    """

    time: float
    replica: int
    status: ReplicaStatus
    seconds: float
    tokens: int
    preemptions: int


class Pulse:
    """Asks a replica how it is, and raises WorkerLost when it is dead or hangs.

    It hangs if for `hang_timeout_s` its engine makes no step while it is busy, or it does not answer. Before its first
    token, when it may compile, it has `startup_timeout_s`. A paused replica says that it is not busy.

    Only seconds in which somebody looked count, so that a driver which was held itself does not blame the replica.

    question: the status asked for, while it is under way.
    """

    def __init__(self, rank: int, actor: Any, *, hang_timeout_s: float, startup_timeout_s: float) -> None:
        self._rank = rank
        self._actor = actor
        self._limits = (startup_timeout_s, hang_timeout_s)
        self._newest = ReplicaStatus(0, False, 0, 0, 0, 0.0, 0, 0)
        self.question: Any = None
        self._warm = False
        self._asked_at = 0.0
        self.begin()

    def begin(self) -> None:
        """A call begins now."""
        self._began = self._since = time.time()
        self._due = self._began + FIRST_S
        self._looked_at = time.monotonic()
        self._silent_s = 0.0

    def responded(self) -> None:
        """Responses of it have come: another sign of life."""
        self._warm = True
        self._silent_s = 0.0

    @property
    def rest_s(self) -> float:
        """Seconds until there is something to do, unless an answer comes."""
        return EVERY_S if self.question is not None else min(max(0.0, self._due - time.time()), EVERY_S)

    def look(self) -> Reading | None:
        """Takes the answer, if there is one, and asks again after a second. Never waits.

        Raises WorkerLost if the replica is dead or hangs.
        """
        now = time.monotonic()
        self._silent_s += min(now - self._looked_at, 2 * EVERY_S)
        self._looked_at = now
        before, reading = self._newest, self._answer()
        if reading is not None and (not reading.status.busy or reading.status.steps != before.steps):
            self._silent_s = 0.0
        if self._silent_s > self._limits[self._warm or self._newest.tokens > 0]:
            what = "engine step" if self.question is None else "answer"
            raise WorkerLost(GROUP, self._rank, "status", f"hangs: no {what} for {self._silent_s:.0f} s")
        if time.time() >= self._due:
            self._ask()
        return None if reading is None or reading.time < self._began else reading

    def last(self) -> list[Reading]:
        """What it says at the end of a call: the answer that may be under way, and one of now."""
        answers = []
        try:
            if self.question is not None:
                answers.append(self._wait())
            self._ask()
            answers.append(self._wait())
        except WorkerLost:
            pass  # after its work was done: the next call will see
        return [a for a in answers if a is not None and a.time >= self._began]

    def _ask(self) -> None:
        if self.question is None:
            self._asked_at = time.time()
            self._due = self._asked_at + EVERY_S
            self.question = self._actor.status.remote()

    def _wait(self) -> Reading | None:
        ray.wait([self.question], timeout=LAST_READING_S)
        return self._answer()

    def _answer(self) -> Reading | None:
        if self.question is None or not ray.wait([self.question], timeout=0)[0]:
            return None
        try:
            status: ReplicaStatus = ray.get(self.question)
        except DEATHS as death:
            raise WorkerLost(GROUP, self._rank, "status", f"the worker process died: {death}") from death
        except Exception as error:
            raise WorkerError(f"{GROUP} rank {self._rank}, status: {error}") from error
        self.question = None
        reading = Reading(
            time=self._asked_at,
            replica=self._rank,
            status=status,
            seconds=max(0.0, self._asked_at - self._since),
            tokens=status.tokens - self._newest.tokens,
            preemptions=status.preemptions - self._newest.preemptions,
        )
        self._newest, self._since = status, max(self._since, self._asked_at)
        return reading
