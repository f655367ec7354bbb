"""The tables of the Megatron engine: what is refused and why, and that they name a model's tensors and no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from workers.engines.base import ParallelSpec
from workers.engines.megatron.architectures import Item, check, items

SIZES = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def qwen2(**changes: object) -> PreTrainedConfig:
    return Qwen2Config(**SIZES | changes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_tables_are_what_hugging_face_has(kind: type[PreTrainedConfig], tied: bool) -> None:
    config = kind(**SIZES, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {i.name: i.shape for i in items(config, "logprobs") if not i.is_copy} == expected
    values = {i.name for i in items(config, "values")}
    assert values == {"value_head.weight", *(n.removeprefix("model.") for n in expected if n != "lm_head.weight")}


def qwen3_moe(**changes: object) -> PreTrainedConfig:
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 6}
    return Qwen3MoeConfig(**SIZES | sizes | changes)


def mixtral(**changes: object) -> PreTrainedConfig:
    return MixtralConfig(**SIZES | {"num_local_experts": 6, "num_experts_per_tok": 2} | changes)


@pytest.mark.parametrize(
    "config", [qwen3_moe(), mixtral(), qwen3_moe(mlp_only_layers=[0, 3]), qwen3_moe(decoder_sparse_step=2)]
)
def test_tables_of_experts_are_what_hugging_face_writes(config: PreTrainedConfig, tmp_path: Path) -> None:
    """In memory it has all experts of a layer in one parameter."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert {item.name: item.shape for item in items(config, "logprobs")} == expected
    experts = {item.name for item in items(config, "logprobs") if item.is_expert}
    assert experts == {name for name in expected if ".experts." in name}


@pytest.mark.parametrize(
    "parallel",
    [ParallelSpec(), ParallelSpec(tensor=2, sequence=True), ParallelSpec(2, 3), ParallelSpec(2, 3, virtual_pipeline=2)],
)
def test_what_divides_is_fine(parallel: ParallelSpec) -> None:
    """The vocabulary need not: it is filled up."""
    assert check(qwen2(), parallel) == []


@pytest.mark.parametrize(
    ("config", "parallel", "problems"),
    [
        (MistralConfig(**SIZES), ParallelSpec(tensor=3), ["does not know the architecture 'mistral' (known: llama, "]),
        (qwen2(use_sliding_window=True), ParallelSpec(), ["does not support qwen2 with use_sliding_window=True"]),
        (LlamaConfig(**SIZES, mlp_bias=True), ParallelSpec(), ["does not support llama with mlp_bias=True"]),
        (qwen2(hidden_act="gelu"), ParallelSpec(), ["does not support qwen2 with hidden_act='gelu'"]),
        (qwen2(quantization_config={"quant_method": "fp8"}), ParallelSpec(), ["does not read quantized weights"]),
        (qwen2(), ParallelSpec(tensor=4), ["tensor_model_parallel_size=4 does not divide the model's num_key_value"]),
        (qwen2(), ParallelSpec(tensor=3), ["num_attention_heads=4", "num_key_value_heads=2", "intermediate_size=40"]),
        (
            LlamaConfig(**SIZES | {"vocab_size": 5, "num_key_value_heads": 4}),
            ParallelSpec(tensor=4),
            ["the last device would get nothing of the model's vocab_size=5"],
        ),
        (qwen2(), ParallelSpec(pipeline=4), ["pipeline_model_parallel_size=4 times"]),
        (qwen2(), ParallelSpec(pipeline=2, virtual_pipeline=2), ["does not divide the model's num_hidden_layers=6"]),
        (qwen2(), ParallelSpec(virtual_pipeline=2), ["pipeline_model_parallel_size=1 too: set it to null"]),
        (qwen2(), ParallelSpec(expert=2), ["expert_model_parallel_size=2: qwen2 has no experts"]),
        (
            Qwen2MoeConfig(**SIZES),
            ParallelSpec(),
            ["does not know the architecture 'qwen2_moe' (known: llama, mixtral"],
        ),
        (
            qwen3_moe(),
            ParallelSpec(expert=4),
            ["expert_model_parallel_size=4 does not divide the model's num_experts=6"],
        ),
        (mixtral(), ParallelSpec(expert=4), ["size=4 does not divide the model's num_local_experts=6"]),
        (qwen3_moe(), ParallelSpec(tensor=2), ["sequence_parallel=False: qwen3_moe has experts"]),
        (mixtral(), ParallelSpec(tensor=2, sequence=True, expert=2), ["tensor_model_parallel_size=2, not both yet"]),
        (mixtral(router_jitter_noise=0.1), ParallelSpec(), ["does not support mixtral with router_jitter_noise=0.1"]),
        (qwen3_moe(moe_intermediate_size=9), ParallelSpec(2, sequence=True), ["model's moe_intermediate_size=9"]),
        (
            qwen3_moe(num_experts_per_tok=1, norm_topk_prob=True),
            ParallelSpec(),
            ["num_experts_per_tok=1: use another"],
        ),
        (qwen3_moe(num_experts_per_tok=1, norm_topk_prob=False), ParallelSpec(), []),
        (qwen3_moe(intermediate_size=9), ParallelSpec(2, sequence=True), []),
        (qwen3_moe(intermediate_size=9, mlp_only_layers=[1]), ParallelSpec(2, sequence=True), ["intermediate_size=9"]),
    ],
)
def test_what_cannot_be_is_said(config: PreTrainedConfig, parallel: ParallelSpec, problems: list[str]) -> None:
    said = check(config, parallel)
    assert len(said) == len(problems)
    for sentence, problem in zip(said, problems, strict=True):
        assert problem in sentence


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_cover_a_tensor_once(size: int) -> None:
    item = Item("w", "w", (37, 2), 0)
    parts = [item.part(rank, size) for rank in range(size)]
    assert [i for first, count in parts for i in range(first, first + count)] == list(range(37))
