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
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

T = TypeVar("T")


class WorkerError(RuntimeError):
    """A remote call failed, its worker died, or it took too long."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A call under way on every rank: one reference per rank."""

    group: str
    method: str
    refs: tuple[Any, ...]

    def result(self, timeout_s: float) -> list[T]:
        """All ranks' results in rank order. Raises WorkerError; `timeout_s` is one deadline for all."""
        deadline = time.monotonic() + timeout_s
        results: list[T] = []
        for rank, ref in enumerate(self.refs):
            try:
                results.append(ray.get(ref, timeout=max(0.0, deadline - time.monotonic())))
            except Exception as error:
                raise self._explain(rank, error, timeout_s) from error
        return results

    def _explain(self, rank: int, error: Exception, timeout_s: float) -> WorkerError:
        failed = self._first_failure(rank, error)
        where = f"{self.group} rank {failed[0]}, {self.method}"
        cause = failed[1]
        if isinstance(cause, GetTimeoutError):
            return WorkerError(f"{where}: no answer within {timeout_s:.0f} s (worker alive, still busy or waiting)")
        if isinstance(cause, RayActorError):
            return WorkerError(f"{where}: the worker process died: {cause}")
        if isinstance(cause, RayTaskError):
            return WorkerError(f"{where}: {cause}")
        return WorkerError(f"{where}: {type(cause).__name__}: {cause}")

    def _first_failure(self, rank: int, error: Exception) -> tuple[int, Exception]:
        """A rank that waits in a collective times out because another one failed: report that one."""
        if not isinstance(error, GetTimeoutError):
            return rank, error
        ready, _ = ray.wait(list(self.refs), num_returns=len(self.refs), timeout=0)
        for other, ref in enumerate(self.refs):
            if ref in ready:
                try:
                    ray.get(ref)
                except Exception as cause:
                    return other, cause
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
