"""A device without memory left, as an error that travels from a worker to the driver with the figures of the moment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_SIGNS = ("out of memory", "can't allocate memory")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


@dataclass(frozen=True, slots=True)
class Shortage:
    """What failed for want of memory. call: e.g. "update"; role: whose, "" for a replica of the rollout.

    asked: as the allocator said it, e.g. "2.00 GiB"; "" if it did not. free_bytes, total_bytes: of the device, when it
    failed. told: what the library said, its first line.
    """

    call: str
    role: str
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
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        said = str(error)
        asked = _ASKED.search(said)
        told = said.strip().partition("\n")[0] or type(error).__name__
        raise OutOfMemory(Shortage(call, role, asked[1] if asked else "", *memory(), told)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """By its type or its words: vLLM's allocator and its worker processes raise a plain RuntimeError."""
    words = str(error).lower()
    return any(c.__name__ == "OutOfMemoryError" for c in type(error).__mro__) or any(s in words for s in _SIGNS)
