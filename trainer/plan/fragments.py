"""Memory that PyTorch's allocator holds without using it, because of what lives beside it.

Optimizer state is made at the end of the first update, when the blocks of its activations are free but still held. Each
tensor of state goes into the smallest block that has room for it; a block that has one in it cannot be given back, nor
can what is left of it be used by other processes. Which blocks there are follows from the model and the micro-batch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

_LARGE = 10 << 20
"""From here on a tensor gets a block of its own size; smaller ones share blocks of 20 MiB."""
_SPLIT = 1 << 20
"""What is left of a block is kept for others from this size on."""


def stranded_bytes(states: Sequence[int], blocks: Sequence[int]) -> int:
    """Bytes of `blocks` that stay held without being used, once tensors of these sizes have been placed in them.

    states: in the order in which they are made. Tensors that no block has room for get memory of their own.
    """
    free = sorted((size, number) for number, size in enumerate(blocks) if size >= _LARGE)
    touched: set[int] = set()
    for state in states:
        place = bisect_left(free, (state, -1))
        if place == len(free):
            continue
        size, number = free.pop(place)
        touched.add(number)
        if size - state >= _SPLIT:
            insort(free, (size - state, number))
    return sum(size for size, number in free if number in touched)
