"""Keys in the right place for another run: nothing is ignored silently."""

from __future__ import annotations

import pytest

from trainer.config.load import RECIPE_DIR, load_config

ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
BASE = ["data.train_files=t.jsonl", "actor_rollout_ref.model.path=org/model", "algorithm.adv_estimator=grpo"]
MEGATRON = f"{ACTOR}.strategy=megatron"
CORRECTION = "algorithm.rollout_correction"


def told(capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    load_config([*BASE, *overrides])
    return [line.removeprefix("note: without effect, ") for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize(
    ("overrides", "notices"),
    [
        (
            ["critic.optim.lr=1e-4", "critic.megatron.pipeline_model_parallel_size=2"],
            [
                "there is no critic (algorithm.adv_estimator=grpo): critic.optim.lr, "
                "critic.megatron.pipeline_model_parallel_size"
            ],
        ),
        (
            [f"{REF}.device_mapping=0-3", f"{REF}.fsdp_config.param_offload=true"],
            [
                f"there is no reference ({ACTOR}.use_kl_loss=false and algorithm.use_kl_in_reward=false): "
                f"{REF}.device_mapping, {REF}.fsdp_config.param_offload"
            ],
        ),
        (
            [f"{ACTOR}.megatron.tensor_model_parallel_size=4"],
            [f"{ACTOR}.strategy=fsdp: {ACTOR}.megatron.tensor_model_parallel_size"],
        ),
        (
            [MEGATRON, f"{ACTOR}.fsdp_config.dtype=float32"],
            [f"{ACTOR}.strategy=megatron: {ACTOR}.fsdp_config.dtype"],
        ),
        (
            [MEGATRON, f"{ACTOR}.use_kl_loss=true", f"{REF}.fsdp_config.param_offload=true"],
            [f"{REF}.strategy=megatron: {REF}.fsdp_config.param_offload"],
        ),
        (
            ["algorithm.adv_estimator=gae", "critic.megatron.param_offload=true"],
            ["critic.strategy=fsdp: critic.megatron.param_offload"],
        ),
        ([f"{ACTOR}.kl_loss_coef=0.1"], [f"{ACTOR}.use_kl_loss=false: {ACTOR}.kl_loss_coef"]),
        (["algorithm.kl_ctrl.kl_coef=0.1"], ["algorithm.use_kl_in_reward=false: algorithm.kl_ctrl.kl_coef"]),
        (
            ["algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.horizon=9"],
            ["algorithm.kl_ctrl.type=fixed: algorithm.kl_ctrl.horizon"],
        ),
        (
            [f"{CORRECTION}.rollout_is_threshold=5"],
            [f"{CORRECTION}.rollout_is=null: {CORRECTION}.rollout_is_threshold"],
        ),
        (
            [f"{CORRECTION}.rollout_rs_threshold=5"],
            [f"{CORRECTION}.rollout_rs=null: {CORRECTION}.rollout_rs_threshold"],
        ),
        (
            ["reward.overlong_buffer.penalty_factor=2"],
            ["reward.overlong_buffer.len=0: reward.overlong_buffer.penalty_factor"],
        ),
        (
            ["algorithm.filter_groups.metric=acc"],
            ["algorithm.filter_groups.enable=false: algorithm.filter_groups.metric"],
        ),
        (
            ["algorithm.lam=0.9", "algorithm.gamma=0.9"],
            ["algorithm.adv_estimator=grpo: algorithm.{gamma, lam}"],
        ),
        (
            ["algorithm.adv_estimator=rloo", "algorithm.norm_adv_by_std_in_grpo=false"],
            ["algorithm.adv_estimator=rloo: algorithm.norm_adv_by_std_in_grpo"],
        ),
        (
            [f"{ACTOR}.optim.min_lr_ratio=0.1"],
            [f"{ACTOR}.optim.lr_scheduler_type=constant: {ACTOR}.optim.min_lr_ratio"],
        ),
        ([f"{ACTOR}.data_loader_seed=1"], [f"{ACTOR}.shuffle=false: {ACTOR}.data_loader_seed"]),
        ([f"{ACTOR}.data_loader_seed=1", f"{ACTOR}.policy_loss.loss_mode=clip_cov"], []),
        (
            ["trainer.total_training_steps=5", "trainer.total_epochs=2"],
            ["trainer.total_training_steps=5: trainer.total_epochs"],
        ),
        (
            [f"{ROLLOUT}.val_kwargs.n=4"],
            [f"there is no validation (data.val_files=null): {ROLLOUT}.val_kwargs.n"],
        ),
        (
            ["reward.custom_reward_function.name=score"],
            ["reward.custom_reward_function.path=null: reward.custom_reward_function.name"],
        ),
        (
            ["ray_kwargs.ray_init.address=auto", "ray_kwargs.ray_init.num_cpus=4"],
            ["ray_kwargs.ray_init.address=auto: ray_kwargs.ray_init.num_cpus"],
        ),
        (
            [f"{ROLLOUT}.kv_cache_gb=4", f"{ROLLOUT}.gpu_memory_utilization=0.6"],
            [f"{ROLLOUT}.kv_cache_gb=4.0: {ROLLOUT}.gpu_memory_utilization"],
        ),
    ],
)
def test_what_nothing_reads_is_told(
    overrides: list[str], notices: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, *overrides) == notices


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["critic.optim.lr=1e-5", f"{ACTOR}.megatron.tensor_model_parallel_size=1"],  # as the defaults are
        ["algorithm.adv_estimator=gae", "critic.optim.lr=1e-4", "algorithm.lam=0.9", "critic.fsdp.dtype=float32"],
        [MEGATRON, f"{ACTOR}.megatron.tensor_model_parallel_size=4"],
        [f"{ACTOR}.use_kl_loss=true", f"{REF}.strategy=megatron", f"{ACTOR}.megatron.dtype=float32"],  # ref follows
        ["critic.enable=true", "critic.optim.lr=1e-4", "algorithm.gamma=0.9"],
        ["algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0.9"],
        [f"{ACTOR}.kl_loss_coef=0.0", "algorithm.kl_ctrl.kl_coef=0.0"],  # of what is off, nothing is asked
        [f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0.1", f"{REF}.device_mapping=0-7"],
        ["data.val_files=v.jsonl", f"{ROLLOUT}.val_kwargs.n=4"],
    ],
)
def test_what_is_read_is_not(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, *overrides) == []


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPE_DIR.glob("*.yaml")))
def test_recipes_hold_nothing_that_has_no_effect(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    load_config(["data.train_files=t.jsonl", "actor_rollout_ref.model.path=m"], name)
    assert "without effect" not in capsys.readouterr().err
