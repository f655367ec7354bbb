"""Weights in buckets: every training rank writes its own part, every replica reads them all.

Nothing is gathered: a reader puts a parameter together from the parts of each rank, which are cut along one dimension.
Buckets alternate between two buffers: one is filled while the other is read. A buffer is shared memory
(`SharedFile`), or memory of a GPU that both sides use (`DeviceBuffer`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.sync.checksum import bit_sum
from workers.sync.memory import DeviceBuffer, SharedFile, open_device_buffer, open_shared_file

Channel = Literal["shared_memory", "cuda_ipc"]
_PASS_BYTES = 64 << 20
"""Of what is cast on a GPU at a time, on its way to host memory."""
Shard = tuple[str, Tensor, tuple[int, ...], int, int]
"""HF name, this rank's part, full shape, first index, and the dimension (0 or 1) it is cut along."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one parameter: HF name, full shape, the dimension it is cut along and where (first index, number of
    indices), byte offset in the file."""

    name: str
    shape: tuple[int, ...]
    dim: int
    first: int
    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """A rank's share of one bucket. address: of its buffer; dtype: torch dtype name; checksum: of the pieces' bits."""

    address: str | bytes
    dtype: str
    pieces: tuple[Piece, ...]
    num_bytes: int
    checksum: int

    def as_message(self) -> dict[str, object]:
        """Plain containers only: what may cross vLLM's RPC in every version."""
        pieces = [[p.name, list(p.shape), p.dim, p.first, p.count, p.offset] for p in self.pieces]
        return {"address": self.address, "dtype": self.dtype, "pieces": pieces, "num_bytes": self.num_bytes}


class BucketWriter:
    """Writes buckets of one rank's parameters into two alternating buffers."""

    def __init__(self, dtype: str, bucket_bytes: int, channel: Channel = "shared_memory") -> None:
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._dtype_name = dtype
        self._bucket_bytes = bucket_bytes
        self._buffers: tuple[SharedFile | DeviceBuffer, ...]
        if channel == "cuda_ipc":
            self._buffers = (DeviceBuffer(), DeviceBuffer())
        else:
            self._buffers = (SharedFile("tandem-weights-0"), SharedFile("tandem-weights-1"))

    def num_buckets(self, shards: Sequence[Shard]) -> int:
        """How many buckets the parameters make; the same on every rank, as it follows from full shapes."""
        return len(self._plan(shards))

    def missing_bytes(self, shards: Sequence[Shard], number: int) -> int:
        """Bytes of the device that writing bucket `number` will allocate."""
        return self._buffers[number % 2].missing_bytes(self._size(shards, self._plan(shards)[number]))

    def write(self, shards: Sequence[Shard], number: int) -> Bucket:
        """Casts and writes this rank's parts of bucket `number`; overwrites bucket number - 2."""
        chosen = self._plan(shards)[number]
        itemsize = self._dtype.itemsize
        total = self._size(shards, chosen)
        buffer = self._buffers[number % 2]
        memory = buffer.view(total)
        pieces: list[Piece] = []
        sums: list[Tensor] = []
        offset = 0
        for i in chosen:
            name, local, shape, first, dim = shards[i]
            target = memory[offset : offset + local.numel() * itemsize].view(self._dtype).view(local.shape)
            sums += _copy(local, target)
            pieces.append(Piece(name, shape, dim, first, local.shape[dim], offset))
            offset += local.numel() * itemsize
        bits = int(torch.stack(sums).sum().item()) % (1 << 64)
        buffer.finish()
        return Bucket(buffer.address, self._dtype_name, tuple(pieces), total, bits)

    def content(self, bucket: Bucket, number: int) -> npt.NDArray[np.uint8]:
        """The bytes of bucket `number`, which was just written: a view of shared memory."""
        content: npt.NDArray[np.uint8] = self._buffers[number % 2].view(bucket.num_bytes).numpy()
        return content

    def _size(self, shards: Sequence[Shard], chosen: Sequence[int]) -> int:
        """Of this rank's rows of these parameters, bytes."""
        return sum(shards[i][1].numel() for i in chosen) * self._dtype.itemsize

    def _plan(self, shards: Sequence[Shard]) -> list[list[int]]:
        buckets: list[list[int]] = [[]]
        filled = 0
        for i, (_, _, shape, *_) in enumerate(shards):
            size = int(np.prod(shape)) * self._dtype.itemsize
            if buckets[-1] and filled + size > self._bucket_bytes:
                buckets.append([])
                filled = 0
            buckets[-1].append(i)
            filled += size
        return buckets


def _copy(local: Tensor, target: Tensor) -> Iterator[Tensor]:
    """Casts and copies, and gives sums of the bits that were written, computed where they come from."""
    if local.device == target.device:
        target.copy_(local)
        yield bit_sum(target)
        return
    rows = max(1, _PASS_BYTES * len(target) // max(target.nbytes, 1))
    for part, place in zip(local.split(rows), target.split(rows), strict=True):
        cast = part.to(target.dtype)
        place.copy_(cast, non_blocking=True)
        yield bit_sum(cast)


class BucketReader:
    """Reads buckets; keeps the buffers it has seen mapped.

    device: where a parameter that comes in several parts is put together, if there is room.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._maps: dict[str | bytes, Tensor] = {}
        self.device = torch.device(device)

    def read(self, messages: Sequence[dict[str, object]]) -> Iterator[tuple[str, Tensor]]:
        """(HF name, full tensor) of every parameter in a bucket, from all ranks' messages (`Bucket.as_message`).

        A parameter in one part is a view of the buffer. Raises RuntimeError if the parts of a parameter are not all
        there exactly once.
        """
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        cuts: dict[str, tuple[int, int]] = {}
        for message in messages:
            dtype: torch.dtype = getattr(torch, str(message["dtype"]))
            memory = self._map(message["address"], int(message["num_bytes"]))  # type: ignore[call-overload,arg-type]
            for name, shape, dim, first, count, offset in message["pieces"]:  # type: ignore[attr-defined]
                own = (*shape[:dim], count, *shape[dim + 1 :])
                size = int(np.prod(own)) * dtype.itemsize
                parts.setdefault(name, []).append((first, memory[offset : offset + size].view(dtype).view(own)))
                cuts[name] = (dim, shape[dim])
        for name, pieces in parts.items():
            filled = sorted((p for p in pieces if p[1].numel()), key=lambda piece: piece[0])
            yield name, self._join(name, *cuts[name], filled)

    def _join(self, name: str, dim: int, size: int, pieces: list[tuple[int, Tensor]]) -> Tensor:
        what = "rows" if dim == 0 else "columns"
        expected = 0
        for first, part in pieces:
            if first != expected:
                raise RuntimeError(f"weight sync: {what} {expected}..{first} of {name} are missing or came twice")
            expected += part.shape[dim]
        if expected != size:
            raise RuntimeError(f"weight sync: {name} has {expected} {what}, expected {size}")
        if len(pieces) == 1:
            return pieces[0][1]
        shape = list(pieces[0][1].shape)
        shape[dim] = size
        whole = self._empty(shape, pieces[0][1].dtype)
        for first, part in pieces:
            whole.narrow(dim, first, part.shape[dim]).copy_(part, non_blocking=True)
        return whole

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError:  # others use the device too; slower, and the same in the end
            return torch.empty(shape, dtype=dtype)

    def _map(self, address: str | bytes, num_bytes: int) -> Tensor:
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        known = self._maps.get(address)
        if known is None or len(known) < num_bytes:
            known = open_shared_file(address, known) if isinstance(address, str) else open_device_buffer(address)
            self._maps[address] = known
        return known[:num_bytes]
