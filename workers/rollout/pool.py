"""The replicas of a run: what they are doing, and their replacement when one dies or hangs.

    for chunk in pool.generate(requests):   # finished responses, from any replica, as they come
        ...

Nothing is lost: prompts whose responses had not come back when a replica was lost are generated again by the one that
takes its place. Nothing comes twice: a chunk counts when the driver has it, and only the rest is asked for again, with
the same seed: a replica lost before its first chunk changes nothing. After that the responses under way are drawn anew,
the long ones more often than the short, which is the price of going on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import ray

from workers.group import WorkerError, WorkerGroup, WorkerLost
from workers.rollout.calls import Chunk, GenerateCall
from workers.rollout.family import Family, end_family, family_of
from workers.rollout.spec import GenerateRequest, GenerateStats
from workers.rollout.vllm.engine import TAGS
from workers.rollout.vllm.replica import VllmReplica
from workers.rollout.watch import GROUP, Pulse, Reading

T = TypeVar("T")
_log = logging.getLogger(__name__)  # not configured: warnings go to standard error as they are


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """timeout_s: of a generate call; update_timeout_s: of sleeping, waking and a weight update; startup_timeout_s: of
    starting a replica. hang_timeout_s: as in `Pulse`. max_replacements: between two `take_replaced`, a step.
    memory_share: of each of its devices, that must be free for a replica to start.
    """

    timeout_s: float
    update_timeout_s: float
    startup_timeout_s: float
    hang_timeout_s: float
    max_replacements: int
    memory_share: float = 1.0


@dataclass(slots=True)
class _Replica:
    """One actor. family: its processes, known when it is up."""

    rank: int
    actor: Any
    pulse: Pulse
    family: Family | None = None


class RolloutPool:
    """Owns the replicas. start: starts the one of a rank, and returns at once; observe: takes every reading.
    make_room(bytes, share, rank): frees so many bytes, and this share at least, of the devices of a replica that is
    replaced, as far as others there can do without.

    Replacement: the old processes are ended, a new replica starts in their place, sleeps as far as the others do, and
    gets the weights of the last `update`, before it generates at the latest.
    """

    def __init__(
        self, start: Callable[[int], Any], num_replicas: int, *, limits: PoolLimits, observe: Callable[[Reading], None]
    ) -> None:
        self._start = start
        self.make_room: Callable[[int, float, int], None] = lambda num_bytes, share, rank: None
        self.limits = limits
        self.observe = observe
        self._replicas = [self._new(rank) for rank in range(num_replicas)]
        self._publish: Callable[[WorkerGroup], Any] | None = None
        self._stale = set(range(num_replicas))
        self._replaced = 0
        self._asleep: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._peaks: dict[str, int] = {}
        self.peak_bytes = 0

    def __len__(self) -> int:
        return len(self._replicas)

    def ready(self) -> None:
        """Waits until every replica is up. Raises WorkerError if one is not: what fails at the start fails again."""
        self._await(self._replicas)

    def take_replaced(self) -> int:
        """Replicas replaced since the last call."""
        replaced, self._replaced = self._replaced, 0
        return replaced

    def update(self, publish: Callable[[WorkerGroup], T]) -> T:
        """Gives all replicas new weights. publish: does it to a group of them, and does it again after a loss.

        It is kept, to give a replacement the same weights, as long as they are the trainers'.
        """
        self._publish = publish
        while True:
            try:
                report = publish(self._group(range(len(self))))
            except WorkerLost as lost:
                self.mend(lost)
            else:
                self._stale.clear()
                return report

    def close(self) -> None:
        """Ends all replicas; returns when their processes are gone and their devices free."""
        for replica in self._replicas:
            ray.kill(replica.actor)  # first, so that Ray does not take its end for an accident
            if replica.family is not None:
                end_family(replica.family, GROUP, replica.rank)

    def sleep(self, *, keep_weights: bool = False) -> dict[str, int]:
        """All replicas give memory back; returns how much one will take again at most, by tag. keep_weights: in host
        memory, where no weight sync follows."""
        answers = self._broadcast(VllmReplica.sleep, keep_weights)
        self._asleep = set(TAGS)
        self._sizes = {tag: max(answer[tag] for answer in answers) for tag in TAGS}
        return self._sizes

    def wake(self, tag: str, *, in_sync: bool = True) -> None:
        """All replicas take memory again, for "weights" or "kv_cache". in_sync: it counts among the sync's peaks."""
        peak = max(self._broadcast(VllmReplica.wake, tag))
        self._asleep.discard(tag)
        if in_sync:
            self._note_peak("sync", peak)

    def take_peaks(self) -> dict[str, int]:
        """Since the last call: most bytes in use by everyone on a replica's device, in "generate" and in "sync"."""
        peaks, self._peaks = self._peaks, {}
        return peaks

    def generate(self, requests: Sequence[GenerateRequest]) -> Iterator[Chunk]:
        """Chunks of all replicas as they finish; requests: one per replica.

        Raises WorkerError if a replica fails, is late, or too many are lost.
        """
        while self._stale:
            try:
                self._give(min(self._stale))
            except WorkerLost as lost:
                self.mend(lost)
        yield from _Round(self, requests).chunks()

    def begin(self, rank: int, request: GenerateRequest) -> GenerateCall:
        """Starts a generate call."""
        replica = self._replicas[rank]
        replica.pulse.begin()
        stream = replica.actor.generate.options(num_returns="streaming").remote(request)
        return GenerateCall(rank, replica.pulse, request, stream, time.monotonic() + self.limits.timeout_s)

    def mend(self, lost: WorkerLost, *, weights: bool = False) -> None:
        """Puts a new replica in place of a lost one; if that is lost too, another. weights: gives it the current ones.

        Raises WorkerError when more are lost in a step than may be; WorkerLost again if it is not one of ours.
        """
        while lost.group == GROUP:
            began, rank = time.monotonic(), lost.rank
            self._admit(lost)
            try:
                self._replace(rank)
                if weights:
                    self._give(rank)
            except WorkerLost as another:
                lost = another
            else:
                _log.warning("note: %s is in its place after %.0f s", self._name(rank), time.monotonic() - began)
                return
        raise lost

    def _admit(self, lost: WorkerLost) -> None:
        """Says what happened, and whether there may be another replica."""
        most = self.limits.max_replacements
        what = f"{self._name(lost.rank)}, {lost.call}: {_brief(lost.reason)}"
        if self._replaced >= most:
            raise WorkerError(f"{what}. No more are replaced: actor_rollout_ref.rollout.max_replacements={most} a step")
        self._replaced += 1
        _log.warning(
            "warning: %s. A new one is started (%d of at most %d in this step), gets the weights, and generates what "
            "had not come back",
            what,
            self._replaced,
            most,
        )

    def _replace(self, rank: int) -> None:
        old = self._replicas[rank]
        if old.family is not None:
            end_family(old.family, GROUP, rank)
        ray.kill(old.actor)
        self.make_room(sum(self._sizes.values()), self.limits.memory_share, rank)
        self._replicas[rank] = self._new(rank)
        self._stale.add(rank)
        self._await([self._replicas[rank]])
        if self._asleep:
            self._call(rank, VllmReplica.sleep)
            for tag in TAGS:
                if tag not in self._asleep:
                    self._call(rank, VllmReplica.wake, tag)

    def _new(self, rank: int) -> _Replica:
        actor, limits = self._start(rank), self.limits
        pulse = Pulse(rank, actor, hang_timeout_s=limits.hang_timeout_s, startup_timeout_s=limits.startup_timeout_s)
        return _Replica(rank, actor, pulse)

    def _await(self, replicas: Sequence[_Replica]) -> None:
        """Waits until they are up, and notes their processes."""
        group = WorkerGroup(GROUP, [r.actor for r in replicas], ranks=[r.rank for r in replicas])
        group.broadcast(VllmReplica.ping).result(self.limits.startup_timeout_s)
        for replica in replicas:
            replica.family = family_of(replica.actor, GROUP, replica.rank)

    def _give(self, rank: int) -> None:
        """The weights of now, to one that is awake; its cache sleeps meanwhile: training may need the room to send."""
        assert self._publish is not None, "replicas have no weights before the first update"
        sizes = self._call(rank, VllmReplica.sleep)
        self._call(rank, VllmReplica.wake, "weights")
        self._publish(self._group([rank]))
        self.make_room(sizes["kv_cache"], 0.0, rank)
        self._call(rank, VllmReplica.wake, "kv_cache")
        self._stale.discard(rank)

    def _call(self, rank: int, method: Callable[..., T], *args: object) -> T:
        """A call to one replica. Raises WorkerLost if that is lost."""
        (answer,) = self._group([rank]).broadcast(method, *args).result(self.limits.update_timeout_s)
        return answer

    def _broadcast(self, method: Callable[..., T], *args: object) -> list[T]:
        """The same call on every replica; a replica that is lost is replaced, and the new one called."""
        calls = [self._group([rank]).broadcast(method, *args) for rank in range(len(self))]
        answers: list[T] = []
        for rank, call in enumerate(calls):
            while True:
                try:
                    answers += call.result(self.limits.update_timeout_s)
                    break
                except WorkerLost as lost:
                    self.mend(lost)
                    call = self._group([rank]).broadcast(method, *args)
        return answers

    def note_generated(self, stats: GenerateStats) -> None:
        """Takes the statistics of a generate call."""
        self.peak_bytes = max(self.peak_bytes, stats.peak_bytes)
        self._note_peak("generate", stats.device_peak_bytes)

    def _note_peak(self, phase: str, num_bytes: int) -> None:
        self._peaks[phase] = max(self._peaks.get(phase, 0), num_bytes)

    def _group(self, ranks: Sequence[int]) -> WorkerGroup:
        """Some replicas, watched while a call to them is waited for."""
        chosen = [self._replicas[rank] for rank in ranks]
        for replica in chosen:
            replica.pulse.begin()
        return WorkerGroup(GROUP, [r.actor for r in chosen], ranks=ranks, watch=partial(_look, chosen))

    def _name(self, rank: int) -> str:
        family = self._replicas[rank].family
        return f"rollout replica {rank}" + (f" (pid {family.pid})" if family else "")


class _Round:
    """One generate call over all replicas.

    The loop consumes what the replicas stream. Each turn waits until one of them, or its status, has something to say,
    for a second at most, and then looks at all. It ends when no call is under way. A lost replica is replaced at once:
    the loop stands still meanwhile, the other replicas go on generating, and what they finish waits in their streams.
    """

    def __init__(self, pool: RolloutPool, requests: Sequence[GenerateRequest]) -> None:
        self._pool = pool
        self._calls = {rank: pool.begin(rank, r) for rank, r in enumerate(requests) if len(r.lengths)}

    def chunks(self) -> Iterator[Chunk]:
        """All chunks."""
        while self._calls:
            for call in self._ready():
                chunk = self._unless_lost(call, self._take)
                if chunk is not None:
                    yield chunk
            for call in list(self._calls.values()):
                self._unless_lost(call, self._look)

    def _ready(self) -> list[GenerateCall]:
        """Waits for a sign of anyone; the calls that have something."""
        of_stream = {call.stream: call for call in self._calls.values()}
        questions = [call.pulse.question for call in self._calls.values() if call.pulse.question is not None]
        patience = min(call.pulse.rest_s for call in self._calls.values())
        ready, _ = ray.wait([*of_stream, *questions], timeout=patience, fetch_local=False)
        return [of_stream[ref] for ref in ready if ref in of_stream]

    def _unless_lost(self, call: GenerateCall, step: Callable[[GenerateCall], Chunk | None]) -> Chunk | None:
        """A step of a call; if its replica is lost, another continues with what was still to come."""
        try:
            return step(call)
        except WorkerLost as lost:
            del self._calls[call.rank]
            lost.call = "generate"
            self._pool.mend(lost, weights=True)
            rest = call.rest()
            if rest is not None:
                self._calls[call.rank] = self._pool.begin(call.rank, rest)
            return None

    def _take(self, call: GenerateCall) -> Chunk | None:
        item = call.take()
        if isinstance(item, GenerateStats):
            del self._calls[call.rank]
            self._pool.note_generated(item)
            for reading in call.pulse.last():
                self._pool.observe(reading)
            return None
        return item

    def _look(self, call: GenerateCall) -> None:
        reading = call.pulse.look()
        if reading is not None:
            self._pool.observe(reading)
        if time.monotonic() > call.deadline:
            raise WorkerError(
                f"{GROUP} rank {call.rank}, generate: no answer within {self._pool.limits.timeout_s:.0f} s "
                "(worker alive, still busy or waiting)"
            )


def _look(replicas: Sequence[_Replica]) -> None:
    for replica in replicas:
        replica.pulse.look()


def _brief(reason: str) -> str:
    """Ray's account of a death in a line, without its list of what else may have happened."""
    what, colon, told = " ".join(reason.split()).partition(": ")
    detail = told[told.find("Worker exit type:") :] if "Worker exit type:" in told else told
    return (what + colon + detail.partition(" Some common causes include")[0])[:400].rstrip(".")
