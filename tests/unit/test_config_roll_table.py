"""Every key of ROLL's has exactly one rule, and each rule does what it says; docs/roll.md shows the same rules."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from trainer.config.keys import known_keys
from trainer.config.roll.check import rule_of
from trainer.config.roll.defaults import DEFAULTS
from trainer.config.roll.document import PAGE, with_tables
from trainer.config.roll.read import RollFile, read_roll
from trainer.config.roll.rules import Rule, is_quiet
from trainer.config.roll.table import TOP
from trainer.config.roll.table_roles import ROLES
from trainer.config.roll.table_strategies import FSDP2, MEGATRON, VLLM
from trainer.config.roll.translate import translate_roll
from trainer.config.roll.tree import Translation

DATA = Path(__file__).resolve().parents[1] / "data" / "roll"
KEYS: dict[str, Any] = json.loads((DATA / "keys.json").read_text(encoding="utf-8"))
"""The fields of ROLL's configuration classes at commit 8eb27cc."""

GIVEN = {"reward.custom_reward_function.path": "my_reward.py"}
FREE = {"checkpoint_config", "tracker_kwargs", "system_envs"}
SECTIONS = {
    "": ("rollout_mock", "dataset_filter"),
    "role": (
        "model_args",
        "training_args",
        "data_args",
        "generating_args",
        "strategy_args",
        "sequence_packing_args",
        "router_replay",
    ),
}


def role_keys() -> Iterator[str]:
    for name in KEYS["worker"]:
        if name in SECTIONS["role"]:
            yield from (f"{name}.{below}" for below in KEYS[name])
        elif name not in FREE:
            yield name


def all_keys() -> list[str]:
    keys = [name for name in KEYS["top"] if name not in {*ROLES, *FREE, *SECTIONS[""], "train_infer_correction"}]
    keys += [f"{section}.{name}" for section in SECTIONS[""] for name in KEYS[section]]
    keys += [f"train_infer_correction.is_weight.{name}" for name in KEYS["is_weight"]]
    keys += [
        "train_infer_correction.filters",
        "checkpoint_config.output_dir",
        "tracker_kwargs.api_key",
        "system_envs.A",
    ]
    roles = [role for role in ROLES if role != "rewards"]
    keys += [f"{role}.{key}" for role in roles for key in role_keys()]
    reward = [*role_keys(), *(name for name in KEYS["reward"] if name != "query_filter_config")]
    reward += [f"query_filter_config.{name}" for name in KEYS["reward_filter"]]
    return keys + [f"rewards.math.{key}" for key in reward]


def test_every_key_of_roll_has_a_rule() -> None:
    assert [key for key in all_keys() if rule_of(key) is None] == []


def test_every_key_of_the_strategies_has_a_rule() -> None:
    assert set(KEYS["megatron"]) - set(MEGATRON) == set()


def test_every_rule_is_of_a_key_that_roll_has_or_had() -> None:
    named = {rule_key(key) for key in all_keys()}
    had = {
        *(f"{role}.{key}" for role in ROLES for key in HAD_ONCE["role"]),
        *HAD_ONCE["top"],
    }
    ours = set(TOP) | {f"{role}.{key}" for role, rules in ROLES.items() for key in rules}
    assert ours - named - had == set()


HAD_ONCE = {
    "role": (
        "model_args.flash_attn",
        "data_args.dataset_dir",
        "data_args.interleave_probs",
        "data_args.max_samples",
        "use_remove_padding",
        "system_envs.*",
        "eval_steps",
    ),
    "top": (
        "checkpoint_config.type",
        "checkpoint_config.async_upload",
        "checkpoint_config.keep_local_file",
        "tracker_kwargs.project",
        "tracker_kwargs.log_dir",
        "tracker_kwargs.*",
        "system_envs.*",
    ),
}
"""Keys of ROLL's examples that no class of its 0.3 has, and of its free dictionaries."""


def rule_key(key: str) -> str:
    return key.replace("rewards.math.", "rewards.")


def test_defaults_are_of_translated_keys() -> None:
    for key in DEFAULTS:
        rule = rule_of(key) if key != "rewards" else None
        assert key == "rewards" or (rule is not None and rule.kind != "refused"), key


def test_backquoted_names_are_live_keys() -> None:
    known, rules = known_keys(), [*TOP.values(), *VLLM.values()]
    rules += [rule for role in ROLES.values() for rule in role.values()]
    for rule in rules:
        if rule.kind == "translated":
            for name in re.findall(r"`([a-z_]+\.[a-z_.]+)`", rule.text):
                assert name in known.leaves or name in known.sections, (name, rule)


def test_quiet_values_tell_true_from_one() -> None:
    rule = Rule("refused", "", quiet=(1, False))
    assert is_quiet(rule, 1)
    assert is_quiet(rule, False)
    assert not is_quiet(rule, True)
    assert not is_quiet(rule, 0)


def test_the_page_shows_these_rules() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run python -m trainer.config.roll.document"


CRITIC = {"adv_estimator": "gae", "critic.device_mapping": "list(range(0,16))"}
KL = {"use_kl_loss": True}
REWARD_KL = {"add_token_level_kl": True}
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "exp_name": ("other", {}),
    "seed": (7, {}),
    "output_dir": ("there", {"checkpoint_config.output_dir": None}),
    "checkpoint_config.output_dir": ("there", {}),
    "track_with": ("stdout", {}),
    "tracker_kwargs.project": ("mine", {}),
    "max_steps": (7, {}),
    "save_steps": (7, {}),
    "eval_steps": (7, {}),
    "max_ckpt_to_keep": (2, {}),
    "resume_from_checkpoint": (True, {}),
    "rpc_timeout": (60, {}),
    "num_gpus_per_node": (16, {}),
    "model_update_buffer_size_mb": (256, {}),
    "rollout_batch_size": (32, {}),
    "num_return_sequences_in_group": (4, {}),
    "prompt_length": (512, {}),
    "response_length": (512, {}),
    "sequence_length": (5000, {}),
    "ppo_epochs": (2, {}),
    "pretrain": ("org/other", {}),
    "reward_pretrain": ("org/other", CRITIC),
    "adv_estimator": ("grpo", {}),
    "gamma": (0.9, {}),
    "lambd": (0.9, CRITIC),
    "norm_mean_type": ("batch", {}),
    "norm_std_type": ("group", {}),
    "reward_clip": (3, {}),
    "whiten_rewards": (True, {}),
    "whiten_advantages": (False, {}),
    "advantage_clip": (3.0, {}),
    "max_len_mask": (False, {}),
    "difficulty_mask": (False, {}),
    "difficulty_low_threshold": (0.2, {}),
    "difficulty_high_threshold": (0.8, {}),
    "error_max_len_clip": (True, {}),
    "error_max_len_threshold": (100, {"error_max_len_clip": True}),
    "pg_clip": (0.3, {}),
    "use_pg_clip_range": (True, {"pg_clip": 0.3}),
    "pg_clip_low": (0.1, {"use_pg_clip_range": True}),
    "pg_clip_high": (0.3, {"use_pg_clip_range": True}),
    "dual_clip_loss": (False, {}),
    "importance_sampling": ("seq", {}),
    "loss_agg_mode": ("seq-mean-token-sum-norm", {}),
    "entropy_loss_coef": (0.01, {}),
    "use_kl_loss": (True, {}),
    "kl_loss_coef": (0.01, {}),
    "add_token_level_kl": (True, {}),
    "kl_penalty": ("mse", REWARD_KL),
    "init_kl_coef": (0.01, REWARD_KL),
    "target_kl": (0.1, REWARD_KL),
    "kl_horizon": (20000, {**REWARD_KL, "target_kl": 0.1}),
    "max_grad_norm": (0.5, {}),
    "value_clip": (0.2, CRITIC),
    "critic_warmup": (3, CRITIC),
    "train_infer_correction.is_weight.enabled": (True, {}),
    "train_infer_correction.is_weight.weight_type": ("sequence", {"train_infer_correction.is_weight.enabled": True}),
    "train_infer_correction.is_weight.upper_bound": (2.0, {"train_infer_correction.is_weight.enabled": True}),
    "train_infer_correction.filters": ([{"enabled": True}], {}),
    "global_template": ("qwen3", {}),
    "actor_train.worker_cls": ("roll.pipeline.rlvr.actor_pg_worker.ActorPGWorker", {}),
    "actor_train.pg_variant": ("topr", {"actor_train.worker_cls": "a.ActorPGWorker"}),
    "actor_train.training_args.save_hf_model": (True, {}),
    "actor_train.data_args.file_name": (["a.jsonl"], {}),
    "actor_train.data_args.messages": ("chat", {}),
    "actor_train.data_args.prompt": ("text", {"actor_train.data_args.messages": None}),
    "actor_train.data_args.tag": ("source", {}),
    "actor_train.data_args.template": ("qwen3", {}),
    "actor_train.model_args.model_config_kwargs": ({"rope_theta": 1.0}, {}),
    "reference.infer_batch_size": (2, KL),
    "reference.use_dynamic_batching_in_infer": (True, {**KL, "reference.max_tokens_per_microbatch_in_infer": 7000}),
    "reference.max_tokens_per_microbatch_in_infer": (9000, {**KL, "reference.use_dynamic_batching_in_infer": True}),
    "reference.use_sequence_packing": (
        True,
        {**KL, "reference.sequence_packing_args.max_packed_sequence_length_forward": 7000},
    ),
    "reference.sequence_packing_args.max_packed_sequence_length_forward": (
        9000,
        {**KL, "reference.use_sequence_packing": True},
    ),
    "actor_infer.device_mapping": ("list(range(0,8))", {}),
    "actor_infer.strategy_args.strategy_config": ({"max_num_seqs": 7}, {}),
    "actor_infer.model_args.dtype": ("fp16", {}),
    "actor_infer.generating_args.temperature": (0.5, {}),
    "actor_infer.generating_args.top_p": (0.5, {}),
    "actor_infer.generating_args.top_k": (0, {}),
    "validation.data_args.file_name": (["b.jsonl"], {}),
    "validation.generating_args.temperature": (0.5, {}),
    "validation.generating_args.top_p": (0.5, {}),
    "validation.generating_args.top_k": (-1, {}),
    "validation.generating_args.num_return_sequences": (4, {}),
    "rewards.math_rule.world_size": (32, {}),
    "rewards.math_rule.query_filter_config.type": (
        "std_filter",
        {"rewards.math_rule.query_filter_config.filter_args": {"std_threshold": 0}},
    ),
    "rewards.math_rule.query_filter_config.filter_args": (
        {"threshold_down": 0.1, "threshold_up": 0.9},
        {"rewards.math_rule.query_filter_config.type": "mean_filter"},
    ),
}
"""Translated key -> another value than the example's, and what else must be set for it to matter."""

for _role, _needs in (("actor_train", {}), ("critic", CRITIC)):
    _sizes = {f"{_role}.use_dynamic_batching_in_train": True}
    _packed = {f"{_role}.use_sequence_packing": True}
    _values: dict[str, tuple[Any, dict[str, Any]]] = {
        "training_args.learning_rate": (3e-6, {}),
        "training_args.weight_decay": (0.3, {}),
        "training_args.adam_beta1": (0.8, {}),
        "training_args.adam_beta2": (0.95, {}),
        "training_args.lr_scheduler_type": ("cosine", {}),
        "training_args.warmup_steps": (3, {}),
        "training_args.warmup_ratio": (0.1, {}),
        "training_args.per_device_train_batch_size": (2, {}),
        "training_args.gradient_accumulation_steps": (2, {}),
        "use_dynamic_batching_in_train": (True, {f"{_role}.max_tokens_per_microbatch_in_train": 70000}),
        "max_tokens_per_microbatch_in_train": (90000, _sizes),
        "use_sequence_packing": (True, {f"{_role}.sequence_packing_args.max_packed_sequence_length_train": 70000}),
        "sequence_packing_args.max_packed_sequence_length_train": (90000, _packed),
        "model_args.disable_gradient_checkpointing": (True, {}),
    }
    OTHER |= {f"{_role}.{key}": (value, {**_needs, **more}) for key, (value, more) in _values.items()}
for _role, _needs in (("actor_train", {}), ("critic", CRITIC), ("reference", KL)):
    _mapped = {f"{_role}.device_mapping": "0-7"}
    _name = f"{_role}.strategy_args.strategy_name"
    OTHER[f"{_role}.device_mapping"] = ("list(range(0,4))", _needs)
    OTHER[_name] = ("megatron_train" if _role == "critic" else "deepspeed_train", {**_needs, **_mapped})
    OTHER[f"{_role}.strategy_args.strategy_config"] = (
        {"tensor_model_parallel_size": 2},
        {**_needs, **_mapped, _name: "megatron_train"},
    )
    OTHER[f"{_role}.model_args.dtype"] = ("fp32", {**_needs, **_mapped, _name: "megatron_train"})
OTHER["critic.model_args.model_name_or_path"] = ("org/other", CRITIC)

SAID_ELSEWHERE = {
    "model_args.model_name_or_path",  # of the three that must agree: test_one_model
    "worker_cls",  # of rewards: test_config_roll.test_rewards_need_a_function
    "tag_included",  # the same
}


@cache
def example() -> RollFile:
    return read_roll(DATA / "qwen2.5_7b_megatron.yaml")


def translated(changes: dict[str, Any]) -> Translation:
    """The example with changes (dotted key -> value)."""
    nested = copy.deepcopy(example().nested)
    for key, value in changes.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return translate_roll(RollFile(nested, frozenset()), given=GIVEN)


def changed(key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    value, more = OTHER[key]
    without = translated(more).values
    return without, translated({**more, key: value}).values


@pytest.mark.parametrize("key", sorted(OTHER))
def test_a_translated_key_changes_the_result(key: str) -> None:
    rule = rule_of(key)
    assert rule is not None
    assert rule.kind == "translated"
    without, changes = changed(key)
    assert without != changes
    if rule.copies_to is not None:
        assert changes[rule.copies_to] == OTHER[key][0]


def test_every_translated_rule_is_tried() -> None:
    rules = {key: rule for key, rule in TOP.items()}
    rules |= {f"{role}.{key}": rule for role, table in ROLES.items() for key, rule in table.items()}
    tried = {key.replace("rewards.math_rule.", "rewards.") for key in OTHER}
    left = {key for key, rule in rules.items() if rule.kind == "translated"} - tried
    assert {key for key in left if key.partition(".")[2] not in SAID_ELSEWHERE} == set()


def test_one_model() -> None:
    roles = ("actor_train", "actor_infer", "reference")
    same = {f"{role}.model_args.model_name_or_path": "org/other" for role in roles}
    assert translated(same).values["actor_rollout_ref.model.path"] == "org/other"
    with pytest.raises(ValueError, match="start from one checkpoint"):
        translated({**same, "reference.model_args.model_name_or_path": "org/x"})


@pytest.mark.parametrize(
    ("role", "strategy", "key", "value"),
    [
        *(("actor_train", "megatron_train", f"{name}_model_parallel_size", 2) for name in ("tensor", "pipeline")),
        ("actor_train", "megatron_train", "virtual_pipeline_model_parallel_size", 4),
        ("actor_train", "megatron_train", "expert_model_parallel_size", 2),
        ("actor_train", "megatron_train", "sequence_parallel", True),
        ("actor_train", "megatron_train", "optimizer_cpu_offload", True),
        ("actor_train", "megatron_train", "save_hf_model", True),
        ("actor_train", "megatron_train", "lr_scheduler_kwargs", {"min_lr": 1e-7}),
        ("actor_train", "fsdp2_train", "param_dtype", "fp32"),
        ("actor_train", "fsdp2_train", "reshard_after_forward", False),
        ("actor_train", "fsdp2_train", "offload_policy", True),
        ("actor_infer", "vllm", "tensor_parallel_size", 2),
        ("actor_infer", "vllm", "load_format", "auto"),
        ("actor_infer", "vllm", "sleep_level", 2),
        ("actor_infer", "vllm", "gpu_memory_utilization", 0.3),
        ("actor_infer", "vllm", "max_model_len", 9000),
        ("actor_infer", "vllm", "max_num_seqs", 9),
        ("actor_infer", "vllm", "max_num_batched_tokens", 9000),
        ("actor_infer", "vllm", "enforce_eager", True),
        ("actor_infer", "vllm", "enable_prefix_caching", False),
        ("actor_infer", "vllm", "enable_chunked_prefill", False),
        ("actor_infer", "vllm", "quantization", "fp8"),
    ],
)
def test_translated_keys_of_the_strategies(role: str, strategy: str, key: str, value: Any) -> None:
    name, config = f"{role}.strategy_args.strategy_name", f"{role}.strategy_args.strategy_config"
    without = translated({name: strategy, config: {}}).values
    done = translated({name: strategy, config: {key: value}})
    assert {**without} != done.values
    assert any(source.endswith(f"{config}.{key}") for source in done.sources.values())


def test_translated_rules_of_strategies_are_tried() -> None:
    tried = {mark.args[1][number][2] for mark in _marks() for number in range(len(mark.args[1]))}
    for rules in (MEGATRON, FSDP2, VLLM):
        assert {key for key, rule in rules.items() if rule.kind == "translated"} <= tried | {"dtype"}


def _marks() -> list[Any]:
    return test_translated_keys_of_the_strategies.pytestmark  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("key", sorted(key for key, rule in TOP.items() if rule.kind == "refused"))
def test_refused_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"roll.{key}=")):
        translated({key: "something"})


@pytest.mark.parametrize("key", sorted(key for key, rule in TOP.items() if rule.kind == "no effect" and "*" not in key))
def test_keys_without_effect_have_none_and_say_so(key: str) -> None:
    done = translated({key: "something"})
    assert done.values == translated({}).values
    assert any(notice.endswith(TOP[key].text) for notice in done.notices)
