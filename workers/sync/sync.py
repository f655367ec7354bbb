"""Weights from the training ranks to the replicas: bucket by bucket, the next one written while one is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from workers.group import WorkerError, WorkerGroup
from workers.rollout.pool import RolloutPool
from workers.rollout.spec import UpdateReport
from workers.rollout.vllm.replica import VllmReplica
from workers.sync.buckets import Bucket, Channel
from workers.train_worker import TrainWorker


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight sync: version now held by every replica; parameters, bytes and buckets sent to each.

    verified: whether each compared a checksum of what it holds; one that is split over several devices cannot.
    """

    version: int
    parameters: int
    num_bytes: int
    num_buckets: int
    verified: bool


class WeightSync:
    """Publishes one role's weights. All live on one node, and talk through shared memory or through one GPU's."""

    def __init__(self, trainers: WorkerGroup, pool: RolloutPool, role: str, timeout_s: float) -> None:
        self._trainers = trainers
        self._pool = pool
        self._role = role
        self._timeout_s = timeout_s
        self._num_buckets = 0

    def open(self, dtype: str, bucket_bytes: int, channel: Channel) -> None:
        """Plans the buckets; once, after the engines are built."""
        opened = self._trainers.broadcast(TrainWorker.open_weights, self._role, dtype, bucket_bytes, channel)
        self._num_buckets = opened.result(self._timeout_s)[0]

    def publish(self, version: int) -> SyncReport:
        """Gives every replica the trainers' weights of now, numbered `version`.

        A replica that is lost meanwhile is replaced, and all get them again; one that is lost later gets them too, as
        long as they are the trainers'. Raises WorkerError unless every replica holds exactly the trainers' weights,
        as far as it can tell (`SyncReport.verified`), every parameter written once.
        """
        return self._pool.update(partial(self._send, version))

    def _send(self, version: int, replicas: WorkerGroup) -> SyncReport:
        ready = replicas.broadcast(VllmReplica.begin_update)
        written = self._trainers.broadcast(TrainWorker.publish_bucket, 0).result(self._timeout_s)
        ready.result(self._timeout_s)
        buckets: list[Bucket] = []
        for number in range(self._num_buckets):
            buckets += written
            loading = replicas.broadcast(VllmReplica.load_bucket, [b.as_message() for b in written])
            if number + 1 < self._num_buckets:
                written = self._trainers.broadcast(TrainWorker.publish_bucket, number + 1).result(self._timeout_s)
            loading.result(self._timeout_s)
        reports = replicas.broadcast(VllmReplica.finish_update, version).result(self._timeout_s)
        return _verified(buckets, dict(zip(replicas.ranks, reports, strict=True)), version)


def _verified(buckets: list[Bucket], reports: dict[int, UpdateReport], version: int) -> SyncReport:
    sent = sum(b.checksum for b in buckets) % (1 << 64)
    for rank, report in reports.items():
        if report.checksum is not None and report.checksum != sent:
            raise WorkerError(f"weight sync {version}: replica {rank} does not hold the trainers' weights (checksum)")
    parameters = next(iter(reports.values())).parameters
    verified = all(report.checksum is not None for report in reports.values())
    return SyncReport(version, parameters, sum(b.num_bytes for b in buckets), len(buckets), verified)
