"""Checks of the configuration against the model's own config: what vLLM would refuse when its processes are up.

Pure: from the fields of a Hugging Face config. What the training engines ask of a model is in `trainer.inputs`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trainer.config.batches import ROLLOUT, sequence_text
from trainer.config.errors import show
from trainer.config.schema import Config
from workers.engines.rope import BESIDE, KINDS, ORIGINAL, SPELLINGS, Positions, positions_of, scaling_of

_TP = f"{ROLLOUT}.tensor_model_parallel_size"
_OVERRIDE = "actor_rollout_ref.model.override_config"
_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
"""What a kind of scaling cannot do without, but for the positions before it, which the checkpoint tells."""
_VOCABULARY_BLOCK = 64
"""vLLM pads the vocabulary to a multiple of it, and cuts that."""

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def model_problems(cfg: Config, fields: Mapping[str, Any]) -> Iterator[str]:
    """What the rollout cannot do with a model of these fields."""
    yield from _scaling(cfg, fields)
    yield from _positions(cfg, fields)
    yield from _tensor_parallel(cfg, fields)
    yield from _cache(cfg, fields)


def override_problems(cfg: Config) -> Iterator[str]:
    """Overrides of the config that no config can have."""
    given = cfg.actor_rollout_ref.model.override_config
    for name in SPELLINGS:
        if given.get(name) is not None and not isinstance(given[name], dict):
            yield (
                f"{_OVERRIDE}.{name}={show(given[name])}: must be a dictionary; set {_OVERRIDE}.{name}.rope_type=yarn "
                f"with {_OVERRIDE}.{name}.factor=2.0, for example"
            )
        else:
            yield from _unreadable_scaling(f"{_OVERRIDE}.{name}", given.get(name) or {})


def _unreadable_scaling(key: str, scaling: Mapping[str, Any]) -> Iterator[str]:
    """Values of a type that no kind of scaling takes."""
    for name in ("type", "rope_type"):
        if scaling.get(name) is not None and not isinstance(scaling[name], str):
            yield f"{key}.{name}={show(scaling[name])}: must be text; choose one of {', '.join(KINDS)}"
    for name in ("factor", ORIGINAL):
        value = scaling.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 1):
            example = "2.0" if name == "factor" else "32768"
            shown = json.dumps(value) if isinstance(value, str) else show(value)
            yield f"{key}.{name}={shown}: must be a number of at least 1; set {key}.{name}={example}, for example"


def unknown_override_notices(overrides: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    """Overrides that perhaps nobody reads. known: fields that the checkpoint's config has without them."""
    for name, value in overrides.items():
        if name not in known and name not in (*SPELLINGS, *BESIDE):
            near = get_close_matches(name, known, n=1)
            meant = f"; did you mean {_OVERRIDE}.{near[0]}?" if near else ""
            yield (
                f"{_OVERRIDE}.{name}={show(value)}: the checkpoint's config has no such field, so it changes nothing "
                f"unless the model's code looks for it{meant}"
            )


def local_fields(path: str) -> Mapping[str, Any]:
    """Of a model on this disk, its config.json; empty where that cannot be read, which is told elsewhere."""
    try:
        fields = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _scaling(cfg: Config, fields: Mapping[str, Any]) -> Iterator[str]:
    """Overrides of the rotary positions that nobody could compute."""
    given = scaling_of(cfg.actor_rollout_ref.model.override_config)
    kind, factor, key = given.get("rope_type"), given.get("factor"), f"{_OVERRIDE}.rope_scaling"
    if kind is not None and kind not in KINDS:
        yield f"{key}.rope_type={kind}: unknown; choose one of {', '.join(KINDS)}"
    lacking = [name for name in _NEEDS.get(kind or "", ()) if given.get(name) is None]
    if lacking:
        example = (
            f"; set {key}.factor=2.0, for example" if lacking == ["factor"] else ", as the model's card gives them"
        )
        yield f"{key}.rope_type={kind}: needs {', '.join(lacking)}{example}"
    found = positions_of(fields)
    if factor is not None and kind is None and found is not None and found.kind == "default":
        yield f"{key}.factor={show(factor)}: has no effect without a kind; set {key}.rope_type=yarn, for example"


def _positions(cfg: Config, fields: Mapping[str, Any]) -> Iterator[str]:
    """Sequences longer than the model has positions for, as vLLM counts them."""
    found = positions_of(fields)
    if found is None:
        return
    asked = cfg.actor_rollout_ref.rollout.max_model_len
    if cfg.max_sequence_length > found.number:
        room = found.number - cfg.data.max_prompt_length
        shorter = f"set data.max_response_length={room} or smaller" if room > 0 else "make both shorter"
        yield (
            f"actor_rollout_ref.model.path={cfg.actor_rollout_ref.model.path}: the model has {found.why}, less than "
            f"one sequence of {sequence_text(cfg)}; {shorter}, or, {_more_positions(found, cfg.max_sequence_length)}"
        )
    elif asked is not None and asked > found.number:
        yield (
            f"{ROLLOUT}.max_model_len={asked}: the model has {found.why}; set {ROLLOUT}.max_model_len=null, or, "
            f"{_more_positions(found, asked)}"
        )


def _more_positions(found: Positions, wanted: int) -> str:
    """What to set where the model is to work beyond its positions."""
    key, factor = f"{_OVERRIDE}.rope_scaling", math.ceil(wanted / found.base)
    if found.kind in ("yarn", "linear"):
        return f"if the model bears it, {key}.factor={factor}"
    yarn = f"{key}.rope_type=yarn with {key}.factor={factor}"
    if found.kind in ("dynamic", "longrope"):
        return (
            f"as a {found.kind} scale follows the longest sequence of a batch from there on, in training another than "
            f"in vLLM, {yarn}"
        )
    return f"if the model bears it, {_OVERRIDE}.max_position_embeddings={wanted}, or {yarn}"


def _tensor_parallel(cfg: Config, fields: Mapping[str, Any]) -> Iterator[str]:
    size = cfg.actor_rollout_ref.rollout.tensor_model_parallel_size
    wrong = uncut(fields, size)
    if wrong is None:
        return
    devices = range(size - 1, 0, -1)
    fits = next(smaller for smaller in devices if size % smaller == 0 and uncut(fields, smaller) is None)
    yield f"{_TP}={size}: does not divide the model's {wrong}; set {_TP}={fits}, or use another model"


def uncut(fields: Mapping[str, Any], size: int) -> str | None:
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
