"""Weights of a sharded engine through shared memory, from two training processes to this one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_harness import ADAMW, WRAP, Job, Pair, Solo, Table, build, data_rank, make_spec
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from workers.engines.base import EngineSpec, ParallelSpec, TrainEngine, Update
from workers.sync.buckets import Bucket, BucketReader, BucketWriter, Shard
from workers.sync.checksum import checksum

BUCKET_BYTES = 4096
OPENED: dict[str, tuple[TrainEngine, BucketWriter, tuple[Shard, ...]]] = {}
"""In a rank's process: what stays between calls, as it does in a TrainWorker."""


def open_weights(mesh: DeviceMesh, spec: EngineSpec, dtype: str) -> int:
    """Builds the engine and a publisher; returns the number of buckets."""
    engine, publisher = build(mesh, spec), BucketWriter(dtype, BUCKET_BYTES)
    OPENED["engine"] = (engine, publisher, tuple(engine.export_weights()))
    return publisher.num_buckets(OPENED["engine"][2])


def publish_bucket(_: DeviceMesh, number: int) -> tuple[int, Bucket]:
    """Writes this rank's rows of a bucket; returns the process id too."""
    _, publisher, shards = OPENED["engine"]
    return os.getpid(), publisher.write(shards, number)


def train_and_save(mesh: DeviceMesh, job: Job, directory: Path) -> None:
    """One optimizer step of the opened engine, and a Hugging Face copy to compare with."""
    engine = OPENED["engine"][0]
    rows = job.split[data_rank(mesh, job.spec)][0]
    update = Update([range(len(rows))], job.table.norm())
    engine.train_step(job.table.batch(rows), update, job.loss, temperature=1.0, entropy=True)
    engine.save_hf(directory)


def receive(world: Solo | Pair, num_buckets: int, reader: BucketReader) -> tuple[dict[str, Tensor], Sequence[Bucket]]:
    """All parameters, read bucket by bucket while the next one is being written."""
    received: dict[str, Tensor] = {}
    buckets: list[Bucket] = []
    for number in range(num_buckets):
        answers = world.run(publish_bucket, number)
        assert len({pid for pid, _ in answers}) == world.size
        buckets += [bucket for _, bucket in answers]
        for name, tensor in reader.read([bucket.as_message() for _, bucket in answers]):
            assert name not in received
            received[name] = tensor.clone()
    return received, buckets


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("ranks", "cut"), [(1, None), (2, None), (2, ParallelSpec(tensor=2))])
def test_the_reader_holds_exactly_the_trainers_weights(
    ranks: int, cut: ParallelSpec | None, dtype: str, qwen2: Path, solo: Solo, pair: Pair, tmp_path: Path
) -> None:
    """As loaded, and again after an optimizer step through the same open shards. cut: by Megatron, None: by FSDP."""
    world = solo if ranks == 1 else pair
    spec = make_spec(qwen2, optimizer=ADAMW, wrap_min_num_params=WRAP)
    if cut is not None:
        spec = replace(spec, strategy="megatron", parallel=cut)
    (num_buckets,) = set(world.run(open_weights, spec, dtype))
    assert num_buckets > 3
    reader = BucketReader()
    table = Table.random()
    rows = list(range(len(table)))
    job = Job(spec, table, ([rows],) if ranks == 1 else ([rows[:6]], [rows[6:]]))
    for directory in (qwen2, tmp_path):
        if directory == tmp_path:
            world.run(train_and_save, job, tmp_path)
        received, buckets = receive(world, num_buckets, reader)
        expected = {n: t.to(getattr(torch, dtype)) for n, t in load_file(directory / "model.safetensors").items()}
        assert received.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(received[name], tensor), name
        assert sum(b.checksum for b in buckets) % (1 << 64) == sum(map(checksum, expected.values())) % (1 << 64)
