"""Memory that one process writes and others read: an anonymous file, or a GPU's memory by CUDA IPC."""

from __future__ import annotations

import mmap
import os
import pickle

import torch
from torch import Tensor

from workers.pinned import pin, unpin

_GROWTH = 64 << 20
"""Files grow by multiples of it. Each time a pinned one is pinned anew; in others what is not written takes nothing."""


class SharedFile:
    """An anonymous file (memfd) that grows to what is asked of it; pinned in a process that uses a GPU.

    Other processes of the same user reach it through /proc, and nothing is left behind however a process dies.
    """

    def __init__(self, name: str) -> None:
        self._descriptor = os.memfd_create(name)
        self._memory: Tensor | None = None
        self.address = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def view(self, num_bytes: int) -> Tensor:
        """uint8 view of the first `num_bytes`."""
        if self._memory is None or len(self._memory) < num_bytes:
            size = max(1, -(-num_bytes // _GROWTH)) * _GROWTH
            os.ftruncate(self._descriptor, size)
            self._memory = _mapped(self._descriptor, size, instead_of=self._memory)
        return self._memory[:num_bytes]

    def missing_bytes(self, num_bytes: int) -> int:
        """Of a device: none, whatever its size."""
        return 0

    def finish(self) -> None:
        """Waits until all is written."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def open_shared_file(address: str, instead_of: Tensor | None = None) -> Tensor:
    """Another process's whole `SharedFile`, uint8. instead_of: what it gave before the file grew."""
    descriptor = os.open(address, os.O_RDWR)
    try:
        return _mapped(descriptor, os.fstat(descriptor).st_size, instead_of=instead_of)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, size: int, *, instead_of: Tensor | None) -> Tensor:
    memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    if torch.cuda.is_initialized():
        if instead_of is not None:
            unpin(instead_of)
        pin(memory)
    return memory


class DeviceBuffer:
    """Memory of this process's GPU that grows to what is asked of it; processes on the same GPU can map it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cuda")
        self.address = b""

    def view(self, num_bytes: int) -> Tensor:
        """uint8 view of the first `num_bytes`."""
        if len(self._memory) < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
            self.address = _handle(self._memory)
        return self._memory[:num_bytes]

    def missing_bytes(self, num_bytes: int) -> int:
        """What `view` will allocate: where it grows, all of it, as the old memory may still be mapped."""
        return num_bytes if len(self._memory) < num_bytes else 0

    def finish(self) -> None:
        """Waits until all is written: the reader's GPU work knows nothing of this process's."""
        torch.cuda.synchronize()


def open_device_buffer(address: bytes) -> Tensor:
    """Another process's whole `DeviceBuffer`, uint8. Both processes must see the GPU under the same number."""
    rebuild, arguments = pickle.loads(address)
    memory: Tensor = rebuild(*arguments)
    return memory


def _handle(memory: Tensor) -> bytes:
    """What torch.multiprocessing would send to another process, as plain bytes."""
    from torch.multiprocessing.reductions import reduce_tensor

    return pickle.dumps(reduce_tensor(memory))
