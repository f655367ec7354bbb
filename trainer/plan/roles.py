"""Roles on devices, for people and for the plan's file."""

from __future__ import annotations

from trainer.config.mapping import replica_devices
from trainer.config.roles import TrainingRole, training_roles
from trainer.config.schema import Config
from trainer.placement import Cluster
from trainer.plan.places import named, ranks_of

_ENGINES = {"fsdp": "FSDP2", "megatron": "Megatron"}
_NAMES = {"ref": "reference"}
Row = dict[str, object]


def role_rows(cfg: Config, cluster: Cluster) -> list[Row]:
    """One row per role: devices, engine, parallelism, precision."""
    total, rollout = len(cluster.devices), cfg.actor_rollout_ref.rollout
    kind = cluster.device_type

    def row(role: str, devices: object, engine: str, parallel: str, dtype: str) -> Row:
        return {
            "role": role,
            "devices": f"{kind} {devices}",
            "engine": engine,
            "parallelism": parallel,
            "compute": dtype,
        }

    rows = []
    for role in training_roles(cfg):
        devices = named(role.config.device_mapping, total)
        parallel = parallelism(role, len(ranks_of(role, total)))
        engine = _ENGINES[role.strategy]
        rows.append(row(_NAMES.get(role.name, role.name), devices, engine, parallel, role.engine.dtype))
    replicas, tp = len(replica_devices(cfg)), rollout.tensor_model_parallel_size
    devices = named(rollout.device_mapping, total)
    rows.append(row("rollout", devices, "vLLM", f"{replicas} x tp {tp}", rollout.dtype))
    return rows


def parallelism(role: TrainingRole, num_ranks: int) -> str:
    """How a role's model lies on its ranks, e.g. "2 ranks", or "tp 2 x pp 1 x dp 4 (ep 2)" with Megatron."""
    megatron = role.megatron
    if megatron is None:
        return f"{num_ranks} ranks" if num_ranks > 1 else "1 rank"
    tensor, pipeline = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    expert = f" (ep {megatron.expert_model_parallel_size})" if megatron.expert_model_parallel_size > 1 else ""
    return f"tp {tensor} x pp {pipeline} x dp {num_ranks // role.ranks_per_model}{expert}"


def role_records(cfg: Config) -> list[Row]:
    """The same for programs: numbers and lists of devices."""
    records: list[Row] = []
    for role in training_roles(cfg):
        devices, megatron = ranks_of(role, cfg.num_devices), role.megatron
        records.append(
            {
                "role": role.name,
                "engine": role.strategy,
                "devices": list(devices),
                "data_parallel": len(devices) // role.ranks_per_model,
                "tensor_parallel": megatron.tensor_model_parallel_size if megatron else 1,
                "pipeline_parallel": megatron.pipeline_model_parallel_size if megatron else 1,
                "expert_parallel": megatron.expert_model_parallel_size if megatron else 1,
                "sharded_over": 1 if megatron else len(devices),
                "dtype": role.engine.dtype,
                "master_dtype": role.model_dtype,
            }
        )
    replicas = replica_devices(cfg)
    rollout = cfg.actor_rollout_ref.rollout
    return [
        *records,
        {
            "role": "rollout",
            "engine": rollout.name,
            "devices": [device for devices in replicas for device in devices],
            "data_parallel": len(replicas),
            "tensor_parallel": rollout.tensor_model_parallel_size,
            "pipeline_parallel": 1,
            "expert_parallel": 1,
            "sharded_over": 1,
            "dtype": rollout.dtype,
            "master_dtype": None,
        },
    ]
