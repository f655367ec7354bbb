"""Settings of the rollout, and what goes into and comes out of one generate call. No torch, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.protocol import IntArray


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """How to build one replica. Sizes in tokens, memory in GiB; `kv_cache_gb` None: a share of GPU memory.

    device: "cpu" or "cuda"; devices: the CUDA devices the replica may see (empty on CPU).
    """

    model_path: str
    tokenizer_path: str
    trust_remote_code: bool
    override_config: Mapping[str, Any]
    device: Literal["cpu", "cuda"]
    devices: tuple[int, ...]
    tensor_parallel_size: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enforce_eager: bool
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    gpu_memory_utilization: float
    kv_cache_gb: float | None
    sleep_level: int
    load_format: str
    seed: int
    threads: int
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How to sample. n: responses per prompt. temperature 0: greedy. stop_token_ids: end of sequence.

    logprobs: for which prompts of a call the sampler reports log-probs: "all", "none", or "monitor" (one prompt in
    `MONITOR_EVERY`).
    """

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]
    logprobs: Literal["all", "monitor", "none"]


MONITOR_EVERY = 8
"""One prompt in so many reports the sampler's log-probs when they are only monitored."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Prompts for one replica.

    token_ids: flat; lengths: [num_prompts]; groups: [num_prompts], their places in the batch.
    """

    token_ids: IntArray
    lengths: IntArray
    groups: IntArray
    sampling: SamplingSpec
    seed: int


@dataclass(frozen=True, slots=True)
class GenerateStats:
    """One generate call of one replica: seconds in the engine, tokens generated, largest memory held (bytes)."""

    seconds: float
    tokens: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """One weight update of one replica: parameters received, and the checksum of the weights it now holds.

    checksum: None where each worker holds a part of the model (tensor parallelism), whose bits do not add up.
    """

    parameters: int
    checksum: int | None
