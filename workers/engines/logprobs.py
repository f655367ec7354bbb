"""Log-probabilities of given tokens from hidden states, without the whole logits matrix in memory.

logits = hidden @ weight.T / temperature are made a chunk of rows at a time, in forward and again in backward, so peak
memory grows with the chunk and not with tokens times vocabulary. Only response tokens get logits at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Logits of one chunk, float32. Every chunk adds to the gradient of the whole weight, so few large ones are fast."""


class _Kernels(NamedTuple):
    """What is done with the logits of one chunk."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    entropy: Callable[..., Tensor]
    gradient: Callable[..., Tensor]


def _forward_chunk(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs of the targets, log of the normaliser)."""
    logits = _logits(hidden, weight, temperature)
    log_z = torch.logsumexp(logits, dim=-1)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - log_z, log_z


def _entropy_chunk(hidden: Tensor, weight: Tensor, log_z: Tensor, temperature: float) -> Tensor:
    logp = _logits(hidden, weight, temperature) - log_z[:, None]
    return -(torch.exp(logp) * logp).sum(-1)  # log_z - sum(p * logits) would cancel


def _logits_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_z: Tensor,
    grad_logprobs: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> Tensor:
    """Of the undivided logits, in hidden's dtype. entropy: (entropies, their gradient).

    d logprob / d logits = onehot - p;  d entropy / d logits = -p * (log p + entropy).
    """
    logp = _logits(hidden, weight, temperature) - log_z[:, None]
    factor = -grad_logprobs[:, None]
    if entropy is not None:
        factor = factor - (logp + entropy[0][:, None]) * entropy[1][:, None]
    grad = torch.exp(logp) * factor
    if hidden.device.type == "cpu":
        grad.scatter_add_(-1, targets[:, None], grad_logprobs[:, None])
    else:  # a comparison is fused with the rest, a scatter is not
        chosen = torch.arange(weight.shape[0], device=targets.device)[None] == targets[:, None]
        grad = grad + torch.where(chosen, grad_logprobs[:, None], 0.0)
    return (grad / temperature).to(hidden.dtype)


@cache
def _kernels(device_type: str) -> _Kernels:
    """Fused on a GPU, where each is otherwise ten passes over the logits."""
    if device_type != "cuda":
        return _Kernels(_forward_chunk, _entropy_chunk, _logits_gradient)
    fuse = torch.compile(dynamic=True)
    return _Kernels(fuse(_forward_chunk), fuse(_entropy_chunk), fuse(_logits_gradient))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        log_z = torch.empty_like(logprobs)
        entropies = torch.empty_like(logprobs) if entropy else logprobs.new_empty(0)
        kernels = _kernels(hidden.device.type)
        for rows in _chunks(len(targets), chunk):
            logprobs[rows], log_z[rows] = kernels.forward(hidden[rows], weight, targets[rows], temperature)
            if entropy:
                entropies[rows] = kernels.entropy(hidden[rows], weight, log_z[rows], temperature)
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
        gradient = _kernels(hidden.device.type).gradient
        for rows in _chunks(len(targets), chunk):
            part = (entropies[rows], grad_entropy[rows]) if entropy else None
            grad = gradient(hidden[rows], weight, targets[rows], log_z[rows], grad_logprobs[rows], part, temperature)
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
    rows = chunk if chunk is not None else max(1, CHUNK_BYTES[hidden.device.type] // (4 * weight.shape[0]))
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, targets, temperature, entropy, rows)  # type: ignore[no-untyped-call]
    return logprobs, (entropies if entropy else None)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if temperature == 1.0 else logits / temperature


def _chunks(size: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, size)) for start in range(0, size, chunk)]
