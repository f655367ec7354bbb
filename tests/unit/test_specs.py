"""What workers are built from, as it follows from the configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trainer.config.load import load_config
from trainer.specs import Sizes, engine_specs

INPUTS: Any = SimpleNamespace(model_path="/nowhere")
SIZES = Sizes(steps_per_epoch=10, total_steps=100, actor_updates_per_step=4, critic_updates_per_step=8)


def test_the_actors_schedule_begins_after_the_critics_warm_up() -> None:
    cfg = load_config(
        [
            "data.train_files=train.jsonl",
            "actor_rollout_ref.model.path=model",
            "trainer.critic_warmup=20",
            "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.1",
        ]
    )
    specs = engine_specs(cfg, INPUTS, SIZES)
    actor, critic = specs["actor"].optimizer, specs["critic"].optimizer
    assert actor is not None and critic is not None
    assert (actor.total_steps, actor.warmup_steps) == (80 * 4, 32)
    assert critic.total_steps == 100 * 8
