"""Architectures that the Megatron engine knows: one table each, from Hugging Face tensors to our parameters.

Imports neither torch nor megatron: `check` answers before any actor starts. A new architecture is a line in
ARCHITECTURES if its layers are the decoder's below with a tensor more or less.

The rows of q, k and v lie one after the other in `linear_qkv`, on each tensor-parallel rank those of its own heads, as
those of gate and up do in `linear_fc1`: every Hugging Face tensor is then one slice of one parameter.
"""

from __future__ import annotations

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
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    cut: int | None
    is_copy: bool = False

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
    """A line of a table. shape: names of `_sizes`."""

    name: str
    parameter: str
    shape: tuple[str, ...]
    cut: int | None


_DECODER_LAYER = (
    _Row("input_layernorm.weight", "input_layernorm.weight", ("hidden",), None),
    _Row("self_attn.q_proj.weight", "self_attention.linear_qkv.weight", ("query", "hidden"), 0),
    _Row("self_attn.k_proj.weight", "self_attention.linear_qkv.weight", ("kv", "hidden"), 0),
    _Row("self_attn.v_proj.weight", "self_attention.linear_qkv.weight", ("kv", "hidden"), 0),
    _Row("self_attn.o_proj.weight", "self_attention.linear_proj.weight", ("hidden", "query"), 1),
    _Row("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", ("hidden",), None),
    _Row("mlp.gate_proj.weight", "mlp.linear_fc1.weight", ("intermediate", "hidden"), 0),
    _Row("mlp.up_proj.weight", "mlp.linear_fc1.weight", ("intermediate", "hidden"), 0),
    _Row("mlp.down_proj.weight", "mlp.linear_fc2.weight", ("hidden", "intermediate"), 1),
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

ARCHITECTURES: dict[str, tuple[_Row, ...]] = {
    "llama": _DECODER_LAYER,
    "qwen2": _DECODER_LAYER + _QKV_BIAS,
    "qwen3": _DECODER_LAYER + _QK_NORM,
}
"""By `model_type` of the Hugging Face config. Qwen2.5 is qwen2."""


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
    for number in range(hf.num_hidden_layers):
        for row in ARCHITECTURES[hf.model_type]:
            shape = tuple(size[name] for name in row.shape)
            yield Item(f"{body}layers.{number}.{row.name}", f"decoder.layers.{number}.{row.parameter}", shape, row.cut)
    yield Item(f"{body}norm.weight", "decoder.final_layernorm.weight", (size["hidden"],), None)
    if head == "values":
        yield Item("value_head.weight", "value_head.weight", (1, size["hidden"]), None)
    elif hf.tie_word_embeddings:
        yield Item(f"{body}embed_tokens.weight", "output_layer.weight", table, 0, is_copy=True)
    else:
        yield Item("lm_head.weight", "output_layer.weight", table, 0)


def check(hf: Any, parallel: ParallelSpec) -> list[str]:
    """What keeps this model from being trained or run cut up this way, in words for the user; empty: nothing.

    hf: the model's Hugging Face config.
    """
    if hf.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        return [f"strategy=megatron does not know the architecture {hf.model_type!r} (known: {known}): use fsdp"]
    return [*_unsupported(hf), *_indivisible(hf, parallel)]


def _unsupported(hf: Any) -> Iterator[str]:
    """Variants of a known architecture."""
    variants = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "hidden_act": "silu"}
    for name, known in variants.items():
        if (value := getattr(hf, name, known)) != known:
            yield f"strategy=megatron does not support {hf.model_type} with {name}={value!r}: use fsdp"


def _indivisible(hf: Any, parallel: ParallelSpec) -> Iterator[str]:
    """The vocabulary is not among them: it is filled up to what divides."""
    tensor = "tensor_model_parallel_size"
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (value := getattr(hf, name)) % parallel.tensor:
            yield f"{tensor}={parallel.tensor} does not divide the model's {name}={value}"
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
            f"{virtual or 1} does not divide the model's num_hidden_layers={hf.num_hidden_layers}"
        )
    if parallel.expert > 1:
        yield f"expert_model_parallel_size={parallel.expert}: {hf.model_type} has no experts, set it to 1"


def _sizes(hf: Any) -> dict[str, int]:
    head = head_dim(hf)
    return {
        "vocab": hf.vocab_size,
        "hidden": hf.hidden_size,
        "intermediate": hf.intermediate_size,
        "head": head,
        "query": head * hf.num_attention_heads,
        "kv": head * hf.num_key_value_heads,
    }
