"""Models that packed training would compute wrongly are refused before anything starts."""

from __future__ import annotations

import pytest
from transformers import Gemma2Config, MistralConfig, Qwen2Config

from trainer.inputs import check_attention


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
