"""Weights through shared memory: parts of several ranks put together, buckets that alternate, errors, and checksums."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.sync.buckets import Bucket, BucketReader, BucketWriter, Shard
from workers.sync.checksum import checksum, has_nan
from workers.sync.memory import DeviceBuffer

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((7, 4), (3,), (1, 5), (2, 3, 2), (11,), (4, 4))
MESSAGE = dict[str, object]


def parameters(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(SHAPES)}


def shard(whole: dict[str, Tensor], rank: int, num_ranks: int, *, dim: int = 0) -> list[Shard]:
    """A rank's parts as FSDP2 cuts them: ceil(rows / ranks) each, so the last may have fewer or none.

    dim: of tensors that have it; others are cut along rows.
    """
    shards: list[Shard] = []
    for name, tensor in whole.items():
        along = min(dim, tensor.ndim - 1)
        size = -(-tensor.shape[along] // num_ranks)
        first = min(size * rank, tensor.shape[along])
        part = tensor.narrow(along, first, min(size, tensor.shape[along] - first))
        shards.append((name, part, tuple(tensor.shape), first, along))
    return shards


def publish(whole: dict[str, Tensor], num_ranks: int, *, dtype: str, bucket_bytes: int, dim: int) -> dict[str, Tensor]:
    """Everything through shared memory, in the order the driver uses: bucket k + 1 is written while k is read."""
    shards = [shard(whole, rank, num_ranks, dim=dim) for rank in range(num_ranks)]
    publishers = [BucketWriter(dtype, bucket_bytes) for _ in range(num_ranks)]
    counts = {p.num_buckets(s) for p, s in zip(publishers, shards, strict=True)}
    assert len(counts) == 1, "every rank makes the same buckets"
    number = counts.pop()
    reader = BucketReader()
    received: dict[str, Tensor] = {}
    written = [p.write(s, 0) for p, s in zip(publishers, shards, strict=True)]
    for k in range(number):
        views = list(reader.read([b.as_message() for b in written]))
        if k + 1 < number:
            written = [p.write(s, k + 1) for p, s in zip(publishers, shards, strict=True)]
        for name, tensor in views:
            assert name not in received
            received[name] = tensor.clone()
    return received


@given(
    num_ranks=st.integers(1, 4),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    bucket_bytes=st.sampled_from([1, 40, 100, 1 << 20]),
    seed=st.integers(0, 100),
    dim=st.integers(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_every_element_arrives_once_in_the_dtype_asked_for(
    num_ranks: int, dtype: str, bucket_bytes: int, seed: int, dim: int
) -> None:
    """Rows or columns do not divide by ranks, a rank has none, buckets are tiny or hold everything."""
    whole = parameters(seed)
    received = publish(whole, num_ranks, dtype=dtype, bucket_bytes=bucket_bytes, dim=dim)
    assert received.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(received[name], tensor.to(getattr(torch, dtype))), name


def test_buckets_alternate_between_two_files() -> None:
    """What was read from bucket 0 stays while bucket 1 is written, and is overwritten by bucket 2."""
    whole = {f"p{i}": torch.full((3,), float(i)) for i in range(4)}
    publisher, reader = BucketWriter("float32", 12), BucketReader()
    shards = shard(whole, 0, 1)
    assert publisher.num_buckets(shards) == 4
    buckets = [publisher.write(shards, number) for number in (0, 1)]
    assert buckets[0].address != buckets[1].address
    ((_, first),) = reader.read([buckets[0].as_message()])
    ((_, second),) = reader.read([buckets[1].as_message()])
    assert (first.tolist(), second.tolist()) == ([0.0] * 3, [1.0] * 3)
    assert publisher.write(shards, 2).address == buckets[0].address
    assert (first.tolist(), second.tolist()) == ([2.0] * 3, [1.0] * 3)
    ((name, third),) = reader.read([publisher.write(shards, 3).as_message()])
    assert (name, third.tolist()) == ("p3", [3.0] * 3)


def test_files_grow_and_are_used_again() -> None:
    """Small, large and small buckets in the same file, over several updates."""
    whole = {"a": torch.arange(2.0), "b": torch.arange(2.0), "c": torch.arange(5000.0), "d": torch.arange(3.0)}
    publisher, reader = BucketWriter("float32", 16), BucketReader()
    for version in range(3):
        for tensor in whole.values():
            tensor += version
        shards = shard(whole, 0, 1)
        for number in range(publisher.num_buckets(shards)):
            for name, tensor in reader.read([publisher.write(shards, number).as_message()]):
                assert torch.equal(tensor, whole[name])


def test_a_file_that_grew_is_mapped_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.sync.memory._GROWTH", 64)
    publisher, reader = BucketWriter("float32", 16), BucketReader()
    small, large = shard({"a": torch.arange(4.0)}, 0, 1), shard({"a": torch.arange(4000.0)}, 0, 1)
    for shards in (small, large, small):
        bucket = publisher.write(shards, 0)
        ((_, tensor),) = reader.read([bucket.as_message()])
        assert torch.equal(tensor, shards[0][1])
        assert os.stat(str(bucket.address)).st_size % 64 == 0


@pytest.mark.parametrize("elements", [1, 4, 7, 1 << 20])
def test_sums_and_checks_in_passes(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for passes of any size, and no more than one of them is widened at a time."""
    monkeypatch.setattr("workers.sync.checksum.PASS_ELEMENTS", elements)
    tensor = torch.randn(5, 6, generator=torch.Generator().manual_seed(4)).bfloat16()
    assert checksum(tensor) == int(tensor.view(torch.int16).long().sum()) % (1 << 64)
    assert checksum(tensor[:0]) == 0 and not has_nan(tensor) and not has_nan(tensor[:0])
    tensor[4, 5] = torch.nan
    assert has_nan(tensor) and has_nan(tensor.t())


def messages(whole: dict[str, Tensor], num_ranks: int, *, dim: int = 0) -> list[MESSAGE]:
    """Bucket 0 of every rank. The files stay open as long as this process has the publishers."""
    publishers = [BucketWriter("float32", 1 << 20) for _ in range(num_ranks)]
    KEPT.extend(publishers)
    return [p.write(shard(whole, rank, num_ranks, dim=dim), 0).as_message() for rank, p in enumerate(publishers)]


KEPT: list[BucketWriter] = []


@pytest.mark.parametrize(
    ("dim", "ranks", "problem"),
    [
        (0, [0], "w has 4 rows, expected 7"),
        (0, [1], r"rows 0\.\.4 of w are missing or came twice"),
        (0, [0, 1, 1], r"rows 7\.\.4 of w are missing or came twice"),
        (0, [0, 0, 1], r"rows 4\.\.0 of w are missing or came twice"),
        (1, [1], r"columns 0\.\.2 of w are missing or came twice"),
        (1, [0], "w has 2 columns, expected 3"),
    ],
)
def test_missing_and_doubled_parts_are_errors(dim: int, ranks: Sequence[int], problem: str) -> None:
    parts = messages({"w": torch.randn(7, 3)}, 2, dim=dim)
    with pytest.raises(RuntimeError, match=f"weight sync: .*{problem}"):
        list(BucketReader().read([parts[rank] for rank in ranks]))


def test_messages_are_plain_containers() -> None:
    def check(value: object) -> None:
        assert type(value) in (dict, list, str, int)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(part)

    for message in messages(parameters(), 2):
        check(message)


WRITER = """
import sys, torch
from workers.sync.buckets import BucketWriter
publisher = BucketWriter("float32", 1 << 20)
shards = [("w", torch.arange(12.0).view(4, 3), (4, 3), 0, 0)]
bucket = publisher.write(shards, 0)
print(bucket.address, bucket.num_bytes, flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_when_the_writer_is_killed() -> None:
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        path, num_bytes = writer.stdout.readline().split()
        pieces = [["w", [4, 3], 0, 0, 4, 0]]
        message: MESSAGE = {"address": path, "dtype": "float32", "pieces": pieces, "num_bytes": int(num_bytes)}
        ((_, tensor),) = BucketReader().read([message])
        assert tensor.flatten().tolist() == list(range(12))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert set(os.listdir("/dev/shm")) <= before
    assert not os.path.exists(path)
    assert tensor.flatten().tolist() == list(range(12)), "what a reader has mapped outlives the writer"


def total(tensors: Sequence[Tensor]) -> int:
    return sum(checksum(t) for t in tensors) % (1 << 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_checksum_does_not_see_fusing_splitting_or_order(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (8, 2, 3))
    fused = torch.cat([q, k, v])
    assert checksum(fused) == total([q, k, v]) == total([v, q, k])
    assert checksum(fused) == total(torch.split(fused, [1, 5, 7]))
    assert checksum(fused.t()) == checksum(fused)
    assert checksum(fused[:0]) == 0


@given(element=st.integers(0, 14), bit=st.integers(0, 31), half=st.booleans())
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_changes_the_checksum(element: int, bit: int, half: bool) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    tensor = tensor.bfloat16() if half else tensor
    bits = tensor.clone().view(torch.int16 if half else torch.int32).flatten()
    flip = 1 << (bit % 16 if half else bit)
    limit = 1 << (16 if half else 32)
    flipped = (int(bits[element]) ^ flip) % limit
    bits[element] = flipped - limit if flipped >= limit // 2 else flipped
    assert checksum(bits.view(tensor.dtype)) != checksum(tensor)


def test_a_missing_or_doubled_row_changes_the_checksum() -> None:
    tensor = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    assert len({checksum(tensor), checksum(tensor[:3]), checksum(torch.cat([tensor, tensor[:1]]))}) == 3


def test_buckets_carry_the_checksum_of_what_was_sent() -> None:
    whole = parameters()
    for num_ranks in (1, 3):
        buckets: list[Bucket] = []
        for rank in range(num_ranks):
            publisher, shards = BucketWriter("bfloat16", 64), shard(whole, rank, num_ranks)
            buckets += [publisher.write(shards, number) for number in range(publisher.num_buckets(shards))]
        assert sum(b.checksum for b in buckets) % (1 << 64) == total([t.bfloat16() for t in whole.values()])
        assert sum(b.num_bytes for b in buckets) == 2 * sum(t.numel() for t in whole.values())


def test_a_bucket_allocates_what_its_buffer_lacks() -> None:
    """Ten float32 a bucket, but for a parameter of 30; two buffers in turn, of a device whose memory is the host's."""
    shards = [(f"p{i}", torch.zeros(size), (size,), 0) for i, size in enumerate((10, 10, 10, 30, 6))]
    assert [BucketWriter("float32", 40).missing_bytes(shards, n) for n in range(5)] == [0] * 5, "shared files need none"
    writer = BucketWriter("float32", 40)
    buffers = [DeviceBuffer.__new__(DeviceBuffer) for _ in range(2)]
    for buffer in buffers:
        buffer._memory = torch.empty(0, dtype=torch.uint8)
    writer._buffers = tuple(buffers)
    missing: list[int] = []
    for sync in range(2):
        for number in range(5):
            missing.append(writer.missing_bytes(shards, number))
            if missing[-1]:
                buffers[number % 2]._memory = torch.empty(missing[-1], dtype=torch.uint8)
        assert missing == [40, 40, 0, 120, 0] + [0] * 5 * sync, "a buffer that grows is a new one beside the old"
