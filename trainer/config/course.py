"""Checks of a run's course: its length, warm-ups, validation, checkpoints, trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from trainer.config.errors import show
from trainer.config.schema import Config

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


def course_problems(cfg: Config) -> Iterator[str]:
    """What contradicts each other."""
    yield from _kl_control(cfg)
    yield from _critic_warmup(cfg)
    yield from _checkpoints(cfg)
    yield from _validation(cfg)


def _kl_control(cfg: Config) -> Iterator[str]:
    rollout = cfg.actor_rollout_ref.rollout
    control, responses = cfg.algorithm.kl_ctrl, cfg.data.train_batch_size * rollout.n
    if cfg.algorithm.use_kl_in_reward and control.type == "adaptive" and responses >= 5 * control.horizon:
        yield (  # it loses up to 0.2 * responses / horizon of itself in a step
            f"algorithm.kl_ctrl.horizon={control.horizon}: with the {responses} responses of a step (data."
            f"train_batch_size x {ROLLOUT}.n) one step could turn the coefficient's sign and reward the KL; set it "
            f"above {responses // 5}, e.g. to {responses}"
        )


def _critic_warmup(cfg: Config) -> Iterator[str]:
    warmup, steps = cfg.trainer.critic_warmup, cfg.trainer.total_training_steps
    if warmup and not cfg.use_critic:
        yield (
            f"trainer.critic_warmup={warmup}: there is no critic to warm up; "
            "set trainer.critic_warmup=0, or critic.enable=true"
        )
    elif steps is not None and warmup >= steps:
        yield (
            f"trainer.critic_warmup={warmup}: as long as the run, trainer.total_training_steps={steps}, so the policy "
            f"would never be trained; set trainer.critic_warmup={steps // 10} or smaller, or more steps"
        )


def _checkpoints(cfg: Config) -> Iterator[str]:
    trainer = cfg.trainer
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path is None:
        yield (
            "trainer.resume_from_path=null: trainer.resume_mode=resume_path needs a checkpoint; "
            "set trainer.resume_from_path, or trainer.resume_mode=auto"
        )
    contents = cfg.actor_rollout_ref.actor.checkpoint.save_contents
    missing = [name for name in ("model", "optimizer", "extra") if name not in contents]
    if missing:
        yield (
            f"{ACTOR}.checkpoint.save_contents={show(contents)}: a run could not resume without "
            f"{' and '.join(missing)}; list model, optimizer and extra (and hf_model for a Hugging Face copy)"
        )


def _validation(cfg: Config) -> Iterator[str]:
    trainer = cfg.trainer
    if trainer.test_freq > 0 and cfg.data.val_files is None:
        yield (
            f"trainer.test_freq={trainer.test_freq}: there is nothing to validate on, data.val_files=null; "
            "set data.val_files, or trainer.test_freq=-1"
        )
    for tracker in ("wandb", "tensorboard"):
        if tracker in trainer.logger and importlib.util.find_spec(tracker) is None:
            yield (
                f"trainer.logger={show(trainer.logger)}: {tracker} is not installed; "
                f"pip install {tracker}, or take it out of the list"
            )
