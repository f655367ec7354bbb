"""What will run where, shown before it starts."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trainer.adaptation import Adaptation
from trainer.checkpoint import Checkpoint
from trainer.config.mapping import role_devices
from trainer.config.roles import TrainingRole, training_roles
from trainer.config.schema import Config, DeviceMapping
from trainer.inputs import Inputs
from trainer.placement import Cluster
from trainer.specs import Sizes
from trainer.tracking.console import batch_table, engine_table, startup_table

_ENGINES = {"fsdp": "FSDP2", "megatron": "Megatron"}
_NAMES = {"ref": "reference"}


def show_plan(
    console: Console,
    cfg: Config,
    inputs: Inputs,
    sizes: Sizes,
    cluster: Cluster,
    adaptation: Adaptation,
    resume: Checkpoint | None,
    run_dir: Path,
) -> None:
    """Prints roles, devices, what vLLM runs with, derived batch sizes, and where the run continues from."""
    console.print(startup_table(role_rows(cfg, cluster)))
    console.print(engine_table(adaptation.version, adaptation.choices))
    console.print(batch_table(batch_sizes(cfg, inputs, sizes)))
    if resume is not None:
        console.print(f"resuming after step {resume.step} from {resume.path}", markup=False)
    console.print(f"run directory: {run_dir}", markup=False, soft_wrap=True)


def role_rows(cfg: Config, cluster: Cluster) -> list[dict[str, object]]:
    """One row per role: devices, engine, parallelism, precision."""
    total, rollout = len(cluster.devices), cfg.actor_rollout_ref.rollout

    def row(role: str, mapping: DeviceMapping, engine: str, parallel: str, dtype: str) -> dict[str, object]:
        named = mapping if mapping is not None else f"0-{total - 1}" if total > 1 else 0
        devices = f"{cluster.device_type} {named}"
        return {"role": role, "devices": devices, "engine": engine, "parallelism": parallel, "compute": dtype}

    rows = []
    for role in training_roles(cfg):
        mapping = role.config.device_mapping
        num_ranks = len(role_devices(mapping, f"{role.key}.device_mapping", num_devices=total))
        engine, dtype = _ENGINES[role.strategy], role.engine.dtype
        rows.append(row(_NAMES.get(role.name, role.name), mapping, engine, parallelism(role, num_ranks), dtype))
    replicas = len(role_devices(rollout.device_mapping, "rollout", num_devices=total))
    tp = rollout.tensor_model_parallel_size
    rows.append(row("rollout", rollout.device_mapping, "vLLM", f"{replicas // tp} x tp {tp}", rollout.dtype))
    return rows


def parallelism(role: TrainingRole, num_ranks: int) -> str:
    """How a role's model lies on its ranks, e.g. "2 ranks", or "tp 2 x pp 1 x dp 4 (ep 2)" with Megatron."""
    megatron = role.megatron
    if megatron is None:
        return f"{num_ranks} ranks" if num_ranks > 1 else "1 rank"
    tensor, pipeline = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    expert = f" (ep {megatron.expert_model_parallel_size})" if megatron.expert_model_parallel_size > 1 else ""
    return f"tp {tensor} x pp {pipeline} x dp {num_ranks // role.ranks_per_model}{expert}"


def batch_sizes(cfg: Config, inputs: Inputs, sizes: Sizes) -> dict[str, object]:
    """Derived sizes, by name."""
    data, rollout = cfg.data, cfg.actor_rollout_ref.rollout
    validation = 0 if inputs.validation is None else len(inputs.validation)
    return {
        "training prompts": len(inputs.train),
        "validation prompts": validation,
        "prompts per step (data.train_batch_size)": data.train_batch_size,
        "responses per step (x rollout.n)": data.train_batch_size * rollout.n,
        "actor updates per step": sizes.actor_updates_per_step,
        "steps per epoch": sizes.steps_per_epoch,
        "steps in all": sizes.total_steps,
    }
