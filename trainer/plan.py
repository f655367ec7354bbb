"""What will run where, shown before it starts."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trainer.adaptation import Adaptation
from trainer.checkpoint import Checkpoint
from trainer.config.schema import Config
from trainer.inputs import Inputs
from trainer.placement import Cluster
from trainer.specs import Sizes
from trainer.tracking.console import batch_table, engine_table, startup_table


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
    family = cfg.actor_rollout_ref
    total = len(cluster.devices)
    kind = cluster.device_type

    def row(role: str, mapping: object, engine: str, parallel: str, dtype: str) -> dict[str, object]:
        devices = (
            f"{kind} 0-{total - 1}" if mapping is None and total > 1 else f"{kind} {0 if mapping is None else mapping}"
        )
        return {"role": role, "devices": devices, "engine": engine, "parallelism": parallel, "compute": dtype}

    fsdp = f"{total} ranks" if total > 1 else "1 rank"
    replicas = total // family.rollout.tensor_model_parallel_size
    rows = [row("actor", family.actor.device_mapping, "FSDP2", fsdp, family.actor.fsdp_config.dtype)]
    if cfg.use_reference:
        rows.append(row("reference", family.ref.device_mapping, "FSDP2", fsdp, family.ref.fsdp_config.dtype))
    if cfg.use_critic:
        rows.append(row("critic", cfg.critic.device_mapping, "FSDP2", fsdp, cfg.critic.fsdp.dtype))
    tp = family.rollout.tensor_model_parallel_size
    rows.append(row("rollout", family.rollout.device_mapping, "vLLM", f"{replicas} x tp {tp}", family.rollout.dtype))
    return rows


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
