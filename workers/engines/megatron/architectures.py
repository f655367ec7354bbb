"""Architectures that the Megatron engine knows: one table each, from Hugging Face tensors to our parameters.

Imports no megatron: `check` answers before any actor starts. A new architecture is a line in
ARCHITECTURES if its layers are the decoder's below with a tensor more or less.

The rows of q, k and v lie one after the other in `linear_qkv`, on each tensor-parallel rank those of its own heads, as
those of gate and up do in `linear_fc1`: every Hugging Face tensor is then one slice of one parameter. Experts have
parameters of their own, numbered through the whole layer; a rank has some of a layer's experts, or all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from workers.engines.base import ParallelSpec

Head = Literal["logprobs", "values"]


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of a Hugging Face checkpoint and where it is in our model.

    parameter: name without the chunk it is in, layers numbered through the whole model.
    cut: dimension that tensor parallelism cuts it along; None: every tensor-parallel rank has all of it.
    is_copy: a second place of the same tensor, the output layer's of tied embeddings on the last pipeline stage.
    is_expert: of one expert, which only some of the data-parallel ranks have.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    cut: int | None
    is_copy: bool = False
    is_expert: bool = False

    def part(self, rank: int, size: int) -> tuple[int, int]:
        """(first index, number of indices) along `dim` that one of `size` ranks holds; the last may hold fewer."""
        total = self.shape[self.dim]
        width = -(-total // size)
        first = min(rank * width, total)
        return first, min(width, total - first)

    @property
    def dim(self) -> int:
        """What parts of it are cut along, for whatever reason."""
        return self.cut or 0


class _Row(NamedTuple):
    """A line of a table. shape: names of `_sizes`; the names of an expert's tensors leave room for its number."""

    name: str
    parameter: str
    shape: tuple[str, ...]
    cut: int | None


_ATTENTION = (
    _Row("input_layernorm.weight", "input_layernorm.weight", ("hidden",), None),
    _Row("self_attn.q_proj.weight", "self_attention.linear_qkv.weight", ("query", "hidden"), 0),
    _Row("self_attn.k_proj.weight", "self_attention.linear_qkv.weight", ("kv", "hidden"), 0),
    _Row("self_attn.v_proj.weight", "self_attention.linear_qkv.weight", ("kv", "hidden"), 0),
    _Row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", ("hidden", "query"), 1),
    _Row("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", ("hidden",), None),
)
_QKV_BIAS = (
    _Row("self_attn.q_proj.bias", "self_attention.linear_qkv.bias", ("query",), 0),
    _Row("self_attn.k_proj.bias", "self_attention.linear_qkv.bias", ("kv",), 0),
    _Row("self_attn.v_proj.bias", "self_attention.linear_qkv.bias", ("kv",), 0),
)
_QK_NORM = (
    _Row("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", ("head",), None),
    _Row("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", ("head",), None),
)
_MLP = (
    _Row("mlp.gate_proj.weight", "mlp.linear_fc1.weight", ("intermediate", "hidden"), 0),
    _Row("mlp.up_proj.weight", "mlp.linear_fc1.weight", ("intermediate", "hidden"), 0),
    _Row("mlp.down_proj.weight", "mlp.linear_fc2.weight", ("hidden", "intermediate"), 1),
)

ARCHITECTURES: dict[str, tuple[_Row, ...]] = {
    "llama": _ATTENTION,
    "mixtral": _ATTENTION,
    "qwen2": _ATTENTION + _QKV_BIAS,
    "qwen3": _ATTENTION + _QK_NORM,
    "qwen3_moe": _ATTENTION + _QK_NORM,
}
"""By `model_type` of the Hugging Face config: a layer without its MLP. Qwen2.5 is qwen2."""


@dataclass(frozen=True, slots=True)
class _Mixture:
    """What an architecture has in place of an MLP, and how it is named. router: below the layer.

    expert: gate, up and down below the layer. num_experts, intermediate: fields of the Hugging Face config.
    """

    router: str
    expert: tuple[str, str, str]
    num_experts: str
    intermediate: str

    @property
    def rows(self) -> tuple[_Row, ...]:
        """Of all experts, then of one of them."""
        gate, up, down = self.expert
        fc1, fc2 = (f"mlp.experts.local_experts.{{}}.linear_fc{number}.weight" for number in (1, 2))
        return (
            _Row(self.router, "mlp.router.weight", ("experts", "hidden"), None),
            _Row(gate, fc1, ("expert", "hidden"), 0),
            _Row(up, fc1, ("expert", "hidden"), 0),
            _Row(down, fc2, ("hidden", "expert"), 1),
        )


_MIXTURES: dict[str, _Mixture] = {
    "mixtral": _Mixture(
        "block_sparse_moe.gate.weight",
        tuple(f"block_sparse_moe.experts.{{}}.w{number}.weight" for number in (1, 3, 2)),  # type: ignore[arg-type]
        "num_local_experts",
        "intermediate_size",
    ),
    "qwen3_moe": _Mixture(
        "mlp.gate.weight",
        tuple(f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")),  # type: ignore[arg-type]
        "num_experts",
        "moe_intermediate_size",
    ),
}
"""Of those that have experts."""


class Experts(NamedTuple):
    """Of each layer that has any: how many, how wide, how many a token goes to, and whether the chosen ones' shares
    add up to 1."""

    number: int
    intermediate: int
    per_token: int
    shares_add_up: bool


def experts_of(hf: Any) -> Experts | None:
    """The experts of a Hugging Face config; None: a dense model."""
    mixture = _MIXTURES.get(hf.model_type)
    if mixture is None:
        return None
    return Experts(
        getattr(hf, mixture.num_experts),
        getattr(hf, mixture.intermediate),
        hf.num_experts_per_tok,
        getattr(hf, "norm_topk_prob", True),
    )


def has_experts(hf: Any, layer: int) -> bool:
    """Whether this layer (counted from 0) has experts in place of an MLP."""
    if hf.model_type not in _MIXTURES or layer in (getattr(hf, "mlp_only_layers", None) or ()):
        return False
    return bool((layer + 1) % getattr(hf, "decoder_sparse_step", 1) == 0)


def head_dim(hf: Any) -> int:
    """Of a Hugging Face config, which may leave it to be worked out."""
    return int(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)


def has_qkv_bias(hf: Any) -> bool:
    """Whether the projections to q, k and v add a bias."""
    return _QKV_BIAS[0] in ARCHITECTURES[hf.model_type]


def has_qk_norm(hf: Any) -> bool:
    """Whether q and k are normalised head by head."""
    return _QK_NORM[0] in ARCHITECTURES[hf.model_type]


def items(hf: Any, head: Head) -> Iterator[Item]:
    """Every tensor of the model, in the order of a Hugging Face checkpoint.

    A value model has no output layer, and names without the prefix "model." as Hugging Face's bare models do.
    """
    size = _sizes(hf)
    body = "model." if head == "logprobs" else ""
    table = (size["vocab"], size["hidden"])
    yield Item(f"{body}embed_tokens.weight", "embedding.word_embeddings.weight", table, 0)
    for layer in range(hf.num_hidden_layers):
        for row, expert in _rows(hf, layer):
            yield Item(
                f"{body}layers.{layer}.{row.name.format(expert)}",
                f"decoder.layers.{layer}.{row.parameter.format(expert)}",
                tuple(size[name] for name in row.shape),
                row.cut,
                is_expert=expert is not None,
            )
    yield Item(f"{body}norm.weight", "decoder.final_layernorm.weight", (size["hidden"],), None)
    if head == "values":
        yield Item("value_head.weight", "value_head.weight", (1, size["hidden"]), None)
    elif hf.tie_word_embeddings:
        yield Item(f"{body}embed_tokens.weight", "output_layer.weight", table, 0, is_copy=True)
    else:
        yield Item("lm_head.weight", "output_layer.weight", table, 0)


def _rows(hf: Any, layer: int) -> Iterator[tuple[_Row, int | None]]:
    """Of one layer, each with the number of the expert it is of."""
    yield from ((row, None) for row in ARCHITECTURES[hf.model_type])
    experts = experts_of(hf)
    if experts is None or not has_experts(hf, layer):
        yield from ((row, None) for row in _MLP)
        return
    router, *of_each = _MIXTURES[hf.model_type].rows
    yield router, None
    yield from ((row, expert) for expert in range(experts.number) for row in of_each)


def check(hf: Any, parallel: ParallelSpec) -> list[str]:
    """What keeps this model from being trained or run cut up this way, in words for the user; empty: nothing.

    hf: the model's Hugging Face config.
    """
    if hf.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        return [f"strategy=megatron does not know the architecture {hf.model_type!r} (known: {known}): use fsdp"]
    return [*_unsupported(hf), *_indivisible(hf, parallel), *_experts_problems(hf, parallel)]


def _unsupported(hf: Any) -> Iterator[str]:
    """Variants of a known architecture."""
    variants = {
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "router_jitter_noise": 0.0,
    }
    for name, known in variants.items():
        if (value := getattr(hf, name, known)) != known:
            remedy = "use another model" if hf.model_type in _MIXTURES else "use fsdp"
            yield f"strategy=megatron does not support {hf.model_type} with {name}={value!r}: {remedy}"
    if getattr(hf, "quantization_config", None):  # its tensors mean nothing without their scales
        yield "strategy=megatron does not read quantized weights, and the model's are: take it in bfloat16 or float32"


def _indivisible(hf: Any, parallel: ParallelSpec) -> Iterator[str]:
    """The vocabulary is filled up to what divides, but each device needs a token of it."""
    tensor = "tensor_model_parallel_size"
    cut = {name: int(getattr(hf, name)) for name in ("num_attention_heads", "num_key_value_heads", *_widths(hf))}
    fits = math.gcd(parallel.tensor, *cut.values())
    for name, value in cut.items():
        if value % parallel.tensor:
            yield f"{tensor}={parallel.tensor} does not divide the model's {name}={value}: set it to {fits}"
    if -(-hf.vocab_size // parallel.tensor) * (parallel.tensor - 1) >= hf.vocab_size:
        yield (
            f"{tensor}={parallel.tensor}: the last device would get nothing of the model's vocab_size={hf.vocab_size}: "
            "set it to 1, or use another model"
        )
    virtual = parallel.virtual_pipeline
    if virtual is not None and (virtual < 2 or parallel.pipeline < 2):
        yield (
            f"virtual_pipeline_model_parallel_size={virtual} needs to be at least 2, and "
            f"pipeline_model_parallel_size={parallel.pipeline} too: set it to null"
        )
    chunks = parallel.pipeline * (virtual or 1)
    if hf.num_hidden_layers % chunks:
        yield (
            f"pipeline_model_parallel_size={parallel.pipeline} times virtual_pipeline_model_parallel_size="
            f"{virtual or 1} does not divide the model's num_hidden_layers={hf.num_hidden_layers}: set the first to "
            f"{math.gcd(parallel.pipeline, hf.num_hidden_layers)}{' and the other to null' if virtual else ''}"
        )


def _widths(hf: Any) -> Iterator[str]:
    """Names of the config's fields that say how wide the MLPs and experts are."""
    sparse = [has_experts(hf, layer) for layer in range(hf.num_hidden_layers)]
    if any(sparse):
        yield _MIXTURES[hf.model_type].intermediate
    if not all(sparse):
        yield "intermediate_size"


def _experts_problems(hf: Any, parallel: ParallelSpec) -> Iterator[str]:
    experts, key = experts_of(hf), f"expert_model_parallel_size={parallel.expert}"
    if experts is None:
        if parallel.expert > 1:
            yield f"{key}: {hf.model_type} has no experts, set it to 1"
        return
    if experts.per_token == 1 and experts.shares_add_up:
        yield f"strategy=megatron does not support {hf.model_type} with num_experts_per_tok=1: use another model"
    if experts.number % parallel.expert:
        number = f"{_MIXTURES[hf.model_type].num_experts}={experts.number}"
        yield f"{key} does not divide the model's {number}: set it to {math.gcd(parallel.expert, experts.number)}"
    if parallel.expert > 1 and parallel.tensor > 1:
        yield (
            f"{key}: {hf.model_type}'s experts are divided among devices or cut over tensor_model_parallel_size="
            f"{parallel.tensor}, not both yet; set one of them to 1"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        yield (
            f"sequence_parallel=False: {hf.model_type} has experts, which cut over tensor_model_parallel_size="
            f"{parallel.tensor} take tokens that are cut as well; set it to true"
        )


def _sizes(hf: Any) -> dict[str, int]:
    head, experts = head_dim(hf), experts_of(hf)
    of_experts = {"experts": experts.number, "expert": experts.intermediate} if experts else {}
    return of_experts | {
        "vocab": hf.vocab_size,
        "hidden": hf.hidden_size,
        "intermediate": hf.intermediate_size,
        "head": head,
        "query": head * hf.num_attention_heads,
        "kv": head * hf.num_key_value_heads,
    }
