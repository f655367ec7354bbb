"""Models that packed training would compute wrongly are refused before anything starts."""

from __future__ import annotations

import pytest
from transformers import Gemma2Config, MistralConfig, Qwen2Config

from trainer.inputs import check_attention, check_experts, check_vocabulary


def test_plain_attention_passes() -> None:
    check_attention(Qwen2Config().to_dict(), "m", longest=1 << 20)


def test_a_window_is_refused_only_where_it_would_be_felt() -> None:
    fields = MistralConfig(sliding_window=4096).to_dict()
    check_attention(fields, "m", longest=4096)
    with pytest.raises(ValueError, match=r"model\.path=m: .* sliding window of 4096 tokens.*4097"):
        check_attention(fields, "m", longest=4097)


def test_capped_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="attn_logit_softcapping"):
        check_attention(Gemma2Config().to_dict(), "m", longest=16)


def test_sinks_are_refused() -> None:
    with pytest.raises(ValueError, match="attention sinks"):
        check_attention({"model_type": "gpt_oss"}, "m", longest=16)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_mixtures_of_experts_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"model\.path=m: a mixture of 8 experts"):
        check_experts({key: 8}, "m")
    check_experts({key: None}, "m")
    check_experts(Qwen2Config().to_dict(), "m")


def test_a_tokenizer_of_another_model_is_refused() -> None:
    check_vocabulary([[1, 2], [99]], 100, "data.train_files", "t")
    with pytest.raises(ValueError, match=r"data\.train_files: prompt 1 has token id 100, .*vocabulary of 100.*path=t"):
        check_vocabulary([[1, 2], [3, 100]], 100, "data.train_files", "t")
