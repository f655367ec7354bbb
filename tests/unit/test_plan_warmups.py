"""Warm-ups against the number of steps that follows from the data."""

from __future__ import annotations

from plan_world import ACTOR, BASE

from trainer.config.load import load_config
from trainer.plan.batches import warmup_problems
from trainer.specs import Sizes

TEN = Sizes(steps_per_epoch=5, total_steps=10, actor_updates_per_step=4, critic_updates_per_step=2)
GAE = ["algorithm.adv_estimator=gae", "trainer.total_epochs=2"]


def test_a_run_that_ends_in_its_warm_up() -> None:
    cfg = load_config([*BASE, *GAE, f"{ACTOR}.optim.lr_warmup_steps=40", "critic.optim.lr_warmup_steps=19"])
    problems, (warning,) = warmup_problems(cfg, TEN)
    assert problems == []
    assert warning == (
        f"{ACTOR}.optim.lr_warmup_steps=40: the run has 10 steps (trainer.total_epochs=2 over the training prompts) "
        f"with 4 updates each, and {ACTOR}.optim.lr is never reached"
    )


def test_a_policy_that_would_never_be_trained() -> None:
    (problem,), _ = warmup_problems(load_config([*BASE, *GAE, "trainer.critic_warmup=10"]), TEN)
    assert problem.startswith("trainer.critic_warmup=10: the run has 10 steps (trainer.total_epochs=2 over the")
    assert problem.endswith("set trainer.critic_warmup=1, or more epochs")
    assert warmup_problems(load_config([*BASE, *GAE, "trainer.critic_warmup=9"]), TEN) == ([], [])


def test_given_steps_are_checked_with_the_keys() -> None:
    cfg = load_config([*BASE, *GAE, "trainer.total_training_steps=10", f"{ACTOR}.optim.lr_warmup_steps=99"])
    assert warmup_problems(cfg, TEN) == ([], [])
