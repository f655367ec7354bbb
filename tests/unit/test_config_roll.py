"""ROLL's YAML files: what they become here, and the message for what cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config.keys import known_keys
from trainer.config.load import load_config
from trainer.config.roll.command_line import expand_roll, to_overrides
from trainer.config.roll.convert import convert
from trainer.config.roll.engines import read_mapping, show_ranks
from trainer.config.roll.translate import translate_file
from trainer.config.roll.tree import Translation
from trainer.config.schema import Config

DATA = Path(__file__).resolve().parents[1] / "data" / "roll"
EXAMPLES = ("qwen2.5_7b_megatron", "qwen3_8b_fsdp2", "qwen2.5_7b_separate", "qwen2.5_0.5b_test")
REWARD = "reward.custom_reward_function.path=my_reward.py"
CRITIC = {"adv_estimator": "gae", "critic.device_mapping": "list(range(0,16))"}
GIVEN = {"reward.custom_reward_function.path": "my_reward.py"}
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def load(name: str, *overrides: str) -> Config:
    return load_config([f"roll.config={DATA / name}.yaml", REWARD, *overrides], "roll")


def translated(name: str = "qwen2.5_7b_megatron", **changes: Any) -> Translation:
    return translate_file(DATA / f"{name}.yaml", changes, given=GIVEN)


def refused(changes: dict[str, Any], *, name: str = "qwen2.5_7b_megatron") -> str:
    with pytest.raises(ValueError) as error:
        translate_file(DATA / f"{name}.yaml", changes, given=GIVEN)
    return str(error.value)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "roll.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_translate_to_live_keys_that_know_their_source(name: str) -> None:
    done = translated(name)
    known = known_keys()
    assert [key for key in done.values if key not in known.leaves and not known.is_free(key)] == []
    assert set(done.sources) == set(done.values)
    assert done.sources["data.train_batch_size"] == "rollout_batch_size"
    assert done.sources["algorithm.gamma"] == "default of gamma"
    assert load(name).data.train_batch_size == 64


def test_stock_megatron_example() -> None:
    cfg = load("qwen2.5_7b_megatron")
    family = cfg.actor_rollout_ref
    assert (family.model.path, family.actor.strategy) == ("Qwen/Qwen2.5-7B", "megatron")
    assert (family.actor.device_mapping, family.rollout.device_mapping) == ("0-15", "0-11")
    assert (cfg.trainer.nnodes, cfg.trainer.n_gpus_per_node) == (2, 8)
    assert (family.rollout.n, family.actor.ppo_mini_batch_size) == (8, 64)
    assert (cfg.data.max_prompt_length, cfg.data.max_response_length) == (2048, 4096)
    assert family.actor.ppo_max_token_len_per_gpu == 6144
    assert (family.rollout.temperature, family.rollout.top_p, family.rollout.top_k) == (0.99, 0.99, 100)
    assert (family.rollout.val_kwargs.temperature, family.rollout.val_kwargs.top_p) == (0.6, 0.6)
    assert family.rollout.gpu_memory_utilization == 0.8
    assert family.rollout.engine_kwargs.vllm == {"block_size": 16}
    assert family.actor.clip_ratio_c == pytest.approx(1.4)
    assert family.actor.loss_agg_mode == "seq-mean-token-mean"
    assert (family.actor.optim.lr, family.actor.optim.lr_scheduler_type) == (1e-6, "linear")
    assert cfg.algorithm.adv_params["advantage_clip"] == 2.0
    assert (cfg.data.prompt_key, cfg.data.answer_key, cfg.data.reward_fn_key) == ("messages", "ground_truth", "tag")


def test_stock_fsdp2_example() -> None:
    actor = load("qwen3_8b_fsdp2").actor_rollout_ref.actor
    assert (actor.strategy, actor.fsdp_config.dtype, actor.fsdp_config.reshard_after_forward) == (
        "fsdp",
        "bfloat16",
        True,
    )
    assert load("qwen3_8b_fsdp2").data.apply_chat_template_kwargs == {"enable_thinking": True}


def test_separate_devices_never_sleep() -> None:
    done = translated("qwen2.5_7b_separate")
    assert done.values[f"{ROLLOUT}.device_mapping"] == "4-5,12-13"
    assert done.values[f"{ROLLOUT}.free_cache_engine"] is False


@pytest.mark.parametrize(
    ("mapping", "ranks"),
    [
        ("list(range(0,12))", "0-11"),
        ("list(range(12, 16))", "12-15"),
        ("list([4,5,12,13])", "4-5,12-13"),
        ("[6, 7]", "6-7"),
        ([0, 1], "0-1"),
        ("range(0, 4)", "0-3"),
        ("list(range(0,2)) + list(range(4,6))", "0-1,4-5"),
        ("0-3", "0-3"),
    ],
)
def test_device_mappings(mapping: object, ranks: str) -> None:
    assert show_ranks(read_mapping(mapping, "roll.actor_train.device_mapping")) == ranks


@pytest.mark.parametrize("mapping", ["__import__('os').getpid()", "list(range(0,len('ab')))", "[i for i in range(4)]"])
def test_nothing_is_evaluated(mapping: str) -> None:
    assert "roll.actor_train.device_mapping" in refused({"actor_train.device_mapping": mapping})


def test_our_overrides_win_and_lose_their_source() -> None:
    override = f"{ROLLOUT}.temperature=0.7"
    assert load("qwen2.5_7b_megatron", override).actor_rollout_ref.rollout.temperature == 0.7
    roll = expand_roll([f"roll.config={DATA}/qwen2.5_7b_megatron.yaml", REWARD, override])
    assert f"{ROLLOUT}.temperature" not in roll.sources
    assert roll.sources[f"{ROLLOUT}.top_p"] == "actor_infer.generating_args.top_p"
    assert roll.overrides[-2:] == [REWARD, override]


def test_changes_of_rolls_keys() -> None:
    cfg = load("qwen2.5_7b_megatron", "roll.rollout_batch_size=32", "roll.actor_train.training_args.learning_rate=1e-5")
    assert (cfg.data.train_batch_size, cfg.actor_rollout_ref.actor.optim.lr) == (32, 1e-5)
    cfg = load("qwen2.5_7b_megatron", "roll.actor_infer.device_mapping=list(range(0,8))")
    assert cfg.actor_rollout_ref.rollout.device_mapping == "0-7"


def test_without_roll_nothing_changes() -> None:
    assert expand_roll(["data.seed=2"]).overrides == ["data.seed=2"]


@pytest.mark.parametrize("overrides", [[], ["roll.seed=1"]])
def test_a_file_is_needed(overrides: list[str]) -> None:
    with pytest.raises(ValueError, match=r"roll\.config=\?\?\?: has no default; give ROLL's YAML file"):
        expand_roll(overrides, "roll")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rollout_batchsize": 8}, "roll.rollout_batchsize=8: ROLL has no such key; did you mean rollout_batch_size?"),
        (
            {"actor_tran.device_mapping": "0-7"},
            "roll.actor_tran={...}: ROLL has no such key; did you mean actor_train?",
        ),
        (
            {"actor_train.training_args.learnig_rate": 1e-5},
            "did you mean actor_train.training_args.learning_rate?",
        ),
        ({"rewards.math_rule.tags_included": ["a"]}, "did you mean rewards.math_rule.tag_included?"),
        (
            {"actor_train.strategy_args.strategy_config.tensor_parallel_size": 2},
            "did you mean tensor_model_parallel_size?",
        ),
        ({"async_generation_ratio": 1}, "roll.async_generation_ratio=1: generation ahead of training is not there yet"),
        ({"actor_train.model_args.lora_target": "all-linear"}, "leave lora_target out to train every weight"),
        ({"actor_train.model_args.ulysses_size": 2}, "sequences are not cut over devices; set it to 1"),
        ({"actor_infer.strategy_args.strategy_name": "sglang"}, "vLLM generates; set it to vllm"),
        ({"norm_mean_type": "running"}, "choose one of null, batch, group"),
        ({"adv_estimator": "gigpo"}, "choose one of gae, reinforce, grpo"),
        ({"track_with": "swanlab"}, "choose one of tensorboard, wandb, stdout, null"),
        ({"rollout_batch_size": "many"}, "roll.rollout_batch_size=many: must be a whole number"),
        ({"whiten_advantages": 1}, "roll.whiten_advantages=1: must be true or false"),
        ({"actor_train": 3}, "roll.actor_train=3: a section, not a value"),
        ({"actor_train.model_args": 3}, "roll.actor_train.model_args=3: a section, not a value"),
        ({"train_infer_correction.is_weight.detach": False}, "weights have no gradient here; set it to true"),
        ({"actor_train.data_args.template": "longcot_V3"}, "give it as data.chat_template"),
        ({"actor_infer.strategy_args.strategy_config.pipeline_parallel_size": 2}, "set it to 1"),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in refused(changes)


def test_all_problems_are_told_at_once() -> None:
    message = refused(
        {"use_opd": True, "async_generation_ratio": 1, "rollout_batchsize": 2, "norm_std_type": "running"}
    )
    assert message.startswith("4 problems")


def test_rewards_need_a_function() -> None:
    with pytest.raises(ValueError) as error:
        translate_file(DATA / "qwen2.5_7b_megatron.yaml")
    message = str(error.value)
    assert "math_rule (MathRuleRewardWorker: ROLL compares formulas with math_verify)" in message
    assert "code_sandbox (CodeSandboxRewardWorker: there is no sandbox to run code in)" in message
    assert "give reward.custom_reward_function.path=file.py" in message


def test_tags_with_a_built_in_scorer_need_no_function(tmp_path: Path) -> None:
    domain = "{worker_cls: x.MathRuleRewardWorker, tag_included: [openai/gsm8k]}"
    path = written(tmp_path, f"{_SMALL}rewards: {{math: {domain}}}\n")
    done = translate_file(path)
    assert done.values["data.reward_fn_key"] == "tag"
    assert any("a row whose tag no domain has is scored too" in notice for notice in done.notices)


def test_rows_of_no_domain_are_told() -> None:
    assert any("and of tags that no domain has" in told for told in translated().notices)


def test_sleep_level_and_infer_batch_size_are_explained() -> None:
    path = "actor_infer.strategy_args.strategy_config.sleep_level"
    done = translated(**{path: 1})
    assert done.values[f"{ROLLOUT}.sleep_level"] == 1
    assert any("saves the copy" in notice for notice in done.notices)
    assert any("actor_infer.infer_batch_size: ROLL ignores it on vLLM" in notice for notice in done.notices)
    apart = translated("qwen2.5_7b_separate", **{path: 2})
    assert f"{ROLLOUT}.sleep_level" not in apart.values
    assert any("shares no device, so it never sleeps" in notice for notice in apart.notices)


def test_updates_hold_whole_groups() -> None:
    steps = "actor_train.training_args.gradient_accumulation_steps"
    assert translated(**{steps: 16}).values[f"{ACTOR}.ppo_mini_batch_size"] == 32
    message = refused({steps: 1, "num_return_sequences_in_group": 24})
    assert "1 x 1 x 16 data-parallel ranks = 16 sequences cuts a group" in message
    assert "set it to 3" in message
    assert translated(**{steps: 64}).values[f"{ACTOR}.ppo_mini_batch_size"] == 64


def test_data_parallel_size_leaves_out_model_parallel_ranks() -> None:
    config = "actor_train.strategy_args.strategy_config"
    done = translated(**{f"{config}.tensor_model_parallel_size": 2, f"{config}.pipeline_model_parallel_size": 2})
    assert done.values[f"{ACTOR}.ppo_mini_batch_size"] == 16
    assert done.values[f"{ACTOR}.megatron.tensor_model_parallel_size"] == 2


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"adv_estimator": "reinforce"}, "reinforce_plus_plus"),
        ({"adv_estimator": "grpo", "whiten_advantages": False}, "grpo"),
        ({"adv_estimator": "reinforce", "whiten_advantages": False, "norm_mean_type": "group"}, "dr_grpo"),
        (CRITIC, "gae"),
        ({"adv_estimator": "grpo"}, "trainer.algorithms.estimators.roll:reinforce"),
        ({**CRITIC, "reward_clip": 5}, "trainer.algorithms.estimators.roll:gae"),
        ({"max_len_mask": True}, "trainer.algorithms.estimators.roll:reinforce"),
    ],
)
def test_estimators(changes: dict[str, Any], name: str) -> None:
    plain = {"reward_clip": None, "advantage_clip": None, "max_len_mask": False, "difficulty_mask": False}
    assert translated(**{**plain, **changes}).values["algorithm.adv_estimator"] == name


def test_roles_that_do_not_run_are_told(tmp_path: Path) -> None:
    notices = translated().notices
    assert any("no effect of reference: no KL is used" in notice for notice in notices)
    done = translated(use_kl_loss=True)
    assert done.values["actor_rollout_ref.ref.strategy"] == "megatron"
    assert done.values["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"] == 8 * 6144


def test_filters_by_ratio_turn_round() -> None:
    rule = {"enabled": True, "agg_type": "geometric", "ratio_low": 0.5, "ratio_high": 2.0}
    done = translated(**{"train_infer_correction.filters": [rule, {"enabled": False}]})
    assert done.values["algorithm.rollout_correction.rollout_rs"] == "seq_mean_k1"
    assert done.values["algorithm.rollout_correction.rollout_rs_threshold"] == "0.5_2"
    assert done.values[f"{ROLLOUT}.calculate_log_probs"] is True


def test_query_filters() -> None:
    path = "rewards.math_rule.query_filter_config"
    done = translated(**{path: {"type": "std_filter", "filter_args": {"std_threshold": 0}}})
    assert done.values["algorithm.filter_groups.enable"] is True
    wide = {"type": "mean_filter", "filter_args": {"threshold_down": 0.3, "threshold_up": 0.9}}
    assert "use std_filter with std_threshold: 0" in refused({path: wide})


_SMALL = """
pretrain: org/model
response_length: 64
adv_estimator: reinforce
size: 8
rollout_batch_size: ${size}
num_return_sequences_in_group: 8
actor_train:
  device_mapping: "[0]"
  data_args: {file_name: [train.jsonl]}
actor_infer: {device_mapping: "[0]", strategy_args: {strategy_name: vllm}}
"""


def test_defaults_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(_SMALL, encoding="utf-8")
    (tmp_path / "args.yaml").write_text("temperature: 0.5\n", encoding="utf-8")
    entries = "base@_here_, args@actor_infer.generating_args, ../config/deepspeed_zero3@_here_, _self_"
    text = f"defaults: [{entries}]\nseed: 7\nmax_steps: ${{oc.decode:${{oc.env:NO_SUCH_NAME,'3'}}}}\n"
    done = translate_file(written(tmp_path, text))
    assert (done.values["data.seed"], done.values["data.train_batch_size"]) == (7, 8)
    assert done.values[f"{ROLLOUT}.temperature"] == 0.5
    assert done.values["trainer.total_training_steps"] == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defaults: [nowhere]\n", "defaults names nowhere, and there is no"),
        ("seed: ${nothing}\n", "define it in the file"),
        ("seed: [1\n", "not readable as YAML"),
        ("- 1\n", "holds a list"),
        ("defaults: [roll]\n", "lead from"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r"roll\.\w+=") as error:
        translate_file(written(tmp_path, text))
    assert expected in str(error.value)


def test_a_missing_file_names_where_it_was_looked_for() -> None:
    with pytest.raises(ValueError, match=r"roll\.config=no\.yaml: No such file or directory \(looked from"):
        translate_file(Path("no.yaml"))


def test_the_converter_writes_the_same_configuration(tmp_path: Path) -> None:
    path = DATA / "qwen2.5_7b_megatron.yaml"
    text, _ = convert(str(path), [REWARD, f"{ROLLOUT}.enforce_eager=true"])
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    mine = load_config([], "mine", config_dir=tmp_path)
    assert mine == load("qwen2.5_7b_megatron", f"{ROLLOUT}.enforce_eager=true")
    assert "top_k: 100  # ROLL: actor_infer.generating_args.top_k" in text


@pytest.mark.parametrize(
    "value", [None, True, 3, 1e-06, "a'b", "a\\b", "x=y, {z}", "0-3,8-11", [1, "a b"], {"a": {"b": [1, None]}}]
)
def test_values_survive_the_command_line(value: object) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = to_overrides({"key": value})
    assert OverridesParser.create().parse_override(override).value() == value


def test_test_data_is_plain_yaml() -> None:
    for name in EXAMPLES:
        text = (DATA / f"{name}.yaml").read_text(encoding="utf-8")
        assert "#" not in text
        assert isinstance(yaml.safe_load(text), dict)
