"""A checksum of weights that does not depend on how they are split, fused or ordered."""

from __future__ import annotations

import torch
from torch import Tensor

PASS_ELEMENTS = 1 << 24
"""Looked at together. PyTorch widens them all before it sums: of an embedding that would be gigabytes at a time."""
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
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(PASS_ELEMENTS)]).sum()


def has_nan(tensor: Tensor) -> bool:
    """Whether any element is not a number."""
    parts = tensor.detach().contiguous().view(-1).split(PASS_ELEMENTS)
    return bool(torch.stack([torch.isnan(part).any() for part in parts]).any())
