"""Runs that several tests look at; each is made once, when the first test asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import MAIN_STEPS, NO_VALIDATION, Outcome, read_jsonl, run, write_jsonl

TIMEOUT_S = 900
"""Of one test together with the runs it is the first to ask for; each process has its own, shorter limit."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this directory."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, task: Path) -> Path:
    """Directory below which the runs lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def main_run(runs: Path) -> Outcome:
    """The quick start itself, shorter: GRPO, two training ranks, two replicas, every logger, every export.

    Other runs are compared with it, to the last bit: it is never interrupted.
    """
    outcome = run(
        runs / "main",
        f"trainer.total_training_steps={MAIN_STEPS}",
        "trainer.full_determinism=true",
        "trainer.test_freq=5",
        "trainer.save_freq=10",
        "trainer.max_actor_ckpt_to_keep=2",
        "trainer.log_completions_freq=5",
        "trainer.log_val_generations=8",
        "trainer.logger=[console,tensorboard,wandb]",
        "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
    )
    assert outcome.status == 0, outcome.told
    return outcome


@pytest.fixture(scope="session")
def frozen_run(runs: Path, main_run: Outcome, task: Path) -> Outcome:
    """One rank, one replica, JSONL data, and every pass there is: reference, old log-probs, entropy, 4 updates a step.

    It starts from the model that the main run exported, and its learning rate is too small to move a float32: each
    update sees the weights that sampled, so that whatever is recomputed must come out as it was.
    """
    outcome = run(
        runs / "frozen",
        f"actor_rollout_ref.model.path={main_run.checkpoints()[0] / 'hf_model'}",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=2",
        f"data.train_files={task / 'train.jsonl'}",
        f"data.val_files={_two_sources(runs / 'heldout.jsonl', task)}",
        "trainer.test_freq=-1",
        "actor_rollout_ref.actor.optim.lr=1e-30",
        "actor_rollout_ref.actor.ppo_mini_batch_size=32",
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.shuffle=true",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=128",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.entropy_coeff=0.001",
        "actor_rollout_ref.rollout.temperature=0.7",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        "actor_rollout_ref.rollout.update_weights_bucket_megabytes=1",
    )
    assert outcome.status == 0, outcome.told
    return outcome


@pytest.fixture(scope="session")
def ppo_run(runs: Path, task: Path) -> Outcome:
    """PPO: critic, GAE, KL in the reward with an adaptive coefficient, chat prompts, two updates a step.

    Whatever can leave its device does, after each use.
    """
    outcome = run(
        runs / "ppo",
        *NO_VALIDATION,
        "trainer.total_training_steps=4",
        "trainer.critic_warmup=1",
        f"data.train_files={task / 'train_chat.parquet'}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=32",
        "algorithm.adv_estimator=gae",
        "algorithm.use_kl_in_reward=true",
        "algorithm.kl_ctrl.type=adaptive",
        "algorithm.kl_ctrl.kl_coef=0.05",
        "algorithm.kl_ctrl.target_kl=0.01",
        "algorithm.kl_ctrl.horizon=2000",
        "critic.optim.lr=1e-3",
        *(f"actor_rollout_ref.actor.fsdp_config.{part}_offload=true" for part in ("param", "optimizer")),
        "actor_rollout_ref.ref.fsdp_config.param_offload=true",
        *(f"critic.fsdp.{part}_offload=true" for part in ("param", "optimizer")),
    )
    assert outcome.status == 0, outcome.told
    return outcome


@pytest.fixture(scope="session")
def dapo_run(runs: Path, task: Path) -> Outcome:
    """DAPO: groups without signal are replaced, long responses pay, the upper clip bound is higher; two updates.

    And all that is known about a sampler that differs from the trainer, which here it does not.
    """
    outcome = run(
        runs / "dapo",
        *NO_VALIDATION,
        "trainer.total_training_steps=2",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=6",
        "reward.overlong_buffer.len=2",
        "reward.overlong_buffer.penalty_factor=0.5",
        "actor_rollout_ref.actor.clip_ratio_high=0.28",
        "actor_rollout_ref.actor.ppo_mini_batch_size=32",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        "algorithm.rollout_correction.rollout_is=token",
        "algorithm.rollout_correction.rollout_rs=token_k2",
        "algorithm.rollout_correction.rollout_rs_threshold=1.0",
    )
    assert outcome.status == 0, outcome.told
    return outcome


def _two_sources(path: Path, task: Path) -> Path:
    """Held-out prompts of two data sources; the model has seen them, which is no matter here."""
    rows = read_jsonl(task / "train.jsonl")[:64]
    return write_jsonl(path, [row | {"data_source": f"half {number % 2}"} for number, row in enumerate(rows)])
