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
from ray.exceptions import RayActorError, RayTaskError

T = TypeVar("T")

GRACE_S = 2.0
"""After a failure, how long to wait for the death of another worker that may have caused it, seconds."""


class WorkerError(RuntimeError):
    """A remote call failed, its worker died, or it took too long."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A call under way on every rank: one reference per rank."""

    group: str
    method: str
    refs: tuple[Any, ...]

    def result(self, timeout_s: float) -> list[T]:
        """All ranks' results in rank order; `timeout_s` is one deadline for all.

        Raises WorkerError as soon as any rank fails, also while others wait for it in a collective.
        """
        deadline = time.monotonic() + timeout_s
        rank_of = {ref: rank for rank, ref in enumerate(self.refs)}
        results: dict[int, T] = {}
        waiting = list(self.refs)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._late([rank_of[ref] for ref in waiting], timeout_s)
            for ref in ready:
                try:
                    results[rank_of[ref]] = ray.get(ref)
                except Exception as error:
                    raise self._explain(*self._cause(rank_of[ref], error)) from error
        return [results[rank] for rank in range(len(self.refs))]

    def _late(self, ranks: Sequence[int], timeout_s: float) -> WorkerError:
        names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        return WorkerError(
            f"{self.group} {names}, {self.method}: no answer within {timeout_s:.0f} s "
            "(worker alive, still busy or waiting)"
        )

    def _explain(self, rank: int, cause: Exception) -> WorkerError:
        where = f"{self.group} rank {rank}, {self.method}"
        if isinstance(cause, RayActorError):
            return WorkerError(f"{where}: the worker process died: {cause}")
        if isinstance(cause, RayTaskError):
            return WorkerError(f"{where}: {cause}")
        return WorkerError(f"{where}: {type(cause).__name__}: {cause}")

    def _cause(self, rank: int, error: Exception) -> tuple[int, Exception]:
        """When a rank dies, the others fail in their collective and may be heard first: the dead one is to blame."""
        if isinstance(error, RayActorError):
            return rank, error
        ready, _ = ray.wait(list(self.refs), num_returns=len(self.refs), timeout=GRACE_S)
        for other, ref in enumerate(self.refs):
            if ref in ready:
                try:
                    ray.get(ref)
                except RayActorError as death:
                    return other, death
                except Exception:
                    continue  # it failed too, as the first one did
        return rank, error


class WorkerGroup:
    """Actors of one kind, by rank."""

    def __init__(self, name: str, actors: Sequence[Any]) -> None:
        self.name = name
        self.actors = tuple(actors)

    def __len__(self) -> int:
        return len(self.actors)

    def broadcast(self, method: Callable[..., T], *args: object) -> Call[T]:
        """The same call on every rank, e.g. `group.broadcast(TrainWorker.ping)`."""
        name = method.__name__
        return Call(self.name, name, tuple(getattr(actor, name).remote(*args) for actor in self.actors))

    def scatter(self, method: Callable[..., T], arguments: Sequence[tuple[object, ...]]) -> Call[T]:
        """One call per rank with that rank's own arguments."""
        assert len(arguments) == len(self.actors), (self.name, method.__name__, len(arguments), len(self.actors))
        name = method.__name__
        refs = tuple(getattr(actor, name).remote(*args) for actor, args in zip(self.actors, arguments, strict=True))
        return Call(self.name, name, refs)

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
        return Call(self.name, name, tuple(p[0] for p in pairs)), tuple(p[1] for p in pairs)

    def kill(self) -> None:
        """Ends the processes."""
        for actor in self.actors:
            ray.kill(actor)
