"""Mistakes that users of such trainers make, word for word: both keys are named, and a value that would work.

More of them are in test_config_validate.py (sizes, devices, algorithms), test_config_mapping.py (placement),
test_vllm_passthrough.py (engine arguments) and test_config_load.py (names, types, sections).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import load_config
from trainer.config.model import model_problems, override_problems, unknown_override_notices
from trainer.config.validate import validate

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
OVERRIDE = "actor_rollout_ref.model.override_config"
BASE = ["data.train_files=t.jsonl", "actor_rollout_ref.model.path=org/model"]
GRPO = ["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=8"]
QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
"""Of Qwen2.5-0.5B."""


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    for name in ("tokenizer.json", "model.safetensors"):
        (model / name).touch()
    (tmp_path / "t.jsonl").touch()
    return [f"data.train_files={tmp_path}/t.jsonl", f"actor_rollout_ref.model.path={model}"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [*GRPO, f"{ACTOR}.ppo_micro_batch_size_per_gpu=4096"],
            f"{ACTOR}.ppo_micro_batch_size_per_gpu=4096: larger than the mini-batch of 2048 sequences "
            f"({ACTOR}.ppo_mini_batch_size=256 x {ROLLOUT}.n=8); set it to 256 or smaller, or to null",
        ),
        (
            ["critic.ppo_micro_batch_size_per_gpu=300", "critic.ppo_mini_batch_size=128"],
            "critic.ppo_micro_batch_size_per_gpu=300: larger than the mini-batch of 128 sequences "
            f"(critic.ppo_mini_batch_size=128 x {ROLLOUT}.n=1); set it to 16 or smaller, or to null",
        ),
        (
            ["data.train_max_samples=100"],
            "data.train_max_samples=100: fewer rows than the data.train_batch_size=1024 prompts of one step; set "
            "data.train_max_samples=1024 or larger, or data.train_batch_size=100 or smaller",
        ),
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=6"],
            f"{ROLLOUT}.tensor_model_parallel_size=6: does not divide the 8 devices of the rollout; set it to a "
            f"divisor of 8, e.g. 4, or change {ROLLOUT}.device_mapping or trainer.n_gpus_per_node",
        ),
        (
            [f"{ROLLOUT}.max_model_len=1000"],
            f"{ROLLOUT}.max_model_len=1000: smaller than one sequence of 1024 tokens (data.max_prompt_length=512 + "
            "data.max_response_length=512); set it to at least 1024, or to null",
        ),
        (
            [f"{ROLLOUT}.free_cache_engine=false", f"{ROLLOUT}.gpu_memory_utilization=0.95", "trainer.device=cuda"],
            f"{ROLLOUT}.gpu_memory_utilization=0.95: {ROLLOUT}.free_cache_engine=false keeps vLLM awake, and what it "
            f"leaves of the GPUs is not enough to train in; set {ROLLOUT}.free_cache_engine=true and "
            f"{ROLLOUT}.sleep_level=auto, or {ROLLOUT}.gpu_memory_utilization=0.5 or smaller",
        ),
        (
            [f"{ROLLOUT}.timeout_s=20"],
            f"{ROLLOUT}.hang_timeout_s=30.0: a replica that hangs would be noticed no sooner than {ROLLOUT}.timeout_s="
            f"20.0 ends the call; set {ROLLOUT}.timeout_s=300, or hang_timeout_s below it",
        ),
        (
            ["trainer.critic_warmup=50", "trainer.total_training_steps=50"],
            "trainer.critic_warmup=50: as long as the run, trainer.total_training_steps=50, so the policy would never "
            "be trained; set trainer.critic_warmup=5 or smaller, or more steps",
        ),
    ],
)
def test_keys_that_contradict_each_other(base: list[str], overrides: list[str], message: str) -> None:
    cfg = load_config([*base, *overrides])
    with pytest.raises(ValueError) as error:
        validate(cfg)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "actor_rollout_ref.model=org/model",
            "actor_rollout_ref.model=org/model: actor_rollout_ref.model is a section, not a value; set a key below it, "
            "such as actor_rollout_ref.model.path=org/model",
        ),
        (
            "algorithm=grpo",
            "algorithm=grpo: algorithm is a section, not a value; set a key below it, such as "
            "algorithm.adv_estimator=grpo",
        ),
        (
            f"{ACTOR}.policy_loss=gspo",
            f"{ACTOR}.policy_loss=gspo: {ACTOR}.policy_loss is a section, not a value; set a key below it, such as "
            f"{ACTOR}.policy_loss.loss_mode=gspo",
        ),
        (
            "critic=false",
            "critic=false: critic is a section, not a value; set a key below it, such as critic.enable=false",
        ),
        (
            "critic=null",
            "critic=null: critic is a section, not a value; set a key below it, such as critic.enable",
        ),
    ],
)
def test_a_section_given_as_a_value(override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config([*BASE, override])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("overrides", "notice"),
    [
        (
            [*GRPO, f"{ACTOR}.ppo_micro_batch_size_per_gpu=512"],
            f"{ACTOR}.ppo_micro_batch_size_per_gpu=512 has no effect: each of 8 ranks gets 256 of the 2048 sequences "
            "of a mini-batch",
        ),
        (
            [*GRPO, "data.train_batch_size=4", f"{ACTOR}.ppo_mini_batch_size=4"],
            f"data.train_batch_size=4: fewer prompts than the 8 replicas of {ROLLOUT}.device_mapping / "
            f"{ROLLOUT}.tensor_model_parallel_size, so 4 will idle",
        ),
        (
            [f"{ROLLOUT}.free_cache_engine=false"],
            f"{ROLLOUT}.free_cache_engine=false: on GPUs vLLM keeps {ROLLOUT}.gpu_memory_utilization=0.5 of the memory "
            "while the models train beside it",
        ),
        (
            [*GRPO, f"{ACTOR}.optim.lr_warmup_steps=10", f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1"],
            f"{ACTOR}.optim.lr_warmup_steps_ratio=0.1 has no effect: {ACTOR}.optim.lr_warmup_steps=10, not -1",
        ),
        (
            [*GRPO, f"{ACTOR}.optim.lr_warmup_steps=40", "trainer.total_training_steps=10"],
            f"{ACTOR}.optim.lr_warmup_steps=40: the run ends in its warm-up, after trainer.total_training_steps=10 x 4 "
            f"updates; {ACTOR}.optim.lr is never reached",
        ),
        (
            [*GRPO, f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0"],
            f"{ACTOR}.kl_loss_coef=0.0: {ACTOR}.use_kl_loss=true keeps a reference whose KL weighs nothing",
        ),
        (
            ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0"],
            "algorithm.kl_ctrl.kl_coef=0.0: algorithm.use_kl_in_reward=true keeps a reference whose KL weighs nothing",
        ),
        (
            ["trainer.log_val_generations=4"],
            "trainer.log_val_generations=4 has no effect: data.val_files=null, so there is no validation",
        ),
        (
            ["data.val_batch_size=4"],
            "data.val_batch_size=4 has no effect: data.val_files=null, so there is no validation",
        ),
    ],
)
def test_what_is_allowed_and_may_surprise(base: list[str], overrides: list[str], notice: str) -> None:
    assert validate(load_config([*base, *overrides])) == [notice]


def test_greedy_validation_twice(base: list[str]) -> None:
    val = base[0].replace("train_files", "val_files")
    (notice,) = validate(load_config([*base, val, f"{ROLLOUT}.val_kwargs.greedy=true"]))
    assert notice == (
        f"{ROLLOUT}.val_kwargs.greedy=true measures the same as {ROLLOUT}.val_kwargs.temperature=0.0 once more; "
        f"set {ROLLOUT}.val_kwargs.temperature=1.0 for both, or greedy=false"
    )


def of_model(*overrides: str, **fields: Any) -> list[str]:
    return list(model_problems(load_config([*BASE, *overrides]), QWEN | fields))


@pytest.mark.parametrize(
    ("overrides", "fields", "message"),
    [
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=4"],
            {},
            f"{ROLLOUT}.tensor_model_parallel_size=4: does not divide the model's num_attention_heads=14; set "
            f"{ROLLOUT}.tensor_model_parallel_size=2, or use another model",
        ),
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=8"],
            {"num_attention_heads": 24, "num_key_value_heads": 6},
            f"{ROLLOUT}.tensor_model_parallel_size=8: does not divide the model's num_key_value_heads=6; set "
            f"{ROLLOUT}.tensor_model_parallel_size=2, or use another model",
        ),
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=2"],
            {"intermediate_size": 4865},
            f"{ROLLOUT}.tensor_model_parallel_size=2: does not divide the model's intermediate_size=4865; set "
            f"{ROLLOUT}.tensor_model_parallel_size=1, or use another model",
        ),
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=3"],
            {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 4866, "vocab_size": 1000},
            f"{ROLLOUT}.tensor_model_parallel_size=3: does not divide the model's vocab_size=1000; set "
            f"{ROLLOUT}.tensor_model_parallel_size=1, or use another model",
        ),
        (
            ["data.max_response_length=3584"],
            {"max_position_embeddings": 2048},
            "actor_rollout_ref.model.path=org/model: the model has max_position_embeddings=2048, less than one "
            "sequence of 4096 tokens (data.max_prompt_length=512 + data.max_response_length=3584); set "
            "data.max_response_length=1536 or smaller, or, if the model bears it, "
            f"{OVERRIDE}.max_position_embeddings=4096, or {OVERRIDE}.rope_scaling.rope_type=yarn with "
            f"{OVERRIDE}.rope_scaling.factor=2",
        ),
        (
            [f"{ROLLOUT}.max_model_len=4096"],
            {"max_position_embeddings": 2048},
            f"{ROLLOUT}.max_model_len=4096: the model has max_position_embeddings=2048; set {ROLLOUT}.max_model_len="
            f"null, or, if the model bears it, {OVERRIDE}.max_position_embeddings=4096, or "
            f"{OVERRIDE}.rope_scaling.rope_type=yarn with {OVERRIDE}.rope_scaling.factor=2",
        ),
        (
            [f"{ROLLOUT}.kv_cache_gb=0.01"],
            {},
            f"{ROLLOUT}.kv_cache_gb=0.01: does not hold one sequence of 1024 tokens ({ROLLOUT}.max_model_len, or "
            "data.max_prompt_length + data.max_response_length), 0.012 GiB; set it to 0.024 or larger, or make "
            "sequences shorter",
        ),
    ],
)
def test_what_the_model_contradicts(overrides: list[str], fields: dict[str, Any], message: str) -> None:
    assert of_model(*overrides, **fields) == [message]


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        ([], {}),
        ([f"{ROLLOUT}.tensor_model_parallel_size=2", f"{ROLLOUT}.kv_cache_gb=0.01"], {}),  # half of it on each device
        ([f"{ROLLOUT}.tensor_model_parallel_size=8"], {"num_attention_heads": 16, "num_key_value_heads": 2}),  # copies
        ([f"{ROLLOUT}.tensor_model_parallel_size=8"], {"num_attention_heads": 16, "vocab_size": 151937}),  # padded
        (["data.max_response_length=99999"], {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
        (["data.max_response_length=60000"], {"rope_scaling": {"type": "linear", "factor": 2}}),
        (["data.max_response_length=99999"], {"rope_scaling": {"rope_type": "one_of_tomorrow", "factor": 4.0}}),
        (["data.max_response_length=99999"], {"max_position_embeddings": None}),
        ([f"{ROLLOUT}.kv_cache_gb=0.01"], {"kv_lora_rank": 512}),
    ],
)
def test_what_a_model_bears(overrides: list[str], fields: dict[str, Any]) -> None:
    assert of_model(*overrides, **fields) == []


@pytest.mark.parametrize(("size", "fits"), [(16, 4), (3, 2), (5, 4)])
def test_a_divisor_is_proposed_that_cuts_the_model_too(base: list[str], size: int, fits: int) -> None:
    config = Path(base[1].partition("=")[2]) / "config.json"
    config.write_text(json.dumps({"model_type": "qwen2", "num_attention_heads": 28, "num_key_value_heads": 4}))
    with pytest.raises(ValueError) as error:
        validate(load_config([*base, *GRPO, f"{ROLLOUT}.tensor_model_parallel_size={size}"]))
    assert f"set it to a divisor of 8, e.g. {fits}, or change" in str(error.value)


NO_FIELD = "the checkpoint's config has no such field, so it changes nothing unless the model's code looks for it"


def test_overrides_that_no_config_has() -> None:
    known = {"max_position_embeddings": 1, "num_hidden_layers": 2}
    given = {"num_hidden_layer": 2, "num_hidden_layers": 2, "rope_scaling": {}, "rope_theta": 5.0, "zzz": None}
    assert list(unknown_override_notices(given, known)) == [
        f"{OVERRIDE}.num_hidden_layer=2: {NO_FIELD}; did you mean {OVERRIDE}.num_hidden_layers?",
        f"{OVERRIDE}.zzz=null: {NO_FIELD}",
    ]
    cfg = load_config([*BASE, *GRPO, f"+{OVERRIDE}.rope_scaling=4"])
    assert next(iter(override_problems(cfg))).startswith(f"{OVERRIDE}.rope_scaling=4: must be a dictionary; set ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rope_scaling.rope_type=[a]", "rope_scaling.rope_type=[a]: must be text; choose one of default, "),
        ("rope_parameters.type=3", "rope_parameters.type=3: must be text; choose one of default, "),
        ("rope_scaling.factor=abc", 'rope_scaling.factor="abc": must be a number of at least 1; set '),
        ("rope_scaling.factor='2'", 'rope_scaling.factor="2": must be a number of at least 1; set '),
        ("rope_scaling.factor=true", "rope_scaling.factor=true: must be a number of at least 1; set "),
        ("rope_scaling.factor=0.5", "rope_scaling.factor=0.5: must be a number of at least 1; set "),
        (
            "rope_scaling.original_max_position_embeddings=abc",
            'rope_scaling.original_max_position_embeddings="abc": must be a number of at least 1; set ',
        ),
    ],
)
def test_scalings_that_nobody_can_read(given: str, message: str) -> None:
    cfg = load_config([*BASE, *GRPO, f"+{OVERRIDE}.{given}"])
    (problem,) = override_problems(cfg)
    assert problem.startswith(f"{OVERRIDE}.{message}")


def test_values_that_the_models_config_does_not_take(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    from trainer.inputs import read_config

    Qwen2Config().save_pretrained(tmp_path)
    cfg = load_config([*BASE, *GRPO, f"+{OVERRIDE}.num_attention_heads=abc"])
    with pytest.raises(ValueError, match=r"override_config=\{num_attention_heads: abc\}: the .*expected int"):
        read_config(cfg.actor_rollout_ref.model, str(tmp_path), "actor_rollout_ref.model.path")


def test_the_models_config_is_asked_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the front door of a run's inputs, together: tensor parallelism and length."""
    from trainer import inputs

    class Fields:
        def to_dict(self) -> dict[str, Any]:
            return QWEN | {"max_position_embeddings": 600}

    monkeypatch.setattr(inputs, "read_config", lambda *_: Fields())
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"^2 problems in the configuration:\n") as error:
        inputs.load_inputs(load_config([*BASE, f"{ROLLOUT}.tensor_model_parallel_size=4"]))
    assert "max_position_embeddings=600" in str(error.value) and "num_attention_heads=14" in str(error.value)
