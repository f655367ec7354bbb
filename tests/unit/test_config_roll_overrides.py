"""Overrides of our own beside a file of ROLL's: they win, what is computed follows them, and notices stay true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import load_config
from trainer.config.roll.command_line import RollOverrides, expand_roll
from trainer.config.roll.engines import SECTIONS
from trainer.config.roll.given import SAME

DATA = Path(__file__).resolve().parents[1] / "data" / "roll"
EXAMPLE, SEPARATE = "qwen2.5_7b_megatron", "qwen2.5_7b_separate"
REWARD = "reward.custom_reward_function.path=my_reward.py"
ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
SLEEP = "roll.actor_infer.strategy_args.strategy_config.sleep_level"
STEPS = "roll.actor_train.training_args.gradient_accumulation_steps"
FILTER = "roll.rewards.math_rule.query_filter_config"
WORKER = "roll.actor_train.worker_cls=a.ActorPGWorker"


def expanded(*overrides: str, name: str = EXAMPLE) -> RollOverrides:
    return expand_roll([f"roll.config={DATA / name}.yaml", REWARD, *overrides])


@pytest.mark.parametrize(
    ("name", "file", "override", "told"),
    [
        (EXAMPLE, [f"{SLEEP}=2"], f"{ROLLOUT}.sleep_level=auto", "weights and KV cache are dropped"),
        (EXAMPLE, [f"{SLEEP}=1"], f"{ROLLOUT}.free_cache_engine=false", "saves the copy"),
        (SEPARATE, [f"{SLEEP}=1"], f"{ROLLOUT}.sleep_level=2", "so it never sleeps"),
        (
            EXAMPLE,
            ["roll.actor_train.strategy_args.strategy_name=deepspeed_train"],
            f"{ACTOR}.strategy=megatron",
            "trained with FSDP",
        ),
        (
            EXAMPLE,
            [WORKER, "roll.actor_train.pg_variant=topr"],
            f"{ACTOR}.policy_loss.loss_mode=ppo",
            "pg_variant=topr",
        ),
        (EXAMPLE, [f"{STEPS}=64"], f"{ACTOR}.ppo_mini_batch_size=8", "each step is one update"),
        (
            EXAMPLE,
            ["roll.use_kl_loss=true", "roll.reference.infer_batch_size=2"],
            f"{REF}.log_prob_max_token_len_per_gpu=9000",
            "one forward pass of the reference",
        ),
        (
            EXAMPLE,
            [f"{FILTER}={{type: std_filter, filter_args: {{std_threshold: 0}}}}"],
            "algorithm.filter_groups.enable=false",
            "algorithm.filter_groups",
        ),
        (EXAMPLE, [], f"{ACTOR}.use_kl_loss=true", "no effect of reference: no KL is used"),
        (EXAMPLE, ["roll.adv_estimator=grpo"], "algorithm.adv_estimator=gae", "no effect of critic"),
    ],
)
def test_a_notice_about_a_replaced_value_does_not_appear(name: str, file: list[str], override: str, told: str) -> None:
    file = [*file, "roll.critic.device_mapping=list(range(0,16))"]
    assert any(told in notice for notice in expanded(*file, name=name).notices)
    assert not any(told in notice for notice in expanded(*file, override, name=name).notices)


VALUES: dict[str, Any] = {
    "data.train_batch_size": 32,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    f"{ROLLOUT}.n": 4,
    f"{ROLLOUT}.device_mapping": "8-15",
    f"{ACTOR}.device_mapping": "0-7",
    f"{REF}.device_mapping": "0-7",
    "critic.device_mapping": "0-7",
    "trainer.n_gpus_per_node": 16,
    f"{ACTOR}.optim.lr": 1e-5,
    "critic.optim.lr": 1e-5,
    f"{ACTOR}.clip_ratio": 0.3,
    f"{ACTOR}.use_kl_loss": True,
    "algorithm.use_kl_in_reward": True,
    "algorithm.gamma": 0.9,
    "algorithm.lam": 0.9,
}
MORE = {
    f"{REF}.device_mapping": ["roll.use_kl_loss=true"],
    "critic.device_mapping": ["roll.adv_estimator=gae", "roll.critic.device_mapping=list(range(0,16))"],
    "critic.optim.lr": ["roll.adv_estimator=gae", "roll.critic.device_mapping=list(range(0,16))"],
    f"{ACTOR}.optim.lr": ["roll.actor_train.strategy_args.strategy_config.lr_scheduler_kwargs={min_lr: 1e-7}"],
    "data.max_response_length": ["roll.response_length=null", "roll.sequence_length=5000"],
}


@pytest.mark.parametrize("key", SAME)
def test_what_is_computed_follows_an_override_as_it_follows_rolls_key(key: str) -> None:
    file, more, value = f"roll.config={DATA / EXAMPLE}.yaml", MORE.get(key, []), VALUES[key]
    without = [text for text in more if key != "data.max_response_length" or "sequence" not in text]
    ours = load_config([file, REWARD, *more, f"{key}={value}"], "roll")
    rolls = load_config([file, REWARD, *without, f"roll.{SAME[key]}={value}"], "roll")
    assert ours == rolls
    assert ours != load_config([file, REWARD, *more], "roll")


@pytest.mark.parametrize(
    ("mapping", "ranks"), [("0", "[0]"), ("0-1", "[0,1]"), ("0,2-3", "[0,2,3]"), ("[0,1]", "[0,1]")]
)
@pytest.mark.parametrize("key", [key for key in SAME if key.endswith("device_mapping")])
def test_every_form_of_a_device_mapping_is_taken_over(key: str, mapping: str, ranks: str) -> None:
    more, override = MORE.get(key, []), f"{key}={mapping}"
    assert expanded(*more, override).overrides == [*expanded(*more, f"roll.{SAME[key]}={ranks}").overrides, override]


@pytest.mark.parametrize("role", ["actor_train", "critic"])
@pytest.mark.parametrize("name", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_mini_batches_follow_our_parallel_sizes(role: str, name: str) -> None:
    critic = "{device_mapping: '0-15', strategy_args: {strategy_name: megatron_train}}"
    file = [f"roll.config={DATA / EXAMPLE}.yaml", REWARD, "roll.adv_estimator=gae", f"roll.critic={critic}"]
    file += [f"roll.{role}.training_args.gradient_accumulation_steps=4"]
    ours = load_config([*file, f"{SECTIONS[role]}.megatron.{name}=4"], "roll")
    assert ours == load_config([*file, f"roll.{role}.strategy_args.strategy_config.{name}=4"], "roll")


def test_mini_batches_follow_our_engine() -> None:
    sizes = "roll.actor_train.strategy_args.strategy_config.tensor_model_parallel_size=4"
    assert f"{ACTOR}.ppo_mini_batch_size=16" in expanded(sizes).overrides
    assert f"{ACTOR}.ppo_mini_batch_size=64" in expanded(sizes, f"{ACTOR}.strategy=fsdp").overrides


@pytest.mark.parametrize("file", [["roll.use_pg_clip_range=true"], [WORKER, "roll.actor_train.pg_variant=cispo"]])
def test_a_clip_ratio_of_ours_is_both_bounds(file: list[str]) -> None:
    cfg = load_config([f"roll.config={DATA / EXAMPLE}.yaml", REWARD, *file, f"{ACTOR}.clip_ratio=0.3"], "roll")
    actor = cfg.actor_rollout_ref.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (0.3, 0.3, 1.6)


@pytest.mark.parametrize(
    ("override", "bound"),
    [([], 0.1), ([f"{ACTOR}.policy_loss.loss_mode=cispo"], 0.1), ([f"{ACTOR}.policy_loss.loss_mode=ppo"], 0.2)],
)
def test_the_bounds_of_rolls_cispo_hold_for_cispo_alone(override: list[str], bound: float) -> None:
    roll = expanded(WORKER, "roll.actor_train.pg_variant=cispo", *override)
    assert {f"{ACTOR}.clip_ratio_low={bound}", f"{ACTOR}.clip_ratio_high={bound}"} <= set(roll.overrides)


def test_an_interpolation_leaves_what_is_computed_as_it_is() -> None:
    roll = expanded("data.train_batch_size=${data.val_batch_size}")
    assert f"{ACTOR}.ppo_mini_batch_size=64" in roll.overrides


@pytest.mark.parametrize(
    ("file", "override"),
    [
        (["roll.pretrain=null"], "actor_rollout_ref.model.path=org/model"),
        (["roll.actor_train.data_args.file_name=null"], "data.train_files=mine.jsonl"),
        (["roll.response_length=null"], "data.max_response_length=64"),
        (["roll.actor_train.data_args.template=longcot_V3"], "data.chat_template=mine"),
        (["roll.track_with=swanlab"], "trainer.logger=[console]"),
        (["roll.norm_mean_type=running"], "algorithm.adv_estimator=grpo"),
        (["roll.loss_agg_mode=mean"], f"{ACTOR}.loss_agg_mode=token-mean"),
        (["roll.importance_sampling=both"], f"{ACTOR}.policy_loss.loss_mode=gspo"),
        ([WORKER, "roll.actor_train.pg_variant=tis"], f"{ACTOR}.policy_loss.loss_mode=ppo"),
        (["roll.actor_train.worker_cls=my.Worker"], f"{ACTOR}.policy_loss.loss_mode=ppo"),
        ([f"{STEPS}=1", "roll.num_return_sequences_in_group=24"], f"{ACTOR}.ppo_mini_batch_size=2"),
        (["roll.actor_train.training_args.lr_scheduler_type=wsd"], f"{ACTOR}.optim.lr_scheduler_type=cosine"),
        (["roll.actor_train.model_args.dtype=fp16"], f"{ACTOR}.megatron.dtype=bfloat16"),
        (["roll.actor_infer.model_args.dtype=int4"], f"{ROLLOUT}.dtype=float16"),
        (["roll.actor_train.strategy_args.strategy_name=mine"], f"{ACTOR}.strategy=fsdp"),
        (["roll.add_token_level_kl=true", "roll.kl_penalty=full"], "algorithm.kl_penalty=kl"),
        (
            [f"{FILTER}.type=mean_filter", f"{FILTER}.filter_args={{threshold_up: 0.7}}"],
            "algorithm.filter_groups.enable=true",
        ),
    ],
)
def test_a_value_that_cannot_be_had_may_be_replaced(file: list[str], override: str) -> None:
    with pytest.raises(ValueError, match=r"roll\."):
        expanded(*file)
    assert expanded(*file, override).overrides[-1] == override


def test_the_reward_function_may_be_named_as_in_verl_or_in_a_section() -> None:
    file = f"roll.config={DATA / EXAMPLE}.yaml"
    for override in ("custom_reward_function.path=my.py", "reward.custom_reward_function={path: my.py}"):
        assert expand_roll([file, override]).overrides[-1] == override
    with pytest.raises(ValueError, match=r"roll\.rewards="):
        expand_roll([file, "reward.custom_reward_function.path=null"])


def test_a_function_leaves_no_word_of_built_in_scorers() -> None:
    assert not any("built-in" in notice for notice in expanded("roll.rewards=null").notices)


def test_an_estimator_of_ours_brings_its_own_parameters() -> None:
    roll = expanded("algorithm.adv_estimator=grpo")
    assert not any("adv_params" in override for override in roll.overrides)
    file = f"roll.config={DATA / EXAMPLE}.yaml"
    assert load_config([file, REWARD, "algorithm.adv_estimator=rloo"], "roll").algorithm.adv_estimator == "rloo"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with two estimators called gae: `plain.py:gae` asks for no values, `valued.py:gae` does."""
    (tmp_path / "plain.py").write_text("def gae(x): ...\n", encoding="utf-8")
    (tmp_path / "valued.py").write_text("def gae(x): ...\ngae.needs = {'values'}\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        (["algorithm.adv_estimator=gae"], True),
        (["algorithm.adv_estimator=trainer.algorithms.estimators.roll:gae"], True),
        (["algorithm.adv_estimator={}/valued.py:gae"], True),
        (["algorithm.adv_estimator={}/plain.py:gae"], False),
        (["algorithm.adv_estimator=no_such:gae"], False),
        (["critic.enable=true"], True),
        (["critic.enable=null"], False),
        (["algorithm.adv_estimator=gae", "critic.enable=false"], False),
    ],
)
def test_a_critic_is_translated_where_one_is_trained(own: Path, overrides: list[str], trained: bool) -> None:
    critic = ["roll.critic.device_mapping=list(range(0,16))", "roll.critic.training_args.learning_rate=1e-4"]
    given = [override.format(own) for override in overrides]
    roll = expanded(*critic, *given)
    assert ("critic.optim.lr=0.0001" in roll.overrides) == trained
    assert any("no effect of critic" in notice for notice in roll.notices) != trained
    bare = expanded(*given).overrides
    assert not any(override.startswith("critic.optim.lr") for override in bare)
    assert ("critic.loss_agg_mode='seq-mean-token-mean'" in bare) == trained


@pytest.mark.parametrize("override", ["critic.optim.lr=1e-4", "critic.device_mapping=0", "algorithm.adv_estimator=gae"])
def test_a_critic_of_the_command_line_follows_our_defaults(override: str) -> None:
    with pytest.raises(ValueError, match=r"roll\.critic=null"):
        expanded("roll.adv_estimator=gae")
    file = f"roll.config={DATA / EXAMPLE}.yaml"
    cfg = load_config([file, REWARD, "roll.adv_estimator=gae", override], "roll")
    assert cfg.use_critic
    assert cfg.critic.strategy == cfg.actor_rollout_ref.actor.strategy
    assert cfg.critic.ppo_mini_batch_size == cfg.actor_rollout_ref.actor.ppo_mini_batch_size


@pytest.mark.parametrize(
    ("overrides", "lam"),
    [
        (["roll.adv_estimator=grpo", "critic.enable=true"], None),
        (["algorithm.adv_estimator=rloo"], None),
        (["algorithm.adv_estimator=gae"], 0.95),
        (["roll.adv_estimator=gae", "critic.enable=null"], 0.95),
        (["roll.adv_estimator=grpo", "roll.lambd=0.8"], 0.8),
    ],
)
def test_rolls_default_lambda_is_there_for_gae_alone(overrides: list[str], lam: float | None) -> None:
    found = [override for override in expanded(*overrides).overrides if override.startswith("algorithm.lam=")]
    assert found == ([] if lam is None else [f"algorithm.lam={lam}"])


@pytest.mark.parametrize(
    ("overrides", "seeded"),
    [
        ([f"{STEPS}=32"], False),
        ([f"{STEPS}=8"], True),
        ([f"{STEPS}=8", f"{ACTOR}.shuffle=false"], False),
        ([f"{ACTOR}.shuffle=true"], True),
        ([f"{ACTOR}.policy_loss.loss_mode=clip_cov"], True),
    ],
)
def test_the_seed_of_updates_is_there_where_they_draw(overrides: list[str], seeded: bool) -> None:
    assert (f"{ACTOR}.data_loader_seed=7" in expanded("roll.seed=7", *overrides).overrides) == seeded


@pytest.mark.parametrize("steps", [4, 16])
def test_no_notice_is_about_a_key_that_nobody_wrote(steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = [f"roll.config={DATA / 'addition.yaml'}", "data.train_files=[a.jsonl]"]
    load_config([*file, REWARD, f"{STEPS}={steps}"], "roll")
    assert "without effect" not in capsys.readouterr().err


def test_validation_data_of_ours_are_looked_at_as_often_as_the_file_says() -> None:
    roll = expanded("roll.validation=null", "roll.eval_steps=7", "data.val_files=mine.jsonl")
    assert "trainer.test_freq=7" in roll.overrides


def test_a_wrong_override_is_told_before_the_file_is_translated() -> None:
    with pytest.raises(ValueError, match=r"reward\.custom_reward_functon\.path=.*did you mean"):
        expand_roll([f"roll.config={DATA / EXAMPLE}.yaml", "reward.custom_reward_functon.path=my.py"])
