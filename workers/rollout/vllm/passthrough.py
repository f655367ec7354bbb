"""What may be given in `actor_rollout_ref.rollout.engine_kwargs.vllm`: any argument of the installed vLLM, but for
those that have a key of their own, those that Tandem has to set, and what cannot work with weights that change.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from workers.rollout.spec import ENGINE_NAMES, RolloutSpec
from workers.rollout.vllm.capabilities import Capabilities

ROLLOUT = "actor_rollout_ref.rollout"
PASSED = f"{ROLLOUT}.engine_kwargs.vllm"

_HISTORY = Path(__file__).with_name("engine_arguments.json")
"""Every argument `EngineArgs` ever had, with its first and last release; made by scripts/vllm_versions.py."""

_MODEL = "actor_rollout_ref.model"
_KEYS = {
    "model": f"{_MODEL}.path",
    "tokenizer": f"{_MODEL}.tokenizer_path",
    "trust_remote_code": f"{_MODEL}.trust_remote_code",
    "hf_overrides": f"{_MODEL}.override_config",
    "tensor_parallel_size": f"{ROLLOUT}.tensor_model_parallel_size",
    "kv_cache_memory_bytes": f"{ROLLOUT}.kv_cache_gb",
    "enable_sleep_mode": f"{ROLLOUT}.free_cache_engine",
    "device_ids": f"{ROLLOUT}.device_mapping",
    "device": "trainer.device",
} | {name: f"{ROLLOUT}.{name}" for name in ENGINE_NAMES}
"""Arguments that have a key of their own; the rest may be passed through."""

_OURS = (
    "skip_tokenizer_init",
    "worker_extension_cls",
    "worker_cls",
    "logprobs_mode",
    "generation_config",
    "distributed_executor_backend",
)

_ONE_ENGINE = (
    f"a replica is one engine, cut by tensor parallelism alone; set {ROLLOUT}.tensor_model_parallel_size, and more "
    f"replicas by {ROLLOUT}.device_mapping"
)
_GENERATES = "replicas generate, nothing else; take it out"
_LORA = (
    "Tandem trains whole weights and writes them into the engine at every step, under names that LoRA layers change, "
    f"and {ROLLOUT}.sleep_level=2 drops the weights below an adapter; take it out"
)
_QUANTIZED = (
    f"the weight sync writes weights in {ROLLOUT}.dtype, and does not quantise them again; take it out (the KV cache "
    f"alone may be smaller: {PASSED}.kv_cache_dtype=fp8)"
)
_CANNOT_WORK: dict[str, str] = {
    **dict.fromkeys(
        (
            "pipeline_parallel_size",
            "data_parallel_size",
            "data_parallel_size_local",
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_backend",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
            "nnodes",
            "node_rank",
            "master_addr",
            "master_port",
        ),
        _ONE_ENGINE,
    ),
    "override_generation_config": (
        f"requests say how to sample, and no default is used; set {ROLLOUT}.temperature, top_p and top_k (other ways "
        "of sampling would need the trainer to compute the same probabilities)"
    ),
    **dict.fromkeys(("runner", "convert", "task"), _GENERATES),
    **dict.fromkeys(("enable_lora", "max_loras", "max_lora_rank", "default_mm_loras"), _LORA),
    **dict.fromkeys(("quantization", "quantization_config"), _QUANTIZED),
}
_NEUTRAL: tuple[object, ...] = (None, False, 1, "auto", "generate", "none", {})
"""Values that change nothing: an argument of `_CANNOT_WORK` may be given with one of them."""

_GRAPHS = ("cudagraph_capture_sizes", "cuda_graph_sizes", "max_cudagraph_capture_size", "max_seq_len_to_capture")
_DRAFTS_WITHOUT_WEIGHTS = {"ngram", "[ngram]", "ngram_gpu", "suffix"}


def passed_through_problems(spec: RolloutSpec, can: Capabilities, *, level: int) -> Iterator[str]:
    """What is wrong with `spec.engine_kwargs` on this version. level: of sleep, as `sleep_level` decides."""
    for name, value in spec.engine_kwargs.items():
        yield from _argument(name, value, can)
    yield from _contradictions(spec)
    yield from _drafts(spec, level)


def setting(name: str, value: object) -> str:
    """An argument as a user gives it: key=value."""
    written = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return f"{PASSED}.{name}={written}"


def _argument(name: str, value: object, can: Capabilities) -> Iterator[str]:
    if name in _KEYS:
        yield f"{setting(name, value)}: this argument has a key of its own; set {_KEYS[name]} instead"
    elif name in _OURS:
        yield f"{setting(name, value)}: Tandem needs this argument as it sets it; take it out"
    elif name not in can.engine_arguments:
        yield f"{setting(name, value)}: vLLM {can.version} has no such argument; {_advice(name, can)}"
    elif name in _CANNOT_WORK and not _is_neutral(value):
        yield f"{setting(name, value)}: {_CANNOT_WORK[name]}"
    else:
        kind = can.kinds.of(name) if can.kinds else None
        for key, wrong, why in kind.problems(value, name) if kind else ():
            yield f"{setting(key, wrong)}: for vLLM {can.version} {why}"


def _contradictions(spec: RolloutSpec) -> Iterator[str]:
    """Arguments against keys of ours."""
    given = spec.engine_kwargs
    inner = [f"compilation_config.{name}" for name in _mapping(given.get("compilation_config")) if "cudagraph" in name]
    graphs = [name for name in _GRAPHS if given.get(name) is not None]
    if spec.enforce_eager and (graphs or inner):
        asked = (graphs + inner)[0]
        yield (
            f"{PASSED}.{asked}: chooses among CUDA graphs, and {ROLLOUT}.enforce_eager=true turns them off; "
            f"set {ROLLOUT}.enforce_eager=false, or take it out"
        )
    blocks = given.get("num_gpu_blocks_override")
    if blocks is not None and spec.kv_cache_gb is not None:
        yield (
            f"{setting('num_gpu_blocks_override', blocks)}: sizes the KV cache, as {ROLLOUT}.kv_cache_gb="
            f"{spec.kv_cache_gb} does; take out one of them"
        )
    scheduled = given.get("max_num_scheduled_tokens")
    if isinstance(scheduled, int) and scheduled < spec.max_num_seqs:
        yield (
            f"{setting('max_num_scheduled_tokens', scheduled)}: smaller than {ROLLOUT}.max_num_seqs="
            f"{spec.max_num_seqs}, and every sequence takes one token of an engine step; set "
            f"{ROLLOUT}.max_num_seqs={scheduled} or smaller"
        )


def _drafts(spec: RolloutSpec, level: int) -> Iterator[str]:
    """A draft model's weights come from its checkpoint, once; the weight sync does not know them."""
    speculative = _mapping(spec.engine_kwargs.get("speculative_config"))
    if not speculative or {speculative.get("method"), speculative.get("model")} & _DRAFTS_WITHOUT_WEIGHTS:
        return
    drafts = f"{PASSED}.speculative_config: the draft model's weights are not part of the weight sync, and"
    without = f"or draft without a model: {PASSED}.speculative_config.method=ngram"
    if spec.load_format == "dummy":
        yield f"{drafts} {ROLLOUT}.load_format=dummy leaves them random; set {ROLLOUT}.load_format=auto, {without}"
    if level == 2:
        yield f"{drafts} {ROLLOUT}.sleep_level=2 drops them; set {ROLLOUT}.sleep_level=1, {without}"


def _is_neutral(value: object) -> bool:
    return any(type(value) is type(neutral) and value == neutral for neutral in _NEUTRAL)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _advice(name: str, can: Capabilities) -> str:
    """Which version has it, or which argument it was meant to be."""
    if name in history():
        return f"{_had(name)}; take it out, or install such a version"
    near = difflib.get_close_matches(name, can.engine_arguments, n=1)
    if near:
        return f"did you mean {near[0]}?"
    older = difflib.get_close_matches(name, history(), n=1)
    return f"did you mean {older[0]}? {_had(older[0])}" if older else "take it out"


def _had(name: str) -> str:
    first, last = history()[name]
    return f"vLLM {first} and later have it" if last is None else f"vLLM {first} to {last} had it"


@lru_cache(maxsize=1)
def history() -> dict[str, tuple[str, str | None]]:
    """Argument to its first release and its last; None: the newest release that was read has it."""
    table: dict[str, tuple[str, str | None]] = json.loads(_HISTORY.read_text(encoding="utf-8"))
    return table
