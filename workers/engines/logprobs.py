"""Log-probabilities of given tokens from hidden states, without the whole logits matrix in memory.

logits = hidden @ weight.T / temperature are made a chunk of rows at a time, in forward and again in backward, so peak
memory grows with the chunk and not with tokens times vocabulary. Only response tokens get logits at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20
"""Logits of one chunk, float32."""


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        log_z = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
        for rows in _chunks(len(targets), chunk):
            logits = _logits(hidden[rows], weight, temperature)
            log_z[rows] = torch.logsumexp(logits, dim=-1)
            logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - log_z[rows]
            if entropy:
                logp = logits - log_z[rows, None]
                entropies[rows] = -(torch.exp(logp) * logp).sum(-1)  # log_z - sum(p * logits) would cancel
        ctx.save_for_backward(hidden, weight, targets, log_z, entropies)
        ctx.settings = (temperature, entropy, chunk)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z, entropies = ctx.saved_tensors
        temperature, entropy, chunk = ctx.settings
        grad_logprobs, grad_entropy = grads
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(len(targets), chunk):
            logits = _logits(hidden[rows], weight, temperature)
            logp = logits - log_z[rows, None]
            p = torch.exp(logp)
            # d logprob / d logits = onehot - p;  d entropy / d logits = -p * (log p + entropy)
            grad = p * -grad_logprobs[rows, None]
            if entropy:
                grad -= p * (logp + entropies[rows, None]) * grad_entropy[rows, None]
            grad.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None])
            grad = (grad / temperature).to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, entropy: bool, chunk: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[targets], and the entropy of that distribution if asked for.

    hidden: [R, hidden_size]; weight: [vocabulary, hidden_size]; targets: [R] int64. chunk: rows at a time.
    Returns float32 ([R], [R] or None), both differentiable in hidden and weight.
    """
    rows = chunk if chunk is not None else max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, targets, temperature, entropy, rows)  # type: ignore[no-untyped-call]
    return logprobs, (entropies if entropy else None)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits / temperature


def _chunks(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]
