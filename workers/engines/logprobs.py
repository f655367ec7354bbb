"""Log-probabilities of given tokens from hidden states, without the whole logits matrix in memory; and a statistic of
the distributions they are chosen from, the sum of the squared probabilities.

logits = hidden @ weight.T / temperature are made a chunk of rows at a time, in forward and again in backward, so peak
memory grows with the chunk and not with tokens times vocabulary. Only response tokens get logits at all.

The normaliser of a softmax is kept as the largest logit of the row and the logarithm of the sum beside it. Their sum is
as large as the logits and rounded at that size; log p = (logit - largest) - log_sum is not.

Where ranks hold parts of the vocabulary, each computes the softmax over its own part, and the parts are merged by their
normalisers: two collectives over [R] numbers per call, whatever the chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Logits of one chunk, float32. Every chunk adds to the gradient of the whole weight, so few large ones are fast."""
FLOAT32_LOGITS = Version(torch.__version__) >= Version("2.10")
"""On a GPU, logits of half-precision states leave the matrix product in float32, not rounded to half precision first.
False: rounded, and half as many bytes are written and read. PyTorch 2.8 and 2.9 can do it, but not compiled."""


class VocabularyPart(NamedTuple):
    """The rows of the output layer that this rank holds. group: of the ranks that hold the others; first: token."""

    group: dist.ProcessGroup
    first: int


class _Kernels(NamedTuple):
    """What is done with the logits of one chunk."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    squares: Callable[..., tuple[Tensor, Tensor, Tensor]]
    entropy: Callable[..., Tensor]
    gradient: Callable[..., Tensor]


def _forward_chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs of the targets, largest logits, logarithms of the sums beside them), [R] each.

    targets: -1 where another part of the vocabulary has the token; its log-prob means nothing.
    """
    logits = _logits(hidden, weight, temperature)
    chosen = logits.gather(-1, targets.clamp(min=0)[:, None])
    largest = logits.amax(-1, keepdim=True)
    log_sum = logits.sub_(largest).exp_().sum(-1, keepdim=True).log()  # as inductor knows it: one pass with `amax`
    return (chosen - largest - log_sum).squeeze(-1), largest.squeeze(-1), log_sum.squeeze(-1)


def _squares_chunk(hidden: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(largest logits, sums of exp beside them, sums of its squares), [R] each."""
    logits = _logits(hidden, weight, temperature)
    largest = logits.amax(-1, keepdim=True)
    odds = logits.sub_(largest).exp_()
    return largest.squeeze(-1), odds.sum(-1), odds.square().sum(-1)


def _entropy_chunk(hidden: Tensor, weight: Tensor, largest: Tensor, log_sum: Tensor, temperature: float) -> Tensor:
    """Means of the logits below the largest, [R]; entropy = log_sum - mean, two terms that do not cancel."""
    below = _logits(hidden, weight, temperature) - largest[:, None]
    return (torch.exp(below - log_sum[:, None]) * below).sum(-1)


def _logits_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    largest: Tensor,
    log_sum: Tensor,
    grad_logprobs: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> Tensor:
    """Of the undivided logits, in hidden's dtype. entropy: (`_entropy_chunk`'s means, gradients of the entropies).

    d logprob / d logits = onehot - p;  d entropy / d logits = -p * (log p + entropy) = -p * (below - mean).
    """
    below = _logits(hidden, weight, temperature) - largest[:, None]
    factor = -grad_logprobs[:, None]
    if entropy is not None:
        factor = factor - (below - entropy[0][:, None]) * entropy[1][:, None]
    grad = torch.exp(below - log_sum[:, None]) * factor
    if hidden.device.type == "cpu":
        chosen_grad = torch.where(targets >= 0, grad_logprobs, 0.0)
        grad.scatter_add_(-1, targets.clamp(min=0)[:, None], chosen_grad[:, None])
    else:  # a comparison is fused with the rest, a scatter is not
        chosen = torch.arange(weight.shape[0], device=targets.device)[None] == targets[:, None]
        grad = grad + torch.where(chosen, grad_logprobs[:, None], 0.0)
    return (grad / temperature).to(hidden.dtype)


@cache
def _kernels(device_type: str) -> _Kernels:
    """Fused on a GPU, where each is otherwise ten passes over the logits."""
    if device_type != "cuda":
        return _Kernels(_forward_chunk, _squares_chunk, _entropy_chunk, _logits_gradient)
    fuse = torch.compile(dynamic=True)
    return _Kernels(fuse(_forward_chunk), fuse(_squares_chunk), fuse(_entropy_chunk), fuse(_logits_gradient))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        chunk: int,
        part: VocabularyPart | None,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        largest, log_sum = torch.empty_like(logprobs), torch.empty_like(logprobs)
        means = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
        kernels = _kernels(hidden.device.type)
        for rows in _chunks(len(targets), chunk):
            found = kernels.forward(hidden[rows], weight, targets[rows], temperature)
            logprobs[rows], largest[rows], log_sum[rows] = found
            if entropy:
                means[rows] = kernels.entropy(hidden[rows], weight, largest[rows], log_sum[rows], temperature)
        if part is not None:
            logprobs, largest, log_sum, means = _merged(part, targets >= 0, logprobs, largest, log_sum, means)
        ctx.save_for_backward(hidden, weight, targets, largest, log_sum, means)
        ctx.settings = (temperature, entropy, chunk)
        return logprobs, (log_sum - means if entropy else means)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, largest, log_sum, means = ctx.saved_tensors
        temperature, entropy, chunk = ctx.settings
        grad_logprobs, grad_entropy = grads
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        gradient = _kernels(hidden.device.type).gradient
        for rows in _chunks(len(targets), chunk):
            part = (means[rows], grad_entropy[rows]) if entropy else None
            rowwise = (targets[rows], largest[rows], log_sum[rows], grad_logprobs[rows])
            grad = gradient(hidden[rows], weight, *rowwise, part, temperature)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _merged(
    part: VocabularyPart, is_own: Tensor, logprobs: Tensor, largest: Tensor, log_sum: Tensor, means: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One softmax from those over the parts of the vocabulary; all [R], `means` empty where nobody asked for entropy.

    is_own: the target is in this part.
    """
    most = largest.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=part.group)
    below = largest - most
    share = torch.exp(below + log_sum)
    chosen = torch.where(is_own, logprobs + log_sum + below, 0.0)
    sums = torch.stack([share, chosen] + ([share * (means + below)] if len(means) else []))
    dist.all_reduce(sums, group=part.group)
    total = sums[0].log()
    return sums[1] - total, most, total, sums[2] / sums[0] if len(means) else means


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    entropy: bool,
    chunk: int | None = None,
    part: VocabularyPart | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[targets], and the entropy of that distribution if asked for.

    hidden: [R, hidden_size]; weight: [vocabulary, hidden_size]; targets: [R] int64. chunk: rows at a time.
    part: weight is this part of the vocabulary only, hidden and targets are the same on all ranks of its group; the
        gradient of hidden is then this part's, to be summed over the group.
    Returns float32 ([R], [R] or None), both differentiable in hidden and weight.
    """
    if part is not None:
        local = targets - part.first
        targets = torch.where((local >= 0) & (local < weight.shape[0]), local, -1)
    rows = _rows_of_a_chunk(hidden, weight, chunk)
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, targets, temperature, entropy, rows, part)  # type: ignore[no-untyped-call]
    return logprobs, (entropies if entropy else None)


def sum_pi_squared(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: float,
    chunk: int | None = None,
    part: VocabularyPart | None = None,
) -> Tensor:
    """Sum over the vocabulary of softmax(hidden @ weight.T / temperature) squared, float32 [R], without gradient.

    Arguments as in `token_logprobs`.
    """
    largest = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    sums, squares = torch.empty_like(largest), torch.empty_like(largest)
    kernel = _kernels(hidden.device.type).squares
    with torch.no_grad():
        for rows in _chunks(len(hidden), _rows_of_a_chunk(hidden, weight, chunk)):
            largest[rows], sums[rows], squares[rows] = kernel(hidden[rows], weight, temperature)
        if part is not None:
            most = largest.clone()
            dist.all_reduce(most, dist.ReduceOp.MAX, group=part.group)
            scale = torch.exp(largest - most)
            merged = torch.stack([sums * scale, squares * scale.square()])
            dist.all_reduce(merged, group=part.group)
            sums, squares = merged.unbind()
        return squares / sums.square()


def _rows_of_a_chunk(hidden: Tensor, weight: Tensor, chunk: int | None) -> int:
    return chunk if chunk is not None else max(1, CHUNK_BYTES[hidden.device.type] // (4 * weight.shape[0]))


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Float32 [R, vocabulary], its own memory."""
    if FLOAT32_LOGITS and hidden.device.type == "cuda" and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits / temperature


def _chunks(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]
