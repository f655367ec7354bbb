"""A checksum of weights that does not depend on how they are split, fused or ordered."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """Sum of the elements' bit patterns modulo 2**64.

    A trainer's q, k and v sum to what the engine's fused qkv sums to, so both sides can compare whole models. Every
    changed, missing or doubled value changes the sum (two changes that cancel exactly would not be seen).
    """
    return int(bit_sum(tensor).item()) % (1 << 64)


def bit_sum(tensor: Tensor) -> Tensor:
    """The same as a scalar on the tensor's device, int64, which wraps around: for sums of many."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGER[tensor.element_size()])
    return bits.sum(dtype=torch.int64)
