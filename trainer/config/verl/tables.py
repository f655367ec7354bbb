"""The table: which of verl's keys are called otherwise here, have no effect, or are refused. First the moved names.

Exactly one row decides a key; what no row matches lives here, or is unknown. A test walks every key verl ever had.
"""

from __future__ import annotations

from trainer.config.verl.table_engines import ENGINES
from trainer.config.verl.table_policy import POLICY
from trainer.config.verl.table_rollout import ROLLOUT_KEYS
from trainer.config.verl.table_run import RUN
from workers.rollout.spec import ENGINE_NAMES

MOVED: dict[str, str] = {
    "critic.model.fsdp_config": "critic.fsdp",
    "actor_rollout_ref.ref.param_offload": "actor_rollout_ref.ref.fsdp_config.param_offload",
    "actor_rollout_ref.actor.checkpoint.contents": "actor_rollout_ref.actor.checkpoint.save_contents",
    "actor_rollout_ref.model.override_config.model_config": "actor_rollout_ref.model.override_config",
    "critic.model.override_config.model_config": "critic.model.override_config",
    "custom_reward_function": "reward.custom_reward_function",
    "sandbox_fusion": "reward.sandbox_fusion",
    "reward_manager": "reward.reward_manager",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.reward_kwargs": "reward.reward_kwargs",
    "reward_model.overlong_buffer": "reward.reward_kwargs.overlong_buffer_cfg",
    "reward_model.sandbox_fusion": "reward.sandbox_fusion",
    "reward_model.num_workers": "reward.num_workers",
    "reward_model": "reward.reward_model",
    "ray_init.timeline_json_file": "ray_kwargs.timeline_json_file",
    "ray_init": "ray_kwargs.ray_init",
    "trainer.n_devices_per_node": "trainer.n_gpus_per_node",
    "trainer.val_generations_to_log_to_wandb": "trainer.log_val_generations",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": (
        "actor_rollout_ref.rollout.update_weights_bucket_megabytes"
    ),
    **{
        f"actor_rollout_ref.rollout.engine_kwargs.vllm.{name}": f"actor_rollout_ref.rollout.{name}"
        for name in ENGINE_NAMES
    },
}
"""Old key or section -> its place today, or the place under which the table has it. The first that fits is taken."""

RULES = (*ENGINES, *POLICY, *ROLLOUT_KEYS, *RUN)
"""Every row."""
