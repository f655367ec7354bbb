"""What one vLLM worker takes of its device, and how many sequences its KV cache holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainer.config.schema import Config, RolloutConfig
from trainer.plan.layout import Layout

_CONTEXT_BYTES = 600 << 20
"""Of what a worker takes for itself, the part that its share includes: CUDA context, loaded kernels, workspaces."""
COLLECTIVE_BYTES = 512 << 20
"""Buffers of NCCL in a process that talks to others, or, with Megatron, could."""
_GRAPH_BYTES = 8 << 20
"""Of one captured CUDA graph, beyond the memory that all of them share."""
_SAMPLER_BYTES = 36
"""Per logit while vLLM tries out its sampler: float32 logits and a copy, sorted values, int64 order, probabilities,
their running sum, masks."""


@dataclass(frozen=True, slots=True)
class ReplicaTerms:
    """Bytes on each device of a replica. weights, kv_cache: what sleeps; activations: what vLLM sets aside for a step;
    graphs, context: what stays while it sleeps.

    cache_tokens: that the KV cache holds, of the whole replica; concurrency: sequences of the greatest length that are
    in it at a time. On a CPU only the cache is known.
    """

    weights: int
    kv_cache: int
    activations: int
    graphs: int
    context: int
    cache_tokens: int
    concurrency: float

    @property
    def awake(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.activations + self.asleep

    @property
    def asleep(self) -> int:
        """What is left when it has given back what it can."""
        return self.graphs + self.context


def replica_terms(cfg: Config, layout: Layout, total_bytes: int | None) -> ReplicaTerms:
    """total_bytes: of a device; None: not known, or a CPU, and then a cache given as a share of it is not either."""
    rollout = cfg.actor_rollout_ref.rollout
    tensor, itemsize = rollout.tensor_model_parallel_size, _itemsize(rollout.dtype)
    weights = sum(layout.held(tensor=tensor)) * itemsize
    activations = _step_bytes(cfg, layout, itemsize)
    graphs = 0 if rollout.enforce_eager else 2 * _num_graphs(rollout.max_num_seqs) * _GRAPH_BYTES
    context = _CONTEXT_BYTES + (COLLECTIVE_BYTES if tensor > 1 else 0)
    if rollout.kv_cache_gb is not None:
        cache = int(rollout.kv_cache_gb * (1 << 30))
    else:
        share = int(rollout.gpu_memory_utilization * (total_bytes or 0))
        cache = max(0, share - weights - activations - context)
    per_token = cache_bytes_per_token(rollout, layout)
    tokens = cache // per_token
    longest = rollout.max_model_len or cfg.max_sequence_length
    return ReplicaTerms(weights, cache, activations, graphs, context, tokens, tokens / longest)


def cache_bytes_per_token(rollout: RolloutConfig, layout: Layout) -> int:
    """Keys and values of all layers, on each device of a replica."""
    asked = str(rollout.engine_kwargs.vllm.get("kv_cache_dtype", "auto"))
    itemsize = 1 if asked.startswith("fp8") else _itemsize(rollout.dtype)
    heads = max(1, layout.kv_heads // rollout.tensor_model_parallel_size)
    return 2 * layout.num_layers * heads * (layout.kv // layout.kv_heads) * itemsize


def replica_parts(terms: ReplicaTerms, *, awake: bool) -> Mapping[str, int]:
    """By the categories of `memory`."""
    parts = {"overhead": terms.asleep}
    if awake:
        parts |= {"weights": terms.weights, "kv_cache": terms.kv_cache, "activations": terms.activations}
    return parts


def _step_bytes(cfg: Config, layout: Layout, itemsize: int) -> int:
    """The larger of a full engine step and of sampling for every sequence, which vLLM tries out when it starts."""
    rollout = cfg.actor_rollout_ref.rollout
    tokens = max(rollout.max_num_batched_tokens, rollout.max_model_len or cfg.max_sequence_length)
    experts = layout.experts.per_token if layout.experts else 1
    mlp = 3 * layout.intermediate * experts // rollout.tensor_model_parallel_size
    step = tokens * itemsize * (3 * layout.hidden + max(mlp, layout.query + 2 * layout.kv))
    return max(step, rollout.max_num_seqs * layout.vocab * _SAMPLER_BYTES)


def _num_graphs(max_num_seqs: int) -> int:
    """Batch sizes that vLLM captures: 1, 2, 4, then in steps of 8 and from 256 on of 16, to 512 at most."""
    largest = min(2 * max_num_seqs, 512)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)]
    return sum(size <= largest for size in sizes)


def _itemsize(dtype: str) -> int:
    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize
