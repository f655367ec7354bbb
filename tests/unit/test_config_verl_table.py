"""Every key that verl ever had is in exactly one class, and its defaults go through."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from verl_keys import keys_of_scripts, leaves, tree

from trainer.algorithms.policy.build import parameters
from trainer.config.keys import known_keys
from trainer.config.load import CONFIG_DIR, load_config
from trainer.config.verl.classify import matching_rules, moved_key, place_of
from trainer.config.verl.decisions import LOSS_PARAMS
from trainer.config.verl.rules import Kind
from trainer.config.verl.tables import MOVED, RULES
from trainer.config.verl.translate import translate_nested
from trainer.config.verl.values import DECISIONS, VALUES

ALL = sorted({*leaves("ppo_trainer", "ppo_megatron_trainer", "older"), *keys_of_scripts()})
WRITTEN_BY_USERS = (
    "model_engine",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype",
    "actor_rollout_ref.actor.fsdp_config.wrap_policy.transformer_layer_cls_to_wrap",
    "actor_rollout_ref.actor.optim.override_optimizer_config.eps",
    "actor_rollout_ref.actor.veomni.param_offload",
    "custom_reward_function.reward_kwargs.threshold",
    "reward_model.overlong_buffer.len",
    "ray_kwargs.ray_init.runtime_env.env_vars.NAME",
    "ray_kwargs.ray_init.runtime_env.env_vars.TRANSFER_QUEUE_ENABLE",
    "actor_rollout_ref.actor.model_engine",
    "ray_kwargs.ray_init.num_gpus",
)
"""Neither in a tree nor in an example that is stored, but in verl's documentation."""

DEAD = (
    "actor.grad_clip",
    "critic.grad_clip",
    "nccl_timeout",
    "hybrid_engine",
    "actor.freeze_vision_tower",
    "actor.use_prefix_grouper",
    "actor.calculate_sum_pi_squared",
    "actor.router_replay.replay_file",
    "rollout.over_sample_rate",
    "rollout.multi_stage_wake_up",
    "rollout.skip_tokenizer_init",
    "rollout.agent.custom_async_server.path",
    "rollout.multi_turn.num_repeat_rollouts",
    "rollout.multi_turn.use_inference_chat_template",
    "rollout.multi_turn.tokenization_sanity_check_mode",
    "rollout.multi_turn.enable",
    "critic.forward_micro_batch_size",
    "critic.forward_micro_batch_size_per_gpu",
    "critic.forward_max_token_len_per_gpu",
    "data.return_raw_input_ids",
    "data.return_full_prompt",
    "trainer.balance_batch",
    "trainer.esi_redundant_time",
    "trainer.ray_wait_register_center_timeout",
    "actor.checkpoint.async_save",
)
"""Keys that do nothing in verl itself."""


def test_the_lists_are_whole() -> None:
    assert len(leaves("ppo_trainer")) == 897
    assert len(ALL) > 1300


@pytest.mark.parametrize("section", sorted({key.partition(".")[0] for key in ALL}))
def test_exactly_one_row_decides_each_key(section: str) -> None:
    known = known_keys()
    for key in ALL:
        if key.partition(".")[0] == section:
            place = place_of(key)
            assert place is not None, f"{key} is in no class"
            assert len(matching_rules(key)) <= 1, key
            assert place.rule is not None or place.key in known.leaves or known.is_free(place.key), key


def test_every_row_decides_a_key() -> None:
    used = {id(rule) for key in (*ALL, *WRITTEN_BY_USERS) for rule in matching_rules(key)}
    assert [rule.pattern for rule in RULES if id(rule) not in used] == []
    moved = {old for old in MOVED for key in (*ALL, *WRITTEN_BY_USERS) if key == old or key.startswith(f"{old}.")}
    passed_through = {old for old in MOVED if ".engine_kwargs.vllm." in old}
    assert set(MOVED) - moved - passed_through == {"trainer.n_devices_per_node"}


def test_a_row_decides_nothing_that_lives_here() -> None:
    assert [key for key in known_keys().leaves if matching_rules(key) or moved_key(key) != key] == []


def test_every_refusal_says_why_and_what_to_do() -> None:
    for rule in RULES:
        assert rule.why or rule.kind is Kind.ALIAS, rule.pattern
        assert rule.remedy or rule.kind is not Kind.REFUSED or rule.decide is not None, rule.pattern


def test_aliases_lead_to_keys_that_live_here() -> None:
    known = known_keys()
    for key in (*ALL, *WRITTEN_BY_USERS):
        place = place_of(key)
        assert place is not None, key
        if place.rule is not None and place.kind is Kind.ALIAS and place.rule.decide is None:
            target = place.rule.target(place.key)
            assert target in known.leaves or known.is_free(target), f"{key} -> {target}"


def test_values_are_those_of_keys_that_live_here() -> None:
    assert {*VALUES, *DECISIONS} <= known_keys().leaves


def test_parameters_of_losses_are_those_that_the_losses_take() -> None:
    for name, mode in LOSS_PARAMS.items():
        assert name in parameters(mode)


@pytest.mark.parametrize("name", ["ppo_trainer", "ppo_megatron_trainer"])
def test_a_whole_tree_of_verls_is_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("ppo_trainer",) if name == "ppo_trainer" else ("ppo_trainer", name)
    whole = tree(*names)
    whole["actor_rollout_ref"]["rollout"]["name"] = "vllm"  # ??? in verl
    whole["data"]["val_files"] = None
    (tmp_path / "mine.yaml").write_text(f"defaults: [{name}, _self_]\n{yaml.safe_dump(whole)}")
    cfg = load_config([], "mine", config_dir=tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert len(told) < 100
    assert max(map(len, told)) < 1000
    assert cfg.actor_rollout_ref.rollout.tensor_model_parallel_size == 2
    assert cfg.actor_rollout_ref.actor.strategy == ("fsdp" if name == "ppo_trainer" else "megatron")
    assert cfg.actor_rollout_ref.actor.policy_loss.loss_mode == "ppo"
    assert cfg.actor_rollout_ref.actor.policy_loss.params == {}
    assert cfg.actor_rollout_ref.model.tokenizer_path == cfg.actor_rollout_ref.model.path
    assert cfg.actor_rollout_ref.rollout.update_weights_bucket_megabytes == 2048
    assert cfg.algorithm.filter_groups.max_num_gen_batches == 1000
    assert cfg.trainer.experiment_name == "gsm8k"


def test_defaults_of_older_releases_ask_for_nothing() -> None:
    base = OmegaConf.load(CONFIG_DIR / "ppo_trainer.yaml")
    base.pop("hydra")
    nested = OmegaConf.to_container(OmegaConf.merge(base, OmegaConf.create(tree("older"))))
    assert isinstance(nested, dict)
    report = translate_nested(nested)
    assert report.problems == []


@pytest.mark.parametrize("short", DEAD)
def test_keys_without_effect_in_verl_are_accepted_and_told(short: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = short if short.startswith(("critic", "data", "trainer")) else f"actor_rollout_ref.{short}"
    value = leaves("ppo_trainer")[key]
    text = "null" if value is None or "${" in str(value) else str(value)
    load_config(["data.train_files=a.jsonl", "actor_rollout_ref.model.path=org/m", f"{key}={text}"])
    assert "note: without effect, " in (told := capsys.readouterr().err)
    assert key in told
