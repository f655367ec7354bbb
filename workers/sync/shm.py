"""Weights through shared memory: every training rank writes its own rows, every replica reads them all.

Nothing is gathered: dim-0 shards are contiguous, so a reader puts a parameter together from the rows of each rank.
The memory is an anonymous file (memfd) that other processes of the same user reach through /proc, so nothing is left
behind however a process dies. Buckets alternate between two files: one is filled while the other is read.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.sync.checksum import checksum


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one parameter: HF name, full shape, first row, number of rows, byte offset in the file."""

    name: str
    shape: tuple[int, ...]
    first_row: int
    num_rows: int
    offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """One rank's share of one bucket. path: the file; dtype: torch dtype name; checksum: of the pieces' bits."""

    path: str
    dtype: str
    pieces: tuple[Piece, ...]
    num_bytes: int
    checksum: int

    def as_message(self) -> dict[str, object]:
        """Plain containers only: what may cross vLLM's RPC in every version."""
        pieces = [[p.name, list(p.shape), p.first_row, p.num_rows, p.offset] for p in self.pieces]
        return {"path": self.path, "dtype": self.dtype, "pieces": pieces, "num_bytes": self.num_bytes}


Shard = tuple[str, Tensor, tuple[int, ...], int]
"""HF name, this rank's rows, full shape, first row (what TrainEngine.export_weights yields)."""


class ShmPublisher:
    """Writes buckets of one rank's parameters into two alternating files."""

    def __init__(self, dtype: str, bucket_bytes: int) -> None:
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._dtype_name = dtype
        self._bucket_bytes = bucket_bytes
        self._files = (_SharedFile("tandem-weights-0"), _SharedFile("tandem-weights-1"))

    def num_buckets(self, shards: Sequence[Shard]) -> int:
        """How many buckets the parameters make; the same on every rank, as it follows from full shapes."""
        return len(self._plan(shards))

    def write(self, shards: Sequence[Shard], number: int) -> Bucket:
        """Casts and writes this rank's rows of bucket `number`; overwrites bucket number - 2."""
        chosen = self._plan(shards)[number]
        itemsize = self._dtype.itemsize
        total = sum(shards[i][1].numel() for i in chosen) * itemsize
        file = self._files[number % 2]
        memory = file.view(total)
        pieces: list[Piece] = []
        bits = 0
        offset = 0
        for i in chosen:
            name, local, shape, first_row = shards[i]
            target = memory[offset : offset + local.numel() * itemsize].view(self._dtype).view(local.shape)
            target.copy_(local)
            bits += checksum(target)
            pieces.append(Piece(name, shape, first_row, local.shape[0], offset))
            offset += local.numel() * itemsize
        return Bucket(file.path, self._dtype_name, tuple(pieces), total, bits % (1 << 64))

    def _plan(self, shards: Sequence[Shard]) -> list[list[int]]:
        buckets: list[list[int]] = [[]]
        filled = 0
        for i, (_, _, shape, _) in enumerate(shards):
            size = int(np.prod(shape)) * self._dtype.itemsize
            if buckets[-1] and filled + size > self._bucket_bytes:
                buckets.append([])
                filled = 0
            buckets[-1].append(i)
            filled += size
        return buckets


class ShmReader:
    """Reads buckets; keeps the files it has seen mapped."""

    def __init__(self) -> None:
        self._maps: dict[tuple[str, int], Tensor] = {}

    def read(self, messages: Sequence[dict[str, object]]) -> Iterator[tuple[str, Tensor]]:
        """(HF name, full tensor) of every parameter in a bucket, from all ranks' messages (`Bucket.as_message`).

        Raises RuntimeError if the rows of a parameter are not all there exactly once.
        """
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for message in messages:
            dtype: torch.dtype = getattr(torch, str(message["dtype"]))
            memory = self._map(str(message["path"]), int(message["num_bytes"]))  # type: ignore[call-overload]
            for name, shape, first_row, num_rows, offset in message["pieces"]:  # type: ignore[attr-defined]
                rows = (num_rows, *shape[1:])
                size = int(np.prod(rows)) * dtype.itemsize
                parts.setdefault(name, []).append((first_row, memory[offset : offset + size].view(dtype).view(rows)))
                shapes[name] = tuple(shape)
        for name, pieces in parts.items():
            yield name, _join(name, shapes[name], sorted(pieces, key=lambda piece: piece[0]))

    def _map(self, path: str, num_bytes: int) -> Tensor:
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        key = (path, num_bytes)
        if key not in self._maps:
            descriptor = os.open(path, os.O_RDWR)
            try:
                memory = mmap.mmap(descriptor, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            finally:
                os.close(descriptor)
            self._maps[key] = torch.frombuffer(memory, dtype=torch.uint8)
        return self._maps[key]


class _SharedFile:
    """An anonymous file that grows to what is asked of it."""

    def __init__(self, name: str) -> None:
        self._descriptor = os.memfd_create(name)
        self._memory: Tensor | None = None
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def view(self, num_bytes: int) -> Tensor:
        """uint8 view of the first `num_bytes`."""
        if self._memory is None or len(self._memory) < num_bytes:
            os.ftruncate(self._descriptor, max(num_bytes, 1))
            self._memory = torch.frombuffer(mmap.mmap(self._descriptor, max(num_bytes, 1)), dtype=torch.uint8)
        return self._memory[:num_bytes]


def _join(name: str, shape: tuple[int, ...], pieces: list[tuple[int, Tensor]]) -> Tensor:
    expected = 0
    for first_row, rows in pieces:
        if rows.shape[0] and first_row != expected:
            raise RuntimeError(f"weight sync: rows {expected}..{first_row} of {name} are missing or came twice")
        expected += rows.shape[0]
    if expected != shape[0]:
        raise RuntimeError(f"weight sync: {name} has {expected} rows, expected {shape[0]}")
    return pieces[0][1] if len(pieces) == 1 else torch.cat([rows for _, rows in pieces])
