"""Ragged batches, a toy model and what engines do with a loss, for the tests of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from trainer.algorithms.aggregation import count_loss_tokens, normalizers
from workers.batch import Batch, MicroBatch
from workers.normalizers import Normalizers

VOCABULARY = 11
LENGTH = 7.0
CPU = torch.device("cpu")
INPUTS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "values", "returns", "base")
COLUMNS = (*INPUTS, "entropy")

Predict = Callable[[Tensor], Tensor]
Result = tuple[float, Tensor, dict[str, float]]


def as_it_is(x: Tensor) -> Tensor:
    return x


def make_batch(seed: int, lengths: Sequence[int], dtype: torch.dtype = torch.float64) -> Batch:
    """Random ragged sequences, three to a group, with every column a loss may read."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    columns = {name: torch.from_numpy(rng.normal(size=total)).to(dtype) for name in COLUMNS}
    columns["rollout_logprobs"][torch.from_numpy(rng.random(total) < 0.3)] = math.nan
    tokens = TensorDict({"loss_mask": torch.from_numpy(rng.random(total) < 0.7), **columns}, batch_size=[total])
    group = np.arange(len(lengths), dtype=np.int32) // 3
    prompts = [rng.integers(0, VOCABULARY, 1 + g).astype(np.int32) for g in range(len(lengths))]
    responses = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths]
    return Batch([prompts[g] for g in group], responses, group, tokens)


def norm_of(batch: Batch) -> Normalizers:
    mask = batch.tokens.get("loss_mask").numpy()
    return normalizers(count_loss_tokens(batch.lengths, mask), length=LENGTH)


def run(loss: Any, micro: MicroBatch, theta: Tensor, predict: Predict = as_it_is) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a toy model that predicts from a token's own offset plus a parameter that many tokens share."""
    entropy = micro.tokens["entropy"] * (1.0 + theta.mean()) if loss.needs_entropy else None
    return loss(predict(micro.tokens["base"] + theta[micro.targets]), entropy, micro)


def whole(loss: Any, batch: Batch, theta: Tensor, predict: Predict = as_it_is) -> Result:
    """Loss, gradient and metrics with everything in one micro-batch."""
    return accumulate(loss, batch, theta, [list(range(len(batch)))], predict)


def accumulate(
    loss: Any, batch: Batch, theta: Tensor, parts: Sequence[Sequence[int]], predict: Predict = as_it_is
) -> Result:
    """What engines do: backward for each micro-batch, gradients and metrics added up."""
    theta = theta.clone().requires_grad_()
    total, metrics = 0.0, dict[str, float]()
    for rows in parts:
        micro = batch.micro_batch(rows, norm_of(batch), share_prompt=True, device=CPU)
        value, measured = run(loss, micro, theta, predict)
        value.backward()
        total += value.item()
        for name, metric in measured.items():
            assert metric.shape == () and not metric.requires_grad
            add = max if name.endswith("_max") else min if name.endswith("_min") else lambda a, b: a + b
            metrics[name] = add(metrics[name], metric.item()) if name in metrics else metric.item()
    assert theta.grad is not None
    return total, theta.grad, metrics


def theta_of(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=VOCABULARY)).to(dtype)


def by_sequence(batch: Batch, values: list[float]) -> list[list[float]]:
    """Masked-in values of each sequence."""
    mask, rows, start = batch.tokens["loss_mask"].tolist(), [], 0
    for length in batch.lengths.tolist():
        rows.append([values[i] for i in range(start, start + length) if mask[i]])
        start += length
    return rows


def naive_aggregate(rows: list[list[float]], mode: str) -> float:
    everything = [v for row in rows for v in row]
    if mode == "token-mean":
        return sum(everything) / len(everything)
    if mode == "token-sum":
        return sum(everything)
    if mode == "seq-mean-token-sum":
        return sum(sum(row) for row in rows) / len(rows)
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows if row) / len(rows)
    return sum(sum(row) for row in rows) / len(rows) / LENGTH


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, list[int], list[list[int]]]:
    """Lengths, and the sequences in any order in any micro-batches (ranks only add up more of them), some empty."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=9))
    order = draw(st.permutations(range(len(lengths))))
    parts: list[list[int]] = [[] for _ in range(draw(st.integers(1, 5)))]
    for row in order:
        parts[draw(st.integers(0, len(parts) - 1))].append(row)
    return draw(st.integers(0, 10**6)), lengths, parts
