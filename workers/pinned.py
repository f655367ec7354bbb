"""Host memory that a GPU reads and writes directly, at the full speed of its link instead of a tenth of it."""

from __future__ import annotations

import torch
from torch import Tensor


def pin(memory: Tensor) -> None:
    """Registers host memory, uint8, with the GPU of this process. Where that fails, copies are slower, not wrong.

    PyTorch's own pinned memory is no substitute: it cannot be shared, and is rounded up to a power of two.
    """
    if memory.numel() and _call("cudaHostRegister", memory.data_ptr(), memory.nbytes, 0):
        _forget_error()


def unpin(memory: Tensor) -> None:
    """Takes it back, which has to happen before the memory goes. Memory that was not pinned stays as it is."""
    if memory.numel() and _call("cudaHostUnregister", memory.data_ptr()):
        _forget_error()


def _call(name: str, *arguments: int) -> int:
    """CUDA's error number."""
    return int(getattr(torch.cuda.cudart(), name)(*arguments))


def _forget_error() -> None:
    """CUDA keeps the last error until somebody asks, and PyTorch asks after its next kernel."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return
