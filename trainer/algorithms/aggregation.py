"""From one number per token to one number per mini-batch, the same for any split of it.

A mini-batch is spread over ranks and micro-batches. Each part divides by the counts of the whole (`Normalizers`), so
the parts add up to the result, and so do their gradients: data-parallel ranks sum, they do not average.

With m the loss mask, N the number of masked-in tokens, B the number of sequences (fully masked ones too) and L the
configured length, a value x has the weight, per token of sequence s with n_s masked-in tokens:

    token-mean              m / N
    token-sum               m
    seq-mean-token-sum      m / B
    seq-mean-token-mean     m / (B n_s)
    seq-mean-token-sum-norm m / (B L)       (Dr. GRPO, https://arxiv.org/abs/2503.20783, section 3.2)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.normalizers import Normalizers

AGGREGATION_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


def token_weights(
    mask: Tensor,
    sequence: Tensor,
    num_sequences: int,
    *,
    mode: str,
    norm: Normalizers,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight of each token in the mini-batch's result, [R], 0 where masked.

    mask: [R] bool. sequence: [R] int64, which sequence of this micro-batch a token belongs to.
    num_sequences: of this micro-batch; a sequence is never split over micro-batches.
    norm: counts of the whole mini-batch.

    Raises ValueError for an unknown mode.
    """
    keep = mask.to(dtype)
    if mode == "token-mean":
        return keep / max(norm.num_tokens, 1.0)
    if mode == "token-sum":
        return keep
    per_sequence = keep / max(norm.num_sequences, 1.0)
    if mode == "seq-mean-token-sum":
        return per_sequence
    if mode == "seq-mean-token-sum-norm":
        return per_sequence / norm.length
    if mode == "seq-mean-token-mean":
        count = keep.new_zeros(num_sequences).index_add_(0, sequence, keep)
        return per_sequence / count.clamp(min=1.0)[sequence]
    raise ValueError(f"loss_agg_mode={mode!r} is unknown; choose one of {', '.join(AGGREGATION_MODES)}")


def weighted_sum(values: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Sum of values [R] times weights [R]; whatever a masked token holds, NaN included, reaches neither it nor its
    gradient."""
    return (torch.where(mask, values, 0.0) * weights).sum()


def aggregate(
    values: Tensor, mask: Tensor, sequence: Tensor, num_sequences: int, *, mode: str, norm: Normalizers
) -> Tensor:
    """This micro-batch's share of the aggregate of values [R], a scalar; arguments as in `token_weights`."""
    weights = token_weights(mask, sequence, num_sequences, mode=mode, norm=norm, dtype=values.dtype)
    return weighted_sum(values, mask, weights)


def token_mean(values: Tensor, mask: Tensor, norm: Normalizers) -> Tensor:
    """This micro-batch's share of the mean of values [R] (float or bool) over all masked-in tokens, a scalar."""
    return torch.where(mask, values, 0.0).sum() / max(norm.num_tokens, 1.0)


def count_loss_tokens(
    lengths: npt.NDArray[np.integer], loss_mask: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.int64]:
    """Tokens of each sequence that the loss keeps, [S], from response lengths [S] and the flat mask [R] (None: all)."""
    if loss_mask is None:
        return lengths.astype(np.int64)
    assert int(lengths.sum()) == len(loss_mask), "lengths and loss_mask disagree"
    kept = np.concatenate([[0], np.cumsum(loss_mask, dtype=np.int64)])
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.asarray(kept[ends] - kept[ends - lengths], dtype=np.int64)


def normalizers(loss_tokens: npt.NDArray[np.integer], *, length: float) -> Normalizers:
    """Counts of a mini-batch from `count_loss_tokens` of its sequences; `length`: see `PolicyLoss.length`."""
    return Normalizers(num_tokens=float(loss_tokens.sum()), num_sequences=float(len(loss_tokens)), length=length)
