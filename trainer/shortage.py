"""A device that ran out of memory, for the user: what happened, the figures, and the keys that would help.

Only keys that have something to give with their present values are named.
"""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.errors import show
from trainer.config.roles import training_roles
from trainer.config.schema import Config, FsdpConfig, MegatronConfig
from trainer.tracking.text import size
from workers.group import WorkerOutOfMemory

_ROLLOUT = "actor_rollout_ref.rollout"
_ACTOR = "actor_rollout_ref.actor"
_REF = "actor_rollout_ref.ref"
_DOING = {
    "forward": "log-probs or values",
    "update": "update",
    "publish": "weight sync",
    "place": "start",
    "save": "checkpoint",
    "load": "resuming",
    "generate": "generation",
    "wake": "waking the replica",
    "load_bucket": "weight sync",
}
"""What the calls of workers mean to a user."""
_REPLICA_CALLS = ("generate", "wake", "load_bucket")


def explain(cfg: Config, error: WorkerOutOfMemory) -> str:
    """The message for the user; several lines."""
    shortage = error.shortage
    whose = f" of the {shortage.role}" if shortage.role else ""
    kind = f"rank {error.rank}" if shortage.role else f"rollout replica {error.rank}"
    asked = f"{shortage.asked} asked for, " if shortage.asked else ""
    free, total = size(shortage.free_bytes), size(shortage.total_bytes)
    lines = [
        f"out of memory: {_DOING[shortage.call]}{whose}, {kind}: {asked}{free} free of {total}",
        f"  {shortage.told[:300]}",
    ]
    keys = list(remedies(cfg, shortage.call, shortage.role))
    return "\n".join([*lines, "what would help:", *(f"  {key}" for key in keys)])


def remedies(cfg: Config, call: str, role: str) -> Iterator[str]:
    """Keys to turn, with the values they have now; what costs least speed comes first."""
    if call in _REPLICA_CALLS:
        yield from _generation(cfg)
    elif call in ("forward", "update"):
        yield from _micro_batches(cfg, role, call)
    if call in ("publish", "load_bucket"):
        megabytes = cfg.actor_rollout_ref.rollout.update_weights_bucket_megabytes
        yield f"lower {_ROLLOUT}.update_weights_bucket_megabytes (now {megabytes})"
    yield from _held_by_replicas(cfg, call)
    yield from _held_by_training(cfg)
    yield from _more_devices(cfg)


def _more_devices(cfg: Config) -> Iterator[str]:
    """FSDP shards over the devices that there are; Megatron is told over how many."""
    roles, now = training_roles(cfg), cfg.trainer.n_gpus_per_node
    if any(role.megatron is None for role in roles):
        yield f"raise trainer.n_gpus_per_node (now {now}): models are sharded over the devices"
    for role in roles:
        if (megatron := role.megatron) is not None:
            yield (
                f"raise {role.engine_key}.tensor_model_parallel_size (now {megatron.tensor_model_parallel_size}), and "
                f"trainer.n_gpus_per_node (now {now}) where it takes more devices"
            )


def _micro_batches(cfg: Config, role: str, call: str) -> Iterator[str]:
    model, budgets = cfg.actor_rollout_ref.model, _budgets(cfg)
    key, budget = budgets[role]
    if budget > cfg.max_sequence_length:
        yield f"lower {key} (now {budget}; a sequence has up to {cfg.max_sequence_length} tokens)"
    if call == "update":
        name, setting = ("critic.model", cfg.critic.model) if role == "critic" else ("actor_rollout_ref.model", model)
        if setting.enable_gradient_checkpointing is not True:
            now = show(setting.enable_gradient_checkpointing)
            yield f"set {name}.enable_gradient_checkpointing=true (now {now})"
        for each in training_roles(cfg):
            if each.name == role and isinstance(each.engine, FsdpConfig) and each.engine.reshard_after_forward is False:
                yield f"set {each.engine_key}.reshard_after_forward=auto (now false)"


def _budgets(cfg: Config) -> dict[str, tuple[str, int]]:
    roles = cfg.actor_rollout_ref
    return {
        "actor": (f"{_ACTOR}.ppo_max_token_len_per_gpu", roles.actor.ppo_max_token_len_per_gpu),
        "ref": (f"{_REF}.log_prob_max_token_len_per_gpu", roles.ref.log_prob_max_token_len_per_gpu),
        "critic": ("critic.ppo_max_token_len_per_gpu", cfg.critic.ppo_max_token_len_per_gpu),
    }


def _generation(cfg: Config) -> Iterator[str]:
    rollout = cfg.actor_rollout_ref.rollout
    if rollout.kv_cache_gb is not None:
        yield f"lower {_ROLLOUT}.kv_cache_gb (now {rollout.kv_cache_gb})"
    else:
        yield f"lower {_ROLLOUT}.gpu_memory_utilization (now {rollout.gpu_memory_utilization})"
    yield f"lower {_ROLLOUT}.max_num_seqs (now {rollout.max_num_seqs})"


def _held_by_replicas(cfg: Config, call: str) -> Iterator[str]:
    """What replicas keep while training works."""
    rollout = cfg.actor_rollout_ref.rollout
    if call in _REPLICA_CALLS:
        return
    if not rollout.free_cache_engine:
        yield f"set {_ROLLOUT}.free_cache_engine=true (now false)"
    elif rollout.sleep_level == 0:
        yield f"set {_ROLLOUT}.sleep_level=auto (now 0)"
    if call == "publish" or not rollout.free_cache_engine or rollout.sleep_level == 0:
        yield f"lower {_ROLLOUT}.gpu_memory_utilization (now {rollout.gpu_memory_utilization})"


def _held_by_training(cfg: Config) -> Iterator[str]:
    roles = training_roles(cfg)
    for role in roles:
        for key, value in role.offloads.items():
            if value is False:
                yield f"set {role.engine_key}.{key}=auto (now false)"
    for role in roles:
        if isinstance(role.engine, FsdpConfig | MegatronConfig) and role.engine.model_dtype == "fp32":
            yield (
                f"set {role.engine_key}.model_dtype=bf16 (now fp32): half the weights and optimizer state, less precise"
            )
