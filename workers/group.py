"""A group of Ray actors with three verbs: broadcast, scatter, gather.

`broadcast` and `scatter` start a call on every rank and return at once; `gather` waits for the results with a deadline
and turns whatever went wrong into one error that names the group, the rank, the call and what to look at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError

from workers.shortage import OutOfMemory, Shortage

T = TypeVar("T")

WATCH_EVERY_S = 1.0
"""How often a group's watch looks at its workers during a wait."""
DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError)
"""What a call raises when the worker's process is gone; out of memory: Ray ended it to save the node."""
GRACE_S = 2.0
"""After a failure, how long to wait for the death of another worker that may have caused it, seconds."""


class WorkerError(RuntimeError):
    """A remote call failed, its worker died, or it took too long."""


class WorkerLost(WorkerError):
    """A worker died or hangs: it will answer no call any more. `rank` of `group`, for the `reason`."""

    def __init__(self, group: str, rank: int, call: str, reason: str) -> None:
        super().__init__(f"{group} rank {rank}, {call}: {reason}")
        self.group = group
        self.rank = rank
        self.call = call
        self.reason = reason


class WorkerOutOfMemory(WorkerError):
    """A device had no memory left for a call; the worker lives. `shortage`: the figures."""

    def __init__(self, group: str, rank: int, shortage: Shortage) -> None:
        super().__init__(f"{group} rank {rank}, {shortage.call}: {shortage.told}")
        self.rank = rank
        self.shortage = shortage


def failure(group: str, rank: int, call: str, cause: Exception) -> WorkerError:
    """What went wrong in a worker, as one error."""
    if isinstance(cause, DEATHS):
        return WorkerLost(group, rank, call, f"the worker process died: {cause}")
    if isinstance(cause, RayTaskError):
        if isinstance(cause.cause, OutOfMemory):
            return WorkerOutOfMemory(group, rank, cause.cause.shortage)
        return WorkerError(f"{group} rank {rank}, {call}: {cause}")
    return WorkerError(f"{group} rank {rank}, {call}: {type(cause).__name__}: {cause}")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A call under way on every rank: one reference per rank.

    ranks: of the references, if they are not 0, 1, ... watch: looks at the workers once a second while `result` waits,
    and raises WorkerLost to end the wait.
    """

    group: str
    method: str
    refs: tuple[Any, ...]
    ranks: tuple[int, ...] = ()
    watch: Callable[[], None] | None = None

    def result(self, timeout_s: float) -> list[T]:
        """All ranks' results in rank order; `timeout_s` is one deadline for all.

        Raises WorkerError as soon as any rank fails, also while others wait for it in a collective; WorkerLost if it
        died.
        """
        deadline = time.monotonic() + timeout_s
        results: dict[Any, T] = {}
        waiting = list(self.refs)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=self._patience(deadline))
            if not ready and time.monotonic() >= deadline:
                raise self._late([self._rank(ref) for ref in waiting], timeout_s)
            if not ready:
                self._look()
            for ref in ready:
                try:
                    results[ref] = ray.get(ref)
                except Exception as error:
                    rank, cause = self._cause(ref, error)
                    raise failure(self.group, rank, self.method, cause) from error
        return [results[ref] for ref in self.refs]

    def _patience(self, deadline: float) -> float:
        """Seconds to wait before looking up."""
        left = max(0.0, deadline - time.monotonic())
        return left if self.watch is None else min(left, WATCH_EVERY_S)

    def _look(self) -> None:
        if self.watch is not None:
            try:
                self.watch()
            except WorkerLost as lost:
                raise WorkerLost(lost.group, lost.rank, self.method, lost.reason) from lost

    def _rank(self, ref: Any) -> int:
        place = self.refs.index(ref)
        return self.ranks[place] if self.ranks else place

    def _late(self, ranks: Sequence[int], timeout_s: float) -> WorkerError:
        names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        return WorkerError(
            f"{self.group} {names}, {self.method}: no answer within {timeout_s:.0f} s "
            "(worker alive, still busy or waiting)"
        )

    def _cause(self, failed: Any, error: Exception) -> tuple[int, Exception]:
        """When a rank dies, the others fail in their collective and may be heard first: the dead one is to blame."""
        if isinstance(error, DEATHS):
            return self._rank(failed), error
        ready, _ = ray.wait(list(self.refs), num_returns=len(self.refs), timeout=GRACE_S)
        for ref in ready:
            try:
                ray.get(ref)
            except DEATHS as death:
                return self._rank(ref), death
            except Exception:
                continue  # it failed too, as the first one did
        return self._rank(failed), error


class WorkerGroup:
    """Actors of one kind, by rank. ranks, watch: as in `Call`."""

    def __init__(
        self,
        name: str,
        actors: Sequence[Any],
        *,
        ranks: Sequence[int] = (),
        watch: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.actors = tuple(actors)
        self.ranks = tuple(ranks) or tuple(range(len(actors)))
        self._watch = watch

    def __len__(self) -> int:
        return len(self.actors)

    def broadcast(self, method: Callable[..., T], *args: object) -> Call[T]:
        """The same call on every rank, e.g. `group.broadcast(TrainWorker.ping)`."""
        name = method.__name__
        return self._call(name, [getattr(actor, name).remote(*args) for actor in self.actors])

    def scatter(self, method: Callable[..., T], arguments: Sequence[tuple[object, ...]]) -> Call[T]:
        """One call per rank with that rank's own arguments."""
        assert len(arguments) == len(self.actors), (self.name, method.__name__, len(arguments), len(self.actors))
        name = method.__name__
        refs = [getattr(actor, name).remote(*args) for actor, args in zip(self.actors, arguments, strict=True)]
        return self._call(name, refs)

    def scatter_with_payload(
        self, method: Callable[..., tuple[T, Any]], arguments: Sequence[tuple[object, ...]]
    ) -> tuple[Call[T], tuple[Any, ...]]:
        """Like `scatter` for methods that return (small, large): the large parts stay in the object store."""
        assert len(arguments) == len(self.actors), (self.name, method.__name__)
        name = method.__name__
        pairs = [
            getattr(actor, name).options(num_returns=2).remote(*args)
            for actor, args in zip(self.actors, arguments, strict=True)
        ]
        return self._call(name, [p[0] for p in pairs]), tuple(p[1] for p in pairs)

    def _call(self, method: str, refs: Sequence[Any]) -> Call[Any]:
        return Call(self.name, method, tuple(refs), self.ranks, self._watch)

    def kill(self) -> None:
        """Ends the processes."""
        for actor in self.actors:
            ray.kill(actor)
