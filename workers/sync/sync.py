"""Weights from the training ranks to the replicas: bucket by bucket, the next one written while one is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from workers.group import Call, WorkerError, WorkerGroup
from workers.rollout.pool import RolloutPool
from workers.rollout.spec import UpdateReport
from workers.rollout.vllm.replica import VllmReplica
from workers.sync.buckets import Bucket, Channel
from workers.sync.relay import BucketRelay, Routes
from workers.train_worker import TrainWorker


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight sync: version now held by every replica; parameters, bytes and buckets sent to each.

    verified: whether each compared a checksum of what it holds; one that is split over several devices cannot.
    bytes_between_nodes: how much left a node for another, once for each node.
    """

    version: int
    parameters: int
    num_bytes: int
    num_buckets: int
    verified: bool
    bytes_between_nodes: int = 0


@dataclass(frozen=True, slots=True)
class _Written:
    """One bucket, of every rank: as the ranks wrote it; and, by node and rank, as a relay keeps it there."""

    own: list[Bucket]
    kept: Mapping[int, Mapping[int, Bucket]]

    def messages(self, node: int) -> list[dict[str, object]]:
        """For replicas on a node."""
        kept = self.kept.get(node, {})
        return [kept.get(rank, bucket).as_message() for rank, bucket in enumerate(self.own)]


class WeightSync:
    """Publishes one role's weights: through shared memory, or one GPU's; to other nodes as `routes` says."""

    def __init__(self, trainers: WorkerGroup, pool: RolloutPool, role: str, timeout_s: float, routes: Routes) -> None:
        self._trainers = trainers
        self._pool = pool
        self._role = role
        self._timeout_s = timeout_s
        self._routes = routes
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
        nodes, far = [self._routes.replicas[rank] for rank in replicas.ranks], self._routes.far(replicas.ranks)
        ready = replicas.broadcast(VllmReplica.begin_update)
        written = self._write(0, far)
        ready.result(self._timeout_s)
        sent: list[_Written] = []
        for number in range(self._num_buckets):
            sent.append(written)
            messages = {node: written.messages(node) for node in set(nodes)}
            loading = replicas.scatter(VllmReplica.load_bucket, [(messages[node],) for node in nodes])
            if number + 1 < self._num_buckets:
                written = self._write(number + 1, far)
            loading.result(self._timeout_s)
        reports = replicas.broadcast(VllmReplica.finish_update, version).result(self._timeout_s)
        return _verified(sent, dict(zip(replicas.ranks, reports, strict=True)), version)

    def _write(self, number: int, far: Mapping[int, Sequence[int]]) -> _Written:
        """Has the ranks write a bucket; returns when it is on every node where it will be read."""
        if not far:
            return _Written(self._trainers.broadcast(TrainWorker.publish_bucket, number).result(self._timeout_s), {})
        wanted = {rank for ranks in far.values() for rank in ranks}
        arguments = [(number, rank in wanted) for rank in range(len(self._trainers))]
        writing, contents = self._trainers.scatter_with_payload(TrainWorker.publish_bucket_far, arguments)
        own = writing.result(self._timeout_s)
        taken = [
            self._routes.relays[node].take.remote(number, {r: own[r] for r in ranks}, *[contents[r] for r in ranks])
            for node, ranks in far.items()
        ]
        call: Call[dict[int, Bucket]] = Call(
            "weight relay of node", BucketRelay.take.__name__, tuple(taken), tuple(far)
        )
        return _Written(own, dict(zip(far, call.result(self._timeout_s), strict=True)))


def _verified(sent: Sequence[_Written], reports: dict[int, UpdateReport], version: int) -> SyncReport:
    buckets = [bucket for written in sent for bucket in written.own]
    checksum = sum(bucket.checksum for bucket in buckets) % (1 << 64)
    for rank, report in reports.items():
        if report.checksum is not None and report.checksum != checksum:
            raise WorkerError(f"weight sync {version}: replica {rank} does not hold the trainers' weights (checksum)")
    between = (bucket for written in sent for kept in written.kept.values() for bucket in kept.values())
    return SyncReport(
        version,
        next(iter(reports.values())).parameters,
        sum(bucket.num_bytes for bucket in buckets),
        len(buckets),
        all(report.checksum is not None for report in reports.values()),
        sum(bucket.num_bytes for bucket in between),
    )
