"""Models that packed training would compute wrongly are refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Gemma2Config, GPT2Config, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3MoeConfig

from trainer.config.load import load_config
from trainer.data.dataset import PromptDataset
from trainer.inputs import (
    check_answers,
    check_attention,
    check_engines,
    check_experts,
    check_vocabulary,
    scorer_notices,
)
from workers.protocol import Prompt

ACTOR = "actor_rollout_ref.actor"
MEGATRON = f"{ACTOR}.megatron"
QWEN2 = Qwen2Config(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
QWEN3_MOE = Qwen3MoeConfig(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, num_experts=6)


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


def engines(tmp_path: Path, model: PreTrainedConfig, *overrides: str) -> None:
    """`check_engines` for a model that is only a config.json, trained and referred to by Megatron."""
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    keys = [f"actor_rollout_ref.model.path={tmp_path}", f"{ACTOR}.strategy=megatron", f"{ACTOR}.use_kl_loss=true"]
    check_engines(load_config(["data.train_files=none", "algorithm.adv_estimator=grpo", *keys, *overrides]))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            [f"{MEGATRON}.tensor_model_parallel_size=4"],
            "size=4 does not divide the model's num_key_value_heads=2: set it to 2$",
        ),
        (
            [f"{MEGATRON}.pipeline_model_parallel_size=3"],
            "size=3 .* does not divide the model's num_hidden_layers=4: set the first to 1$",
        ),
        (
            [
                f"{MEGATRON}.pipeline_model_parallel_size=2",
                f"{MEGATRON}.virtual_pipeline_model_parallel_size=4",
            ],
            "virtual_pipeline_model_parallel_size=4 does not divide the model's num_hidden_layers=4",
        ),
        (
            [
                "+actor_rollout_ref.model.override_config.num_attention_heads=5",
                f"{MEGATRON}.tensor_model_parallel_size=2",
            ],
            "num_attention_heads=5",
        ),
    ],
)
def test_models_that_megatron_cannot_cut_so(tmp_path: Path, overrides: list[str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        engines(tmp_path, QWEN2, *overrides)
    assert str(error.value).startswith(f"{MEGATRON}.")
    assert len(str(error.value).splitlines()) == 1, "the reference's mistake is the actor's"


def test_an_architecture_without_a_table_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{ACTOR}\.strategy=megatron does not know the architecture 'gpt2'.*qwen2"):
        engines(tmp_path, GPT2Config())


def test_experts_are_trained_by_megatron(tmp_path: Path) -> None:
    engines(tmp_path, QWEN3_MOE, f"{MEGATRON}.expert_model_parallel_size=2")
    with pytest.raises(
        ValueError, match=rf"^{MEGATRON}\.expert_model_parallel_size=4 does not divide .* num_experts=6"
    ):
        engines(tmp_path, QWEN3_MOE, f"{MEGATRON}.expert_model_parallel_size=4")
    with pytest.raises(ValueError, match=r"^actor_rollout_ref\.model\.path=.*: a mixture of 6 experts"):
        engines(tmp_path, QWEN3_MOE, f"{ACTOR}.strategy=fsdp")


def test_a_key_that_holds_for_every_role_is_named_where_it_is(tmp_path: Path) -> None:
    QWEN3_MOE.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    keys = [f"actor_rollout_ref.model.path={tmp_path}", "critic.strategy=megatron", "algorithm.adv_estimator=gae"]
    cut = ["critic.megatron.tensor_model_parallel_size=2", f"{MEGATRON}.sequence_parallel=false"]
    with pytest.raises(ValueError, match=rf"{MEGATRON}\.sequence_parallel=False") as error:
        check_engines(load_config(["data.train_files=none", *keys, *cut, f"{ACTOR}.strategy=megatron"]))
    assert "critic.megatron.sequence_parallel" not in str(error.value), "there is no such key"


def test_megatron_reads_safetensors_only(tmp_path: Path) -> None:
    QWEN2.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    keys = [f"actor_rollout_ref.model.path={tmp_path}", "critic.strategy=megatron"]
    with pytest.raises(ValueError, match=rf"^critic\.strategy=megatron reads safetensors, and {tmp_path} has none"):
        check_engines(load_config(["data.train_files=none", *keys]))


def test_megatron_reads_the_files_that_hugging_face_names(tmp_path: Path) -> None:
    QWEN2.save_pretrained(tmp_path)
    keys = [f"actor_rollout_ref.model.path={tmp_path}", "critic.strategy=megatron", "data.train_files=none"]
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(ValueError, match=r"reads safetensors, and .* has none"):
        check_engines(load_config(keys))
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = {"weight_map": {"a": files[0], "b": files[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / files[0]).touch()
    with pytest.raises(ValueError, match=rf"lacks 1 of the 2 files that its index names \({files[1]}\)"):
        check_engines(load_config(keys))
    (tmp_path / files[1]).touch()
    check_engines(load_config(keys))


def test_each_role_is_asked_about_its_own_model(tmp_path: Path) -> None:
    critic = tmp_path / "critic"
    Qwen2Config(num_hidden_layers=3).save_pretrained(critic)
    (critic / "model.safetensors").touch()
    cut = [f"{MEGATRON}.pipeline_model_parallel_size=2", "algorithm.adv_estimator=gae", f"critic.model.path={critic}"]
    with pytest.raises(
        ValueError, match=r"^critic\.megatron\.pipeline_model_parallel_size=2 .*layers=3: set the first to 1$"
    ):
        engines(tmp_path, QWEN2, *cut)
    engines(tmp_path, QWEN2, *cut, "critic.strategy=fsdp")


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_mixtures_of_experts_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=r"model\.path=m: a mixture of 8 experts.*strategy=megatron"):
        check_experts({key: 8}, "m")
    check_experts({key: None}, "m")
    check_experts(Qwen2Config().to_dict(), "m")


def test_a_tokenizer_of_another_model_is_refused() -> None:
    check_vocabulary([[1, 2], [99]], 100, "data.train_files", "t")
    with pytest.raises(ValueError, match=r"data\.train_files: prompt 1 has token id 100, .*vocabulary of 100.*path=t"):
        check_vocabulary([[1, 2], [3, 100]], 100, "data.train_files", "t")


def prompts(*rows: tuple[str, str | None]) -> PromptDataset:
    """Of (data source, ground truth)."""
    made = [Prompt(index, (1,), source, truth, {}) for index, (source, truth) in enumerate(rows)]
    return PromptDataset(made, 0, 0, ())


def test_built_in_scorers_need_something_to_compare_with() -> None:
    cfg = load_config(["data.train_files=none", "actor_rollout_ref.model.path=m"])
    own = load_config(
        ["data.train_files=none", "actor_rollout_ref.model.path=m", "reward.custom_reward_function.path=r.py"]
    )
    rows = prompts(("", "1"), ("", None))
    with pytest.raises(ValueError, match=r"^data\.val_files: 1 of 2 rows have no ground truth, .*data\.answer_key"):
        check_answers(cfg, rows, "data.val_files")
    check_answers(own, rows, "data.val_files")
    check_answers(cfg, prompts(("", "1")), "data.val_files")


def test_a_data_source_without_a_scorer_of_its_own_is_told() -> None:
    cfg = load_config(["data.train_files=none", "actor_rollout_ref.model.path=m"])
    assert list(scorer_notices(cfg, prompts(("", "1"), ("openai/gsm8k", "2")))) == []
    (notice,) = scorer_notices(cfg, prompts(("math_dapo", "1"), ("openai/gsm8k", "2")))
    assert notice.startswith(
        "data.reward_fn_key=data_source: no built-in scorer for math_dapo (there is one for openai"
    )
