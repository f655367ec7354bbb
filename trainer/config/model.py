"""Checks of the configuration against the model's own config: what vLLM would refuse when its processes are up.

Pure: from the fields of a Hugging Face config. What the training engines ask of a model is in `trainer.inputs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.batches import ROLLOUT, sequence_text
from trainer.config.schema import Config

_TP = f"{ROLLOUT}.tensor_model_parallel_size"
_OVERRIDE = "actor_rollout_ref.model.override_config"
_VOCABULARY_BLOCK = 64
"""vLLM pads the vocabulary to a multiple of it, and cuts that."""

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def model_problems(cfg: Config, fields: Mapping[str, Any]) -> Iterator[str]:
    """What the rollout cannot do with a model of these fields."""
    yield from _positions(cfg, fields)
    yield from _tensor_parallel(cfg, fields)
    yield from _cache(cfg, fields)


def _positions(cfg: Config, fields: Mapping[str, Any]) -> Iterator[str]:
    limit = _num_positions(fields)
    if limit is None:
        return
    asked = cfg.actor_rollout_ref.rollout.max_model_len
    if cfg.max_sequence_length > limit:
        room = limit - cfg.data.max_prompt_length
        shorter = f"set data.max_response_length={room} or smaller" if room > 0 else "make both shorter"
        yield (
            f"actor_rollout_ref.model.path={cfg.actor_rollout_ref.model.path}: the model has max_position_embeddings="
            f"{limit}, less than one sequence of {sequence_text(cfg)}; {shorter}, or, if the model bears it, "
            f"{_OVERRIDE}.max_position_embeddings={cfg.max_sequence_length}"
        )
    elif asked is not None and asked > limit:
        yield (
            f"{ROLLOUT}.max_model_len={asked}: the model has max_position_embeddings={limit}; set {ROLLOUT}."
            f"max_model_len=null, or, if the model bears it, {_OVERRIDE}.max_position_embeddings={asked}"
        )


def _num_positions(fields: Mapping[str, Any]) -> int | None:
    """Longest sequence that the model was made for; None where its config does not say, or in a way of its own."""
    limit = fields.get("max_position_embeddings")
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return limit if isinstance(limit, int) and kind in ("default", "llama3") else None


def _tensor_parallel(cfg: Config, fields: Mapping[str, Any]) -> Iterator[str]:
    size = cfg.actor_rollout_ref.rollout.tensor_model_parallel_size
    wrong = _uncut(fields, size)
    if wrong is None:
        return
    devices = range(size - 1, 0, -1)
    fits = next(smaller for smaller in devices if size % smaller == 0 and _uncut(fields, smaller) is None)
    yield f"{_TP}={size}: does not divide the model's {wrong}; set {_TP}={fits}, or use another model"


def _uncut(fields: Mapping[str, Any], size: int) -> str | None:
    """What of the model tensor parallelism of this size cannot cut, as name=number; None: nothing."""
    heads = fields.get("num_attention_heads")
    groups = fields.get("num_key_value_heads") or heads
    whole = {
        "num_attention_heads": heads,
        "intermediate_size": fields.get("intermediate_size"),
        "moe_intermediate_size": fields.get("moe_intermediate_size"),
    }
    for name, number in whole.items():
        if isinstance(number, int) and number % size:
            return f"{name}={number}"
    if isinstance(groups, int) and groups % size and size % groups:  # fewer heads than devices: each has a copy
        return f"num_key_value_heads={groups}"
    vocabulary = fields.get("vocab_size")
    if isinstance(vocabulary, int) and -(-vocabulary // _VOCABULARY_BLOCK) * _VOCABULARY_BLOCK % size:
        return f"vocab_size={vocabulary}"
    return None


def _cache(cfg: Config, fields: Mapping[str, Any]) -> Iterator[str]:
    """A KV cache of a given size must hold one sequence at least."""
    rollout = cfg.actor_rollout_ref.rollout
    per_token = _cache_bytes(fields, rollout.dtype)
    if rollout.kv_cache_gb is None or per_token is None or "kv_cache_dtype" in rollout.engine_kwargs.vllm:
        return
    length = rollout.max_model_len or cfg.max_sequence_length
    groups = int(fields.get("num_key_value_heads") or fields["num_attention_heads"])
    needed = length * per_token * max(1, groups // rollout.tensor_model_parallel_size)
    if needed > rollout.kv_cache_gb * (1 << 30):
        gib = math.ceil(needed / (1 << 30) * 1000) / 1000
        yield (
            f"{ROLLOUT}.kv_cache_gb={rollout.kv_cache_gb}: does not hold one sequence of {length} tokens ({ROLLOUT}."
            f"max_model_len, or data.max_prompt_length + data.max_response_length), {gib} GiB; set it to {2 * gib:g} "
            "or larger, or make sequences shorter"
        )


def _cache_bytes(fields: Mapping[str, Any], dtype: str) -> int | None:
    """Of one token and one key-value head; None for attention that does not keep keys and values of every token."""
    layers, heads, hidden = (fields.get(n) for n in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    window = fields.get("sliding_window") and fields.get("use_sliding_window", True)
    if (
        window
        or fields.get("kv_lora_rank")
        or not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int))
    ):
        return None
    mixed = fields.get("layer_types")
    if mixed and set(mixed) != {"full_attention"}:
        return None
    return 2 * layers * int(fields.get("head_dim") or hidden // heads) * _BYTES[dtype]
