"""What of an engine can leave its device: storages are emptied in place, and their content waits in host memory.

A storage that was emptied and filled again is the same to everyone who has a view of it: the parameters, FSDP2's flat
views of their shards, the optimizer, the weights as they are exported. None of them needs to know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from workers.pinned import pin


class Part:
    """Tensors of one engine that leave the device storage by storage, and come back together.

    tensors: looks up those there are now, this rank's own (no DTensors): optimizer state is made at the first step.
    unmade: bytes on the device of those that there will be then, or at a save or load before it.
    Host buffers are kept for the next time. Nobody may use the tensors while some are away.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], unmade: Callable[[], int] = lambda: 0) -> None:
        self._tensors = tensors
        self._unmade = unmade
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._spare: dict[int, list[Tensor]] = defaultdict(list)

    @property
    def resident_bytes(self) -> int:
        """On the device."""
        return sum(storage.nbytes() for storage in self._storages())

    @property
    def away_bytes(self) -> int:
        """In host memory."""
        return sum(len(buffer) for _, buffer in self._away)

    @property
    def unmade_bytes(self) -> int:
        """Still to be made, once."""
        return self._unmade()

    def evict(self, num_bytes: int) -> int:
        """Moves storages to host memory until that is `num_bytes` or all there is; returns the bytes moved."""
        moved = 0
        storages = self._storages()
        for storage in storages:
            if moved >= num_bytes:
                break
            content = _content(storage)
            buffer = self._buffer(content)
            buffer.copy_(content, non_blocking=True)
            self._away.append((storage, buffer))
            moved += len(buffer)
            storage.resize_(0)  # its memory is used again by this stream only, so after the copy
        _wait(storages)
        return moved

    def restore(self) -> None:
        """Brings everything back."""
        for storage, buffer in self._away:
            storage.resize_(len(buffer))
            _content(storage).copy_(buffer, non_blocking=True)
        _wait([storage for storage, _ in self._away])
        for _, buffer in self._away:
            self._spare[len(buffer)].append(buffer)
        self._away.clear()

    def _storages(self) -> list[torch.UntypedStorage]:
        """Those with content, each once however many tensors share it."""
        storages = [tensor.untyped_storage() for tensor in self._tensors()]
        return list({storage.data_ptr(): storage for storage in storages if storage.nbytes()}.values())

    def _buffer(self, content: Tensor) -> Tensor:
        spare = self._spare[len(content)]
        return spare.pop() if spare else _host_buffer(len(content), pinned=content.is_cuda)


def local_of(tensor: Tensor) -> Tensor:
    """This rank's own rows of a sharded tensor, sharing its storage; any other tensor as it is."""
    from torch.distributed.tensor import DTensor  # half a second, which the driver would spend for nothing

    data = tensor.detach()
    return data.to_local() if isinstance(data, DTensor) else data


def _content(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage, uint8; a view that must not outlive a resize."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_buffer(num_bytes: int, *, pinned: bool) -> Tensor:
    """uint8 [num_bytes]."""
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    if pinned:
        pin(buffer)
    return buffer


def _wait(storages: Sequence[torch.UntypedStorage]) -> None:
    """For the copies from and to their device."""
    if any(storage.is_cuda for storage in storages):
        torch.cuda.synchronize()
