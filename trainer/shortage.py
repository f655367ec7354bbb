"""Memory that ran out, for the user: what happened, the figures, and the keys that would help.

Only keys that have something to give with their present values, in the call that failed, are named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from trainer.config.errors import show
from trainer.config.roles import training_roles
from trainer.config.schema import Config, TrainedFsdpConfig
from trainer.tracking.text import size
from workers.group import WorkerOutOfMemory
from workers.settings import Auto
from workers.shortage import Where

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
    "make_room": "making room for a replica",
    "start": "start",
    "generate": "generation",
    "wake": "waking the replica",
    "begin_update": "weight sync",
    "load_bucket": "weight sync",
    "finish_update": "weight sync",
}
"""What the calls of workers mean to a user."""
_SYNC_CALLS = ("begin_update", "load_bucket", "finish_update")
_REPLICA_CALLS = ("start", "generate", "wake", *_SYNC_CALLS)


def explain(cfg: Config, error: WorkerOutOfMemory, device: Literal["cpu", "cuda"]) -> str:
    """The message for the user; several lines. device: what the run works on."""
    shortage = error.shortage
    call, where = shortage.call, shortage.where
    whose = f" of the {shortage.role}" if shortage.role else ""
    kind = "rollout replica" if call in _REPLICA_CALLS else "rank"
    asked = f"{shortage.asked} asked for, " if shortage.asked else ""
    free, total = size(shortage.free_bytes), size(shortage.total_bytes)
    lines = [
        f"out of {'host ' if where == 'host' else ''}memory: "
        f"{_DOING[call]}{whose}, {kind} {error.rank}: {asked}{free} free of {total}",
        f"  {shortage.told[:300]}",
    ]
    keys = list(remedies(cfg, call, shortage.role, where=where, device=device))
    return "\n".join([*lines, *(["what would help:"] if keys else []), *(f"  {key}" for key in keys)])


def remedies(
    cfg: Config, call: str, role: str, *, where: Where = "device", device: Literal["cpu", "cuda"] = "cuda"
) -> Iterator[str]:
    """Keys to turn, with the values they have now; what costs least speed comes first."""
    if device == "cpu":
        yield from _on_a_cpu(cfg, call, role)
    elif where == "host":
        yield from _beside_gpus(cfg, call)
    elif call in _REPLICA_CALLS:
        yield from _of_a_replica(cfg, call)
    else:
        yield from _of_training(cfg, call, role)


def _of_training(cfg: Config, call: str, role: str) -> Iterator[str]:
    """A GPU, while a training rank works on it."""
    yield from _micro_batches(cfg, call, role)
    if call == "publish":
        yield from _buckets(cfg)
    yield from _awake_cache(cfg)
    yield from _kept_on_the_gpu(cfg)
    yield from _half_precision(cfg, role)
    yield from _more_devices(cfg, role)


def _of_a_replica(cfg: Config, call: str) -> Iterator[str]:
    """A GPU, while a replica works on it. It starts before training takes anything, and has no cache during a sync."""
    if call in _SYNC_CALLS:
        yield from _buckets(cfg)
        yield from _awake_cache(cfg)
    else:
        yield _smaller_cache(cfg)
    if call in ("start", "generate"):
        yield f"lower {_ROLLOUT}.max_num_seqs (now {cfg.actor_rollout_ref.rollout.max_num_seqs})"
    if call != "start":
        yield from _kept_on_the_gpu(cfg)
        yield from _half_precision(cfg, "")
    per_node, parallel = cfg.trainer.n_gpus_per_node, cfg.actor_rollout_ref.rollout.tensor_model_parallel_size
    more = "" if parallel < per_node else f", and trainer.n_gpus_per_node (now {per_node}) with it"
    yield (
        f"raise {_ROLLOUT}.tensor_model_parallel_size (now {parallel}){more}: a replica is sharded over so many devices"
    )


def _beside_gpus(cfg: Config, call: str) -> Iterator[str]:
    """The host of GPUs: what leaves a GPU waits there, and models are read there first."""
    rollout = cfg.actor_rollout_ref.rollout
    for key, value in _offloads(cfg).items():
        if value is not False:
            yield f"set {key}=false (now {show(value)}), if the GPU has room for it"
    if rollout.free_cache_engine and rollout.sleep_level == 1:
        yield f"set {_ROLLOUT}.sleep_level=2 (now 1): weights are dropped, and come back with the next sync"
    if call in ("publish", *_SYNC_CALLS):
        yield from _buckets(cfg)
    per_node, reads_all = cfg.trainer.n_gpus_per_node, any(role.megatron is None for role in training_roles(cfg))
    if call in ("place", "start") and per_node > 1 and reads_all:
        yield f"lower trainer.n_gpus_per_node (now {per_node}): every rank reads whole models when it starts"


def _on_a_cpu(cfg: Config, call: str, role: str) -> Iterator[str]:
    """One memory for everyone: replicas never give theirs back, and what is offloaded stays in it."""
    cache, per_node = cfg.actor_rollout_ref.rollout.kv_cache_gb, cfg.trainer.n_gpus_per_node
    yield from _micro_batches(cfg, call, role)
    if call in ("publish", *_SYNC_CALLS):
        yield from _buckets(cfg)
    yield f"lower {_ROLLOUT}.kv_cache_gb (now {cache if cache is not None else 'null, which is 1'}): of each replica"
    if call in ("start", "generate"):
        yield f"lower {_ROLLOUT}.max_num_seqs (now {cfg.actor_rollout_ref.rollout.max_num_seqs})"
    for key, value in _offloads(cfg).items():
        if value is True:
            yield f"set {key}=false (now true): on a CPU it moves to the same memory"
    yield from _half_precision(cfg, None)
    if per_node > 1:
        yield f"lower trainer.n_gpus_per_node (now {per_node}): fewer ranks and replicas share this memory"


def _micro_batches(cfg: Config, call: str, role: str) -> Iterator[str]:
    if call not in ("forward", "update"):
        return
    key, budget = _budgets(cfg)[role]
    if budget > cfg.max_sequence_length:
        yield f"lower {key} (now {budget}; a sequence has up to {cfg.max_sequence_length} tokens)"
    if call == "update":
        model = cfg.critic.model if role == "critic" else cfg.actor_rollout_ref.model
        name = "critic.model" if role == "critic" else "actor_rollout_ref.model"
        if model.enable_gradient_checkpointing is not True:
            now = show(model.enable_gradient_checkpointing)
            yield f"set {name}.enable_gradient_checkpointing=true (now {now})"
        for each in training_roles(cfg):
            if (
                each.name == role
                and isinstance(each.engine, TrainedFsdpConfig)
                and each.engine.reshard_after_forward is False
            ):
                yield f"set {each.engine_key}.reshard_after_forward=auto (now false)"


def _budgets(cfg: Config) -> dict[str, tuple[str, int]]:
    roles = cfg.actor_rollout_ref
    return {
        "actor": (f"{_ACTOR}.ppo_max_token_len_per_gpu", roles.actor.ppo_max_token_len_per_gpu),
        "ref": (f"{_REF}.log_prob_max_token_len_per_gpu", roles.ref.log_prob_max_token_len_per_gpu),
        "critic": ("critic.ppo_max_token_len_per_gpu", cfg.critic.ppo_max_token_len_per_gpu),
    }


def _buckets(cfg: Config) -> Iterator[str]:
    megabytes = cfg.actor_rollout_ref.rollout.update_weights_bucket_megabytes
    yield f"lower {_ROLLOUT}.update_weights_bucket_megabytes (now {megabytes})"


def _smaller_cache(cfg: Config) -> str:
    rollout = cfg.actor_rollout_ref.rollout
    if rollout.kv_cache_gb is not None:
        return f"lower {_ROLLOUT}.kv_cache_gb (now {rollout.kv_cache_gb})"
    return f"lower {_ROLLOUT}.gpu_memory_utilization (now {rollout.gpu_memory_utilization})"


def _awake_cache(cfg: Config) -> Iterator[str]:
    """Where replicas do not sleep, they keep their cache while others work."""
    rollout = cfg.actor_rollout_ref.rollout
    if not rollout.free_cache_engine:
        yield f"set {_ROLLOUT}.free_cache_engine=true (now false)"
        yield _smaller_cache(cfg)
    elif rollout.sleep_level == 0:
        yield f"set {_ROLLOUT}.sleep_level=auto (now 0)"
        yield _smaller_cache(cfg)


def _kept_on_the_gpu(cfg: Config) -> Iterator[str]:
    for key, value in _offloads(cfg).items():
        if value is False:
            yield f"set {key}=auto (now false)"


def _half_precision(cfg: Config, name: str | None) -> Iterator[str]:
    """Of the role at work, and of those that never leave the device; None: of all."""
    for key in dict.fromkeys(
        f"{_ACTOR}.megatron" if role.megatron else role.engine_key  # Megatron's holds for all roles
        for role in training_roles(cfg)
        if role.model_dtype == "fp32" and (name in (None, role.name) or False in role.offloads.values())
    ):
        yield f"set {key}.model_dtype=bf16 (now fp32): half the weights and optimizer state, less precise"


def _more_devices(cfg: Config, name: str) -> Iterator[str]:
    """FSDP shards over the devices that there are; Megatron is told over how many. name: the role at work, "": all."""
    roles, now = [role for role in training_roles(cfg) if name in ("", role.name)], cfg.trainer.n_gpus_per_node
    if any(role.megatron is None for role in roles):
        yield f"raise trainer.n_gpus_per_node (now {now}): models are sharded over the devices"
    for role in roles:
        if (megatron := role.megatron) is not None:
            yield (
                f"raise {role.engine_key}.tensor_model_parallel_size (now {megatron.tensor_model_parallel_size}), and "
                f"trainer.n_gpus_per_node (now {now}) where it takes more devices"
            )


def _offloads(cfg: Config) -> dict[str, Auto]:
    """What training may move to host memory, by key; of each role first what is used least."""
    return {
        f"{role.engine_key}.{key}": role.offloads[key]
        for role in training_roles(cfg)
        for key in ("optimizer_offload", "param_offload")
        if key in role.offloads
    }
