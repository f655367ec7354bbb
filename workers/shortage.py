"""Memory that ran out, as an error that travels from a worker to the driver with the figures of the moment."""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

Where = Literal["device", "host"]

_SIGNS: dict[str, Where] = {
    "can't allocate memory": "host",  # PyTorch's allocator for a CPU
    "cannot allocate memory": "host",  # the system
    "than desired cpu memory utilization": "host",  # vLLM, when it starts
    "than requested memory for kv": "host",
    "out of memory": "device",
    "than desired gpu memory utilization": "device",
}
"""What libraries say, in lower case, and whose memory it was; the first that is found counts."""
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


@dataclass(frozen=True, slots=True)
class Shortage:
    """What failed for want of memory. call: e.g. "update"; role: whose, "" for a replica of the rollout.

    where: a CPU's memory is the host's. asked: as the allocator said it, e.g. "2.00 GiB"; "" if it did not. free_bytes,
    total_bytes: of the device or host, when it failed. told: what the library said, its first line.
    """

    call: str
    role: str
    where: Where
    asked: str
    free_bytes: int
    total_bytes: int
    told: str


class OutOfMemory(RuntimeError):
    """Raised in a worker."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(shortage)
        self.shortage = shortage


@contextmanager
def out_of_memory_explained(call: str, role: str, memory: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Turns any library's way of saying "out of memory" into OutOfMemory. memory: (free, total) bytes of the device."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or (where := memory_lacking(error)) is None:
            raise
        said = str(error)
        asked = _ASKED.search(said)
        told = said.strip().partition("\n")[0] or type(error).__name__
        free, total = memory() if where == "device" else host_memory()
        raise OutOfMemory(Shortage(call, role, where, asked[1] if asked else "", free, total, told)) from error


def memory_lacking(error: BaseException) -> Where | None:
    """Whose memory ran out, by the error's words or type, or None: it says something else.

    vLLM's allocator and its worker processes raise a plain RuntimeError.
    """
    types = {c.__name__ for c in type(error).__mro__}
    if "OutOfMemoryError" in types:
        return "device"
    if "MemoryError" in types:
        return "host"
    words = str(error).lower()
    where = next((where for sign, where in _SIGNS.items() if sign in words), None)
    # of the calls of the CUDA runtime that we make ourselves, the one that takes memory pins the host's
    return "host" if where and "CudaError" in types else where


def host_memory() -> tuple[int, int]:
    """Free and total bytes of this machine's memory."""
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def peak_resident_bytes() -> int:
    """Most memory that this process has held since it began to run its program.

    Not getrusage's, which a new program inherits from the one that started it.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        status = ""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) << 10 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
