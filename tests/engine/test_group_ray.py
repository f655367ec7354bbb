"""A group of real actors: deadlines, deaths, failures beside ranks that wait, and payloads that stay where they are."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import ray

from trainer.config.load import load_config
from trainer.placement import Cluster, reserve, start
from workers.group import WorkerError, WorkerGroup, WorkerLost

PAYLOAD_BYTES = 4 << 20
TIMEOUT_S = 30.0


class Worker:
    """Does what tests ask for."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def ping(self) -> int:
        """Which rank this is."""
        return self._rank

    def wait(self, seconds: float) -> int:
        """Answers late."""
        time.sleep(seconds)
        return self._rank

    def fail_on(self, rank: int, meanwhile: float) -> int:
        """Raises on one rank; the others wait, as in a collective it never joins."""
        if self._rank == rank:
            raise ArithmeticError(f"rank {rank} divided by zero")
        return self.wait(meanwhile)

    def die_on(self, rank: int) -> int:
        """Kills the process of one rank; the others fail at once, as a collective does when a peer is gone."""
        if self._rank == rank:
            time.sleep(0.3)
            os._exit(1)
        raise ConnectionError("connection closed by peer")

    def make(self, size: int) -> tuple[int, npt.NDArray[np.uint8]]:
        """(small, large)."""
        return size, np.full(size, self._rank, dtype=np.uint8)

    def total(self, payload: npt.NDArray[np.uint8]) -> int:
        """Reads a payload another worker made."""
        return int(payload.sum(dtype=np.int64))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two CPUs of a small local Ray."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    cfg = load_config(
        [
            "data.train_files=train.jsonl",
            "actor_rollout_ref.model.path=org/model",
            "trainer.device=cpu",
            "trainer.n_gpus_per_node=2",
        ]
    )
    reserved = reserve(cfg)
    yield reserved
    reserved.release()
    ray.shutdown()


@pytest.fixture(scope="module")
def new_group(cluster: Cluster) -> Iterator[Callable[[], WorkerGroup]]:
    """Makes groups of two workers, and ends them."""
    groups: list[WorkerGroup] = []

    def make() -> WorkerGroup:
        actors = [start(Worker, device, rank) for rank, device in enumerate(cluster.devices)]
        groups.append(WorkerGroup("trainer", actors))
        return groups[-1]

    yield make
    for group in groups:
        group.kill()


@pytest.fixture(scope="module")
def group(new_group: Callable[[], WorkerGroup]) -> WorkerGroup:
    """A group that no test breaks."""
    made = new_group()
    assert made.broadcast(Worker.ping).result(TIMEOUT_S) == [0, 1]
    return made


def test_answers_come_in_rank_order(group: WorkerGroup) -> None:
    assert group.scatter(Worker.wait, [(0.3,), (0.0,)]).result(TIMEOUT_S) == [0, 1]
    assert group.broadcast(Worker.ping).result(TIMEOUT_S) == [0, 1]


def test_a_deadline_names_group_rank_and_call(group: WorkerGroup) -> None:
    call = group.scatter(Worker.wait, [(0.0,), (1.5,)])
    with pytest.raises(WorkerError, match=r"trainer rank 1, wait: no answer within 0 s \(worker alive"):
        call.result(timeout_s=0.3)
    assert call.result(TIMEOUT_S) == [0, 1], "a late answer can still be taken"


@pytest.mark.quiet
def test_one_deadline_holds_for_all_ranks(group: WorkerGroup) -> None:
    call = group.scatter(Worker.wait, [(1.5,), (1.5,)])
    begun = time.monotonic()
    with pytest.raises(WorkerError, match="trainer ranks 0, 1, wait: no answer"):
        call.result(timeout_s=0.4)
    assert time.monotonic() - begun < 1.2
    call.result(TIMEOUT_S)


def test_a_rank_that_raises_is_reported_while_another_one_waits(group: WorkerGroup) -> None:
    """At once, not when the deadline of the waiting rank is over."""
    call = group.broadcast(Worker.fail_on, 1, 6.0)
    begun = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?s)trainer rank 1, fail_on: .*ArithmeticError") as error:
        call.result(TIMEOUT_S)
    assert time.monotonic() - begun < 5.0
    assert "rank 1 divided by zero" in str(error.value)


def test_a_dead_worker_is_named_although_another_one_complains_first(new_group: Callable[[], WorkerGroup]) -> None:
    group = new_group()
    group.broadcast(Worker.ping).result(TIMEOUT_S)
    with pytest.raises(WorkerError, match="trainer rank 1, die_on: the worker process died"):
        group.broadcast(Worker.die_on, 1).result(TIMEOUT_S)
    with pytest.raises(WorkerError, match="trainer rank 1, ping: the worker process died"):
        group.broadcast(Worker.ping).result(TIMEOUT_S)


def test_a_watch_ends_the_wait_and_the_error_names_the_call(group: WorkerGroup) -> None:
    def watch() -> None:
        raise WorkerLost("trainer", 1, "status", "hangs")

    watched = WorkerGroup("trainer", group.actors, watch=watch)
    with pytest.raises(WorkerLost, match="trainer rank 1, wait: hangs"):
        watched.broadcast(Worker.wait, 2.5).result(TIMEOUT_S)


def test_ranks_are_named_as_the_group_says(group: WorkerGroup) -> None:
    part = WorkerGroup("trainer", group.actors[1:], ranks=[1])
    with pytest.raises(WorkerError, match="trainer rank 1, fail_on"):
        part.broadcast(Worker.fail_on, 1, 0.0).result(TIMEOUT_S)


def test_payloads_stay_in_the_object_store(group: WorkerGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver gets references, takes only the small parts, and hands the rest to another worker."""
    call, payloads = group.scatter_with_payload(Worker.make, [(PAYLOAD_BYTES,), (PAYLOAD_BYTES,)])
    assert all(isinstance(payload, ray.ObjectRef) for payload in payloads)
    fetched: list[object] = []
    fetch = ray.get
    monkeypatch.setattr(ray, "get", lambda refs, **options: fetched.append(refs) or fetch(refs, **options))
    assert call.result(TIMEOUT_S) == [PAYLOAD_BYTES, PAYLOAD_BYTES]
    swapped = group.scatter(Worker.total, [(payloads[1],), (payloads[0],)])
    assert swapped.result(TIMEOUT_S) == [PAYLOAD_BYTES, 0]
    assert not set(fetched) & set(payloads)


@pytest.mark.usefixtures("cluster")
def test_more_devices_than_ray_has_are_refused_at_once() -> None:
    required = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model", "trainer.device=cpu"]
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"trainer.nnodes=1 x trainer.n_gpus_per_node=5: .*\[2\] CPUs") as error:
        reserve(load_config([*required, "trainer.n_gpus_per_node=5"]))
    assert "set trainer.n_gpus_per_node=2" in str(error.value)
    with pytest.raises(ValueError, match="only 0 are free") as error:
        reserve(load_config([*required, "trainer.n_gpus_per_node=1", "trainer.startup_timeout_s=0.5"]))
    assert "another job holds them" in str(error.value)
    assert time.monotonic() - begun < 5.0
