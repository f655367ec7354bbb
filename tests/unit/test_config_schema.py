"""The YAML and the schema say the same, and the YAML's defaults are the documented ones."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from trainer.config import schema
from trainer.config.keys import known_keys
from trainer.config.load import CONFIG_DIR, load_config
from trainer.config.schema import Config

YAML = CONFIG_DIR / "ppo_trainer.yaml"
BASE = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model"]
MEGATRON_OF_ONE_RUN = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 3,
    "virtual_pipeline_model_parallel_size": 4,
    "expert_model_parallel_size": 5,
    "dtype": "float32",
}
"""What the reference and the critic take from the actor unless told otherwise, and other values than the defaults."""


@cache
def default_config() -> Config:
    return load_config(BASE)


def yaml_keys(tree: Any, prefix: str = "") -> tuple[set[str], set[str]]:
    """Return leaves and sections of a nested dictionary; an empty dictionary is a leaf."""
    leaves: set[str] = set()
    sections: set[str] = set()
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            sections.add(f"{prefix}{name}")
            below = yaml_keys(value, f"{prefix}{name}.")
            leaves |= below[0]
            sections |= below[1]
        else:
            leaves.add(f"{prefix}{name}")
    return leaves, sections


def raw_yaml() -> dict[str, Any]:
    raw = OmegaConf.to_container(OmegaConf.load(YAML), resolve=False)
    return {name: value for name, value in raw.items() if name not in ("defaults", "hydra")}


def yaml_values(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from yaml_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def lookup(cfg: BaseModel, key: str) -> Any:
    value: Any = cfg
    for name in key.split("."):
        value = vars(value)[name]
    return value


def test_yaml_and_schema_have_the_same_keys() -> None:
    leaves, sections = yaml_keys(raw_yaml())
    assert leaves == known_keys().leaves
    assert sections == known_keys().sections


def test_fewer_than_200_keys() -> None:
    assert len(known_keys().leaves) < 200


def test_no_defaults_in_python() -> None:
    models = [item for item in vars(schema).values() if isinstance(item, type) and issubclass(item, BaseModel)]
    defaults = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not field.is_required()
    ]
    assert defaults == []


def test_every_section_has_a_docstring_and_is_frozen() -> None:
    cfg = load_config(BASE)
    for section in known_keys().sections:
        assert type(lookup(cfg, section)).__doc__, section
    with pytest.raises(ValidationError):
        cfg.data.seed = 2  # type: ignore[misc]


def test_every_interpolation_reaches_the_intended_key() -> None:
    expected = {
        "actor_rollout_ref.model.tokenizer_path": "actor_rollout_ref.model.path",
        "actor_rollout_ref.actor.clip_ratio_low": "actor_rollout_ref.actor.clip_ratio",
        "actor_rollout_ref.actor.clip_ratio_high": "actor_rollout_ref.actor.clip_ratio",
        "actor_rollout_ref.ref.device_mapping": "actor_rollout_ref.actor.device_mapping",
        "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
        "actor_rollout_ref.ref.fsdp_config.dtype": "actor_rollout_ref.actor.fsdp_config.dtype",
        "critic.device_mapping": "actor_rollout_ref.actor.device_mapping",
        "critic.model.path": "actor_rollout_ref.model.path",
        "critic.ppo_mini_batch_size": "actor_rollout_ref.actor.ppo_mini_batch_size",
        "critic.ppo_epochs": "actor_rollout_ref.actor.ppo_epochs",
        "critic.shuffle": "actor_rollout_ref.actor.shuffle",
        "critic.loss_agg_mode": "actor_rollout_ref.actor.loss_agg_mode",
        "critic.fsdp.dtype": "actor_rollout_ref.actor.fsdp_config.dtype",
        **{f"{role}.strategy": "actor_rollout_ref.actor.strategy" for role in ("actor_rollout_ref.ref", "critic")},
        **{
            f"{role}.megatron.{name}": f"actor_rollout_ref.actor.megatron.{name}"
            for role in ("actor_rollout_ref.ref", "critic")
            for name in MEGATRON_OF_ONE_RUN
        },
    }
    changed = {
        "actor_rollout_ref.model.path": "other/model",
        "actor_rollout_ref.actor.clip_ratio": 0.1,
        "actor_rollout_ref.actor.device_mapping": "0-1",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 999,
        "actor_rollout_ref.actor.fsdp_config.dtype": "float32",
        "actor_rollout_ref.actor.fsdp_config.wrap_min_num_params": 77,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 33,
        "actor_rollout_ref.actor.ppo_epochs": 5,
        "actor_rollout_ref.actor.shuffle": True,
        "actor_rollout_ref.actor.loss_agg_mode": "token-sum",
        "actor_rollout_ref.actor.strategy": "megatron",
        **{f"actor_rollout_ref.actor.megatron.{name}": value for name, value in MEGATRON_OF_ONE_RUN.items()},
    }
    interpolated = {key for key, value in yaml_values(raw_yaml()) if "${" in str(value)}
    assert interpolated == {*expected, "trainer.default_local_dir"}
    cfg = load_config([*BASE, *(f"{key}={value}" for key, value in changed.items())])
    for key, source in expected.items():
        assert lookup(cfg, key) == changed[source], key


def test_run_directory_is_named_after_project_and_experiment() -> None:
    cfg = load_config([*BASE, "trainer.project_name=p", "trainer.experiment_name=e"])
    assert Path(cfg.trainer.default_local_dir) == Path("runs/p/e")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.train_batch_size", 1024),
        ("data.max_prompt_length", 512),
        ("data.max_response_length", 512),
        ("data.prompt_key", "prompt"),
        ("data.reward_fn_key", "data_source"),
        ("data.shuffle", True),
        ("data.truncation", "error"),
        ("data.filter_overlong_prompts", False),
        ("actor_rollout_ref.model.enable_gradient_checkpointing", "auto"),
        ("actor_rollout_ref.model.override_config", {}),
        ("actor_rollout_ref.actor.strategy", "fsdp"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", 256),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", None),
        ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu", 16384),
        ("actor_rollout_ref.actor.ppo_epochs", 1),
        ("actor_rollout_ref.actor.shuffle", False),
        ("actor_rollout_ref.actor.data_loader_seed", 42),
        ("actor_rollout_ref.actor.clip_ratio_low", 0.2),
        ("actor_rollout_ref.actor.clip_ratio_high", 0.2),
        ("actor_rollout_ref.actor.clip_ratio_c", 3.0),
        ("actor_rollout_ref.actor.loss_agg_mode", "token-mean"),
        ("actor_rollout_ref.actor.entropy_coeff", 0.0),
        ("actor_rollout_ref.actor.use_kl_loss", False),
        ("actor_rollout_ref.actor.kl_loss_coef", 0.001),
        ("actor_rollout_ref.actor.kl_loss_type", "low_var_kl"),
        ("actor_rollout_ref.actor.optim.lr", 1e-6),
        ("actor_rollout_ref.actor.optim.weight_decay", 0.01),
        ("actor_rollout_ref.actor.optim.betas", (0.9, 0.999)),
        ("actor_rollout_ref.actor.optim.clip_grad", 1.0),
        ("actor_rollout_ref.actor.optim.lr_scheduler_type", "constant"),
        ("actor_rollout_ref.actor.optim.lr_warmup_steps", -1),
        ("actor_rollout_ref.actor.megatron.tensor_model_parallel_size", 1),
        ("actor_rollout_ref.actor.megatron.pipeline_model_parallel_size", 1),
        ("actor_rollout_ref.actor.megatron.sequence_parallel", True),
        ("actor_rollout_ref.actor.fsdp_config.model_dtype", "fp32"),
        ("actor_rollout_ref.actor.fsdp_config.dtype", "bfloat16"),
        ("actor_rollout_ref.actor.fsdp_config.reshard_after_forward", "auto"),
        ("actor_rollout_ref.actor.checkpoint.save_contents", ("model", "optimizer", "extra")),
        ("actor_rollout_ref.rollout.n", 1),
        ("actor_rollout_ref.rollout.temperature", 1.0),
        ("actor_rollout_ref.rollout.top_p", 1.0),
        ("actor_rollout_ref.rollout.top_k", -1),
        ("actor_rollout_ref.rollout.seed", 42),
        ("actor_rollout_ref.rollout.dtype", "bfloat16"),
        ("actor_rollout_ref.rollout.max_model_len", None),
        ("actor_rollout_ref.rollout.max_num_seqs", 256),
        ("actor_rollout_ref.rollout.max_num_batched_tokens", 8192),
        ("actor_rollout_ref.rollout.enforce_eager", False),
        ("actor_rollout_ref.rollout.free_cache_engine", True),
        ("actor_rollout_ref.rollout.gpu_memory_utilization", 0.5),
        ("actor_rollout_ref.rollout.load_format", "dummy"),
        ("actor_rollout_ref.rollout.engine_kwargs.vllm", {}),
        ("actor_rollout_ref.rollout.val_kwargs.temperature", 0.0),
        ("actor_rollout_ref.rollout.val_kwargs.n", 1),
        ("critic.enable", None),
        ("critic.optim.lr", 1e-5),
        ("critic.ppo_max_token_len_per_gpu", 32768),
        ("critic.cliprange_value", 0.5),
        ("reward.custom_reward_function.path", None),
        ("reward.custom_reward_function.name", "compute_score"),
        ("algorithm.adv_estimator", "gae"),
        ("algorithm.gamma", 1.0),
        ("algorithm.lam", 1.0),
        ("algorithm.norm_adv_by_std_in_grpo", True),
        ("algorithm.use_kl_in_reward", False),
        ("algorithm.kl_penalty", "kl"),
        ("algorithm.kl_ctrl.type", "fixed"),
        ("algorithm.kl_ctrl.kl_coef", 0.001),
        ("algorithm.kl_ctrl.horizon", 10000),
        ("algorithm.kl_ctrl.target_kl", 0.1),
        ("trainer.total_epochs", 30),
        ("trainer.total_training_steps", None),
        ("trainer.nnodes", 1),
        ("trainer.n_gpus_per_node", 8),
        ("trainer.save_freq", -1),
        ("trainer.test_freq", -1),
        ("trainer.val_before_train", True),
        ("trainer.resume_mode", "auto"),
        ("trainer.critic_warmup", 0),
    ],
)
def test_defaults_are_those_users_of_verl_know(key: str, value: object) -> None:
    assert lookup(default_config(), key) == value


def test_derived_facts() -> None:
    cfg = load_config(BASE)
    assert (cfg.use_critic, cfg.use_reference, cfg.max_sequence_length, cfg.num_devices) == (True, False, 1024, 8)
    cfg = load_config([*BASE, "algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.use_kl_loss=true"])
    assert (cfg.use_critic, cfg.use_reference) == (False, True)
    assert load_config([*BASE, "algorithm.adv_estimator=grpo", "critic.enable=true"]).use_critic
    assert load_config([*BASE, "algorithm.use_kl_in_reward=true"]).use_reference


def test_a_config_can_be_pickled_and_dumped() -> None:
    cfg = load_config(BASE)
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert Config.model_validate(OmegaConf.to_container(OmegaConf.create(cfg.model_dump(mode="json")))) == cfg
