"""Weights to other nodes: each bucket goes there once through Ray's object store, and replicas read it as a local one.

A training rank's buffer is memory of its own node. On a node that has replicas but not all the training ranks, a relay
puts what the others wrote into buffers of its own, which alternate as theirs do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from workers.sync.buckets import Bucket
from workers.sync.memory import SharedFile


@dataclass(frozen=True, slots=True)
class Routes:
    """Where weights start and end, by number of the node. trainers: of each rank; replicas: of each replica.

    relays: the `BucketRelay` of each node in `far_ranks(trainers, replicas)`.
    """

    trainers: tuple[int, ...] = ()
    replicas: tuple[int, ...] = ()
    relays: Mapping[int, Any] = field(default_factory=dict)

    def far(self, replicas: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """As `far_ranks`, for these replicas only."""
        return far_ranks(self.trainers, [self.replicas[number] for number in replicas]) if self.relays else {}


def far_ranks(trainers: Sequence[int], readers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Node of readers -> the training ranks on other nodes; nodes that have none are left out."""
    far = {node: tuple(rank for rank, own in enumerate(trainers) if own != node) for node in sorted(set(readers))}
    return {node: ranks for node, ranks in far.items() if ranks}


class BucketRelay:
    """The far ranks' buckets on one node of replicas. Runs in an actor there."""

    def __init__(self) -> None:
        self._files: dict[tuple[int, int], SharedFile] = {}

    def take(self, number: int, buckets: Mapping[int, Bucket], *contents: npt.NDArray[np.uint8]) -> dict[int, Bucket]:
        """Bucket `number` of some ranks (`buckets`, with their contents in the same order), as it lies here; overwrites
        bucket number - 2. Ray has brought the contents before it calls."""
        moved = zip(buckets.items(), contents, strict=True)
        return {rank: self._keep(rank, number, bucket, content) for (rank, bucket), content in moved}

    def _keep(self, rank: int, number: int, bucket: Bucket, content: npt.NDArray[np.uint8]) -> Bucket:
        key = (rank, number % 2)
        if key not in self._files:
            self._files[key] = SharedFile(f"tandem-relay-{rank}-{number % 2}")
        self._files[key].view(bucket.num_bytes).numpy()[:] = content
        return replace(bucket, address=self._files[key].address)
