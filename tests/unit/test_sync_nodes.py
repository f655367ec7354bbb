"""Weights from training ranks to replicas of several nodes: every bucket goes once to each node that needs it.

Writers, relays and readers are the real ones, in this process; what would be a remote call of a replica happens when
its result is asked for, which is after the next bucket was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.group import WorkerGroup
from workers.rollout.pool import RolloutPool
from workers.rollout.spec import UpdateReport
from workers.rollout.vllm.replica import VllmReplica
from workers.sync import sync as sync_module
from workers.sync.buckets import Bucket, BucketReader, BucketWriter, Shard
from workers.sync.checksum import checksum
from workers.sync.relay import BucketRelay, Routes, far_ranks
from workers.sync.sync import SyncReport, WeightSync

WEIGHTS = {
    f"p{i}": torch.randn(rows, 3, generator=torch.Generator().manual_seed(i)) for i, rows in enumerate((5, 1, 8))
}
BUCKET_BYTES = 60


@pytest.mark.parametrize(
    ("trainers", "replicas", "far"),
    [
        ((0, 0), (0, 0), {}),
        ((0,), (1,), {1: (0,)}),
        ((0, 0, 1, 1), (1, 1, 2), {1: (0, 1), 2: (0, 1, 2, 3)}),
        ((0, 1), (0, 1), {0: (1,), 1: (0,)}),
        ((3, 4), (), {}),
    ],
)
def test_a_node_needs_the_buckets_of_ranks_elsewhere(
    trainers: tuple[int, ...], replicas: tuple[int, ...], far: dict[int, tuple[int, ...]]
) -> None:
    assert far_ranks(trainers, replicas) == far


class Later:
    """A call that is made when its result is asked for."""

    def __init__(self, *calls: Callable[[], Any]) -> None:
        self._calls = calls

    def result(self, timeout_s: float) -> list[Any]:
        return [call() for call in self._calls]


class Bench:
    """Training ranks and replicas on these nodes. read: what each replica got; crossed: (node, bucket) of each take."""

    def __init__(self, trainers: Sequence[int], replicas: Sequence[int]) -> None:
        self.nodes, self.ranks = replicas, tuple(range(len(replicas)))
        self.writers = [BucketWriter("float32", BUCKET_BYTES) for _ in trainers]
        self.shards = [_shards(rank, len(trainers)) for rank in range(len(trainers))]
        self.home = {
            buffer.address: node for w, node in zip(self.writers, trainers, strict=True) for buffer in w._buffers
        }
        self.readers = [BucketReader() for _ in replicas]
        self.read: list[dict[str, Tensor]] = [{} for _ in replicas]
        self.crossed: list[tuple[int, int]] = []
        relays = {node: self._relay(node) for node in far_ranks(trainers, replicas)}
        self.routes = Routes(tuple(trainers), tuple(replicas), relays)

    def __len__(self) -> int:
        return len(self.writers)

    def _relay(self, node: int) -> Any:
        relay = BucketRelay()

        def take(number: int, buckets: dict[int, Bucket], *contents: Any) -> dict[int, Bucket]:
            self.crossed.append((node, number))
            kept = relay.take(number, buckets, *[content.copy() for content in contents])  # as the object store does
            for bucket in kept.values():
                assert self.home.setdefault(bucket.address, node) == node
            return kept

        return SimpleNamespace(take=SimpleNamespace(remote=take))

    def broadcast(self, method: Callable[..., Any], *arguments: Any) -> Later:
        match method.__name__:
            case "open_weights":
                return Later(*[lambda w=w, s=s: w.num_buckets(s) for w, s in self._ranks()])  # type: ignore[misc]
            case "publish_bucket":
                return Later(*[lambda w=w, s=s: w.write(s, arguments[0]) for w, s in self._ranks()])  # type: ignore[misc]
            case "begin_update":
                return Later()
        assert method.__name__ == "finish_update"
        sums = [sum(checksum(tensor) for tensor in read.values()) % (1 << 64) for read in self.read]
        return Later(*[lambda total=total: UpdateReport(len(WEIGHTS), total) for total in sums])  # type: ignore[misc]

    def scatter_with_payload(self, method: Any, arguments: Sequence[tuple[int, bool]]) -> tuple[Later, list[Any]]:
        buckets = [w.write(s, number) for (w, s), (number, _) in zip(self._ranks(), arguments, strict=True)]
        contents = [
            w.content(bucket, number) if wanted else np.empty(0, dtype=np.uint8)
            for w, bucket, (number, wanted) in zip(self.writers, buckets, arguments, strict=True)
        ]
        return Later(*[lambda b=b: b for b in buckets]), contents  # type: ignore[misc]

    def scatter(self, method: Any, arguments: Sequence[tuple[list[dict[str, Any]]]]) -> Later:
        assert method is VllmReplica.load_bucket
        calls = [lambda r=r, m=m: self._load(r, m) for r, (m,) in zip(self.ranks, arguments, strict=True)]  # type: ignore[misc]
        return Later(*calls)

    def _load(self, replica: int, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            assert self.home[message["address"]] == self.nodes[replica], "a buffer of another node cannot be read"
        for name, tensor in self.readers[replica].read(messages):
            assert name not in self.read[replica]
            self.read[replica][name] = tensor.clone()

    def _ranks(self) -> list[tuple[BucketWriter, list[Shard]]]:
        return list(zip(self.writers, self.shards, strict=True))

    def update(self, publish: Callable[[Any], SyncReport]) -> SyncReport:
        return publish(self)


def _shards(rank: int, num_ranks: int) -> list[Shard]:
    """Of FSDP2: rows in turn, the last ranks may have none."""
    found: list[Shard] = []
    for name, tensor in WEIGHTS.items():
        size = -(-len(tensor) // num_ranks)
        first = min(rank * size, len(tensor))
        found.append((name, tensor[first : first + size], tuple(tensor.shape), first, 0))
    return found


def send(bench: Bench) -> SyncReport:
    sync = WeightSync(cast(WorkerGroup, bench), cast(RolloutPool, bench), "actor", 1.0, bench.routes)
    sync.open("float32", BUCKET_BYTES, "shared_memory")
    return sync.publish(3)


@pytest.fixture(autouse=True, scope="module")
def calls_are_done() -> Any:
    """A relay's answer is there at once."""

    class Done:
        def __init__(self, group: str, method: str, refs: Any, ranks: Any) -> None:
            self.refs = refs

        def result(self, timeout_s: float) -> Any:
            return list(self.refs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync_module, "Call", Done)
        yield


@given(
    trainers=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    replicas=st.lists(st.integers(0, 3), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_every_replica_gets_everything_from_memory_of_its_own_node(trainers: list[int], replicas: list[int]) -> None:
    bench = Bench(trainers, replicas)
    report = send(bench)
    for read in bench.read:
        assert read.keys() == WEIGHTS.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in WEIGHTS.items())
    far = far_ranks(trainers, replicas)
    assert sorted(bench.crossed) == [(node, number) for node in far for number in range(3)], "once for each node"
    assert report.verified and report.num_bytes == 4 * 14 * 3
    sizes = [sum(part.numel() * 4 for _, part, *_ in shards) for shards in bench.shards]
    assert report.bytes_between_nodes == sum(sizes[rank] for ranks in far.values() for rank in ranks)


def test_a_replacement_gets_weights_by_the_relay_of_its_node_alone() -> None:
    bench = Bench([0, 1], [0, 1, 2])
    bench.ranks, bench.nodes = (2,), (0, 1, 2)
    bench.read[:2] = [dict(WEIGHTS), dict(WEIGHTS)]  # the others have them
    sync = WeightSync(cast(WorkerGroup, bench), cast(RolloutPool, bench), "actor", 1.0, bench.routes)
    sync.open("float32", BUCKET_BYTES, "shared_memory")
    bench.broadcast, whole = lambda *a: _only(whole(*a), a), bench.broadcast  # type: ignore[method-assign]
    sync.publish(3)
    assert bench.read[2].keys() == WEIGHTS.keys()
    assert {node for node, _ in bench.crossed} == {2}


def _only(call: Later, arguments: Any) -> Later:
    """Of the reports, the replacement's."""
    return Later(call._calls[2]) if arguments[0].__name__ == "finish_update" else call
