"""The tables of the Megatron engine: what is refused and why, and that they name a model's tensors and no others."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

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
        (qwen2(), ParallelSpec(tensor=4), ["tensor_model_parallel_size=4 does not divide the model's num_key_value"]),
        (qwen2(), ParallelSpec(tensor=3), ["num_attention_heads=4", "num_key_value_heads=2", "intermediate_size=40"]),
        (qwen2(), ParallelSpec(pipeline=4), ["pipeline_model_parallel_size=4 times"]),
        (qwen2(), ParallelSpec(pipeline=2, virtual_pipeline=2), ["does not divide the model's num_hidden_layers=6"]),
        (qwen2(), ParallelSpec(virtual_pipeline=2), ["pipeline_model_parallel_size=1 too: set it to null"]),
        (qwen2(), ParallelSpec(expert=2), ["expert_model_parallel_size=2: qwen2 has no experts"]),
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
