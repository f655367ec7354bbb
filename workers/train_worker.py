"""One process per training device, hosting every training-side role mapped to it: actor, reference, critic.

The driver sends which rows of which rollout blocks a rank works on; the blocks come from Ray's object store, straight
from the replicas that made them. Results that only other workers need go back there; the driver gets numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from workers import determinism
from workers.imports import big_imports
from workers.protocol import RolloutBlock, split

if TYPE_CHECKING:
    from workers.batch import Batch
    from workers.engines.base import EngineSpec, Loss, MicroBatches, Output, StepResult, TrainEngine, Update
    from workers.engines.build import Prepared
    from workers.memory import DeviceMemory, MemoryReport
    from workers.settings import Auto
    from workers.sync.buckets import Bucket, BucketWriter, Channel, Shard

FlatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Column:
    """One per-token field of a batch, in parts wherever they were made.

    parts: (flat array or reference to one, the batch rows it covers in its order).
    """

    name: str
    parts: tuple[tuple[Any, npt.NDArray[np.int64]], ...]


@dataclass(frozen=True, slots=True)
class RankBatch:
    """What one rank needs to put its batch together.

    key: one batch of one rank; workers keep the last one they built.
    blocks: references to RolloutBlocks; index: [num_rows, 2] = (block, row in block), in this rank's order.
    rows: [num_rows] global row numbers; lengths: [total rows] response lengths of the whole batch.
    """

    key: str
    blocks: tuple[Any, ...]
    index: npt.NDArray[np.intp]
    rows: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Published:
    """The role whose weights replicas get, and how. shards: hold the weights of now, whatever their number."""

    role: str
    writer: BucketWriter
    shards: Sequence[Shard]
    num_buckets: int


class TrainWorker:
    """Rank `rank` of `world_size` on one device. Methods are called on all ranks together.

    device: "cpu" or "cuda"; local_device: CUDA device number on this node; threads: CPU threads of PyTorch.
    timeout_s: of collectives among the ranks. deterministic: the same batches give the same bits in another run.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: str,
        local_device: int,
        threads: int,
        timeout_s: float,
        deterministic: bool,
    ) -> None:
        if deterministic:
            os.environ.update(determinism.ENVIRONMENT)
        if device == "cpu":
            os.environ["OMP_NUM_THREADS"] = str(threads)
            # threads that spin while they wait make an update eight times slower where others need the cores
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(local_device)
        self._rank = rank
        self._world_size = world_size
        self._device_type = device
        self._threads = threads
        self._timeout = timedelta(seconds=timeout_s)
        self._deterministic = deterministic
        self._prepared: dict[str, Prepared] = {}
        self._engines: dict[str, TrainEngine] = {}
        self._memory: DeviceMemory | None = None
        self._published: _Published | None = None
        self._cached: tuple[str, Batch] | None = None
        self._store: Any = None

    def unseen(self, paths: Sequence[str]) -> list[str]:
        """Those of the driver's paths that do not exist on this node."""
        return [path for path in paths if not Path(path).exists()]

    def rendezvous(self) -> tuple[str, int]:
        """Rank 0 opens the store the others meet at; the port is the system's choice and never let go."""
        import ray

        with big_imports():
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = ray.util.get_node_ip_address()  # at which Ray's own processes on other nodes reach this one
        self._store = TCPStore(host, 0, self._world_size, is_master=True, timeout=self._timeout, wait_for_workers=False)
        return host, int(self._store.port)

    def connect(self, host: str, port: int) -> None:
        """Joins the process group of all ranks."""
        with big_imports():
            import torch
            import torch.distributed as dist
            from torch.distributed import TCPStore  # type: ignore[attr-defined]

            from workers.memory import DeviceMemory, meter_of

        if self._deterministic:
            determinism.make_deterministic()
        if self._device_type == "cpu":
            torch.set_num_threads(self._threads)
        else:
            torch.cuda.set_device(0)
        self._memory = DeviceMemory(meter_of(self._device_type))
        if (interface := _interface()) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if self._store is None:
            self._store = TCPStore(host, port, self._world_size, timeout=self._timeout)
        dist.init_process_group(
            "gloo" if self._device_type == "cpu" else "cpu:gloo,cuda:nccl",
            store=self._store,
            rank=self._rank,
            world_size=self._world_size,
            timeout=self._timeout,
        )

    def prepare(self, role: str, spec: EngineSpec) -> None:
        """Reads what a role's engine needs into host memory: others may be taking stock of the device meanwhile."""
        with big_imports():
            from workers.engines.build import prepare

        self._prepared[role] = prepare(replace(spec, compile=spec.compile and self._device_type == "cuda"))

    def place(self, role: str, offload: Mapping[str, Auto]) -> int:
        """Builds the engine of a prepared role on the device; returns its number of parameters.

        offload: when its parts leave the device. On a CPU, whose memory is the host's, there is no room to make.
        """
        import torch

        prepared = self._prepared.pop(role)
        with self._use("place", role, wanted_bytes=prepared.num_bytes):
            engine = prepared.build(torch.device(self._device_type))
        self._engines[role] = engine
        if self._device_type == "cpu":
            offload = {name: when is True for name, when in offload.items()}
        self._device_memory.add(role, engine.parts, offload)
        return sum(int(np.prod(shape)) for _, _, shape, *_ in engine.export_weights())

    def make_room(self, num_bytes: int, share: float = 0.0) -> None:
        """Frees so much of the device for another process, as far as parts may leave it. share: as in DeviceMemory."""
        self._device_memory.make_room(num_bytes, share)

    def memory_report(self, take: bool) -> MemoryReport:
        """What happened to the device's memory since the last report that was taken."""
        return self._device_memory.report(take=take)

    def forward(
        self,
        role: str,
        batch: RankBatch,
        columns: Sequence[Column],
        micro_batches: MicroBatches,
        temperature: float,
        output: Output = "outputs",
    ) -> tuple[bool, FlatArray]:
        """Log-probs, values or `output` of this rank's response tokens: whether it holds them, and they for the object
        store."""
        local, engine = self._batch(batch, columns), self._engines[role]
        with self._use("forward", role, "weights", wanted_bytes=engine.forward_wants(local, micro_batches)):
            values = engine.forward(local, micro_batches, temperature=temperature, output=output).numpy()
        return engine.holds_outputs, values if engine.holds_outputs else values[:0]

    def update(
        self,
        role: str,
        batch: RankBatch,
        columns: Sequence[Column],
        updates: Sequence[Update],
        loss: Loss,
        temperature: float,
        entropy: bool,
    ) -> tuple[list[StepResult], int]:
        """Runs the optimizer steps of one batch in order; returns their results and the largest memory held, bytes."""
        local, engine = self._batch(batch, columns), self._engines[role]
        wanted = max((engine.update_wants(local, update) for update in updates), default=0)
        with self._use("update", role, "weights", "optimizer", wanted_bytes=wanted):
            results = [engine.train_step(local, u, loss, temperature=temperature, entropy=entropy) for u in updates]
        return results, self._device_memory.meter.own_peak_bytes()

    def open_weights(self, role: str, dtype: str, bucket_bytes: int, channel: Channel) -> int:
        """Gets a role's weights ready to publish; returns the number of buckets (the same on every rank)."""
        from workers.sync.buckets import BucketWriter

        writer = BucketWriter(dtype, bucket_bytes, channel) if self._published is None else self._published.writer
        shards = tuple(self._engines[role].export_weights())
        self._published = _Published(role, writer, shards, writer.num_buckets(shards))
        return self._published.num_buckets

    def publish_bucket(self, number: int) -> Bucket:
        """Writes this rank's rows of one bucket where replicas can read them."""
        published = self._published
        assert published is not None
        wanted, more = published.writer.missing_bytes(published.shards, number), number + 1 < published.num_buckets
        with self._use("publish", published.role, "weights", wanted_bytes=wanted, keep=more):
            return published.writer.write(published.shards, number)

    def publish_bucket_far(self, number: int, wanted: bool) -> tuple[Bucket, npt.NDArray[np.uint8]]:
        """Like `publish_bucket`, and the bytes for the object store if another node wants them."""
        bucket = self.publish_bucket(number)
        assert self._published is not None
        return bucket, self._published.writer.content(bucket, number) if wanted else np.empty(0, dtype=np.uint8)

    def save(self, role: str, directory: str) -> None:
        """Writes a role's state (collective)."""
        with self._use("save", role, "weights", "optimizer"):
            self._engines[role].save(Path(directory))

    def load(self, role: str, directory: str) -> None:
        """Restores a role's state (collective)."""
        with self._use("load", role, "weights", "optimizer"):
            self._engines[role].load(Path(directory))

    def save_hf(self, role: str, directory: str) -> None:
        """Writes a Hugging Face copy of a role's model (collective)."""
        with self._use("save", role, "weights"):
            self._engines[role].save_hf(Path(directory))

    @property
    def _device_memory(self) -> DeviceMemory:
        assert self._memory is not None, "not connected"
        return self._memory

    def _use(
        self, call: str, role: str, *parts: str, wanted_bytes: int = 0, keep: bool = False
    ) -> AbstractContextManager[None]:
        return self._device_memory.use(call, role, parts, wanted_bytes=wanted_bytes, keep=keep)

    def _batch(self, wanted: RankBatch, columns: Sequence[Column]) -> Batch:
        import ray

        from workers.batch import Batch

        if self._cached is None or self._cached[0] != wanted.key:
            blocks: list[RolloutBlock] = ray.get(list(wanted.blocks))
            self._cached = (wanted.key, Batch.from_blocks(blocks, wanted.index))
        batch = self._cached[1]
        for column in columns:
            batch.set_column(column.name, _collect(column, wanted))
        return batch


def _interface() -> str | None:
    """The network interface with the address that Ray knows this node by, for gloo, which looks the host's name up: on
    many machines that is an address which other nodes cannot reach."""
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    named = ((name, each.address) for name, addresses in psutil.net_if_addrs().items() for each in addresses)
    return next((name for name, own in named if own == address), None)


def _collect(column: Column, wanted: RankBatch) -> FlatArray:
    """This rank's values of a column, in its own row order."""
    import ray

    place: Mapping[int, int] = {int(row): i for i, row in enumerate(wanted.rows)}
    pieces: list[FlatArray] = [np.empty(0, dtype=np.float32)] * len(place)
    for source, rows in column.parts:
        if len(rows) == len(wanted.rows) and np.array_equal(rows, wanted.rows):
            flat: FlatArray = ray.get(source) if isinstance(source, ray.ObjectRef) else source
            return flat
        hits = [(int(row), i) for i, row in enumerate(rows) if int(row) in place]
        if hits:
            values = ray.get(source) if isinstance(source, ray.ObjectRef) else source
            parts = split(values, wanted.lengths[rows].astype(np.int32))
            for row, i in hits:
                pieces[place[row]] = parts[i]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.float32)
