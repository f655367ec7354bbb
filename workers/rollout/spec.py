"""Settings of the rollout, and what goes into and comes out of one generate call. No torch, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workers.protocol import IntArray

ENGINE_NAMES = (
    "gpu_memory_utilization",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enforce_eager",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "dtype",
    "load_format",
    "seed",
)
"""Keys of `actor_rollout_ref.rollout` that are arguments of vLLM's engine under the same name."""


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """How to build one replica. Sizes in tokens, memory in GiB; `kv_cache_gb` None: a share of GPU memory.

    device: "cpu" or "cuda"; devices: the CUDA devices the replica may see (empty on CPU). sleep_level "auto": 2 where
    memory is to be given back (free_cache_engine) and can be. auto_adapt: go around what the installed vLLM
    lacks, and say so; else refuse. deterministic: the same requests get the same tokens in another run.
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
    free_cache_engine: bool
    sleep_level: Literal["auto", 0, 1, 2]
    load_format: str
    seed: int
    threads: int
    auto_adapt: bool = True
    deterministic: bool = False
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
    """One generate call of one replica: seconds in the engine, tokens generated, and the most memory in use, in bytes:
    by the replica, and by everyone on its device."""

    seconds: float
    tokens: int
    peak_bytes: int
    device_peak_bytes: int


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What one replica is doing, read while it generates.

    steps: engine steps since it was built; a busy replica whose steps stand still hangs. busy: a generate call is
    under way. running, waiting: sequences being decoded, and queued. cache_use: share of the KV cache in use, 0 to 1.
    preemptions, tokens: sequences pushed out of the cache, and tokens generated, since it was built. The last four are
    NaN or 0 where the installed vLLM does not tell.
    """

    pid: int
    busy: bool
    steps: int
    running: int
    waiting: int
    cache_use: float
    preemptions: int
    tokens: int


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """One weight update of one replica: parameters received, and the checksum of the weights it now holds.

    checksum: None where each worker holds a part of the model (tensor parallelism), whose bits do not add up.
    """

    parameters: int
    checksum: int | None
