"""Global counts a loss is divided by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Normalizers:
    """Sums over a whole mini-batch: all micro-batches of all ranks.

    num_tokens: response tokens the loss mask keeps.
    num_sequences: sequences, masked or not.
    length: divisor of seq-mean-token-sum-norm, tokens.
    """

    num_tokens: float
    num_sequences: float
    length: float = 1.0
