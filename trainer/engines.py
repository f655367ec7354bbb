"""From the settings of a training role's engine to the plain ones it is built from: parallelism, precision, offload."""

from __future__ import annotations

from trainer.config.roles import TrainingRole
from trainer.config.schema import RefMegatronConfig
from workers.engines.base import ParallelSpec, ShardSpec
from workers.settings import Auto

_MASTER_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_PARTS = {"param_offload": "weights", "optimizer_offload": "optimizer"}


def parallel_spec(role: TrainingRole) -> ParallelSpec:
    """How a role's model is cut; FSDP shards over all ranks."""
    megatron = role.megatron
    if megatron is None:
        return ParallelSpec()
    return ParallelSpec(
        tensor=megatron.tensor_model_parallel_size,
        pipeline=megatron.pipeline_model_parallel_size,
        virtual_pipeline=megatron.virtual_pipeline_model_parallel_size,
        sequence=role.actor.megatron.sequence_parallel,
        expert=megatron.expert_model_parallel_size,
    )


def shard_spec(role: TrainingRole) -> ShardSpec:
    """Precision (a model that is not trained is stored as it computes), and what FSDP gathers when."""
    engine, stored = role.engine, role.engine.dtype if role.model_dtype is None else _MASTER_DTYPES[role.model_dtype]
    if isinstance(engine, RefMegatronConfig):
        return ShardSpec(engine.dtype, stored, reshard_after_forward=False, wrap_min_num_params=0)
    wrap_min_num_params = role.actor.fsdp_config.wrap_min_num_params
    return ShardSpec(engine.dtype, stored, engine.reshard_after_forward, wrap_min_num_params)


def offloads(role: TrainingRole) -> dict[str, Auto]:
    """When the parts of a role's engine leave the device."""
    return {_PARTS[key]: when for key, when in role.offloads.items()}
