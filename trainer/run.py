"""The life of a run: read inputs, start workers, resume, train, and leave a report, however it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray
from omegaconf import OmegaConf
from rich.console import Console

from trainer import checkpoint, placement
from trainer.actors import start_workers
from trainer.adaptation import Adaptation, adapt
from trainer.config.errors import complain, raise_problems, user_errors
from trainer.config.roles import training_roles
from trainer.config.schema import Config
from trainer.data.order import PromptOrder
from trainer.driver import Driver
from trainer.inputs import Inputs, load_inputs
from trainer.plan.build import Plan, make_plan
from trainer.plan.devices import Devices, planned_devices, real_devices
from trainer.plan.origins import Origins
from trainer.plan.places import planned_cluster
from trainer.plan.roles import role_rows
from trainer.plan.show import show_tables, show_tree
from trainer.scoring import RewardErrorRate
from trainer.session import Interrupted, Session, command_line
from trainer.setup import build
from trainer.shortage import explain
from trainer.specs import Sizes, sizes
from trainer.tracking.console import make_console
from trainer.tracking.phases import Phases
from trainer.tracking.summary import write_atomically
from trainer.tracking.tracker import make_tracker
from workers.group import WorkerError, WorkerOutOfMemory

DONE, FAILED, INTERRUPTED = 0, 1, 130


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything a run needs before its first actor starts.

    fingerprint: the model's shape, whether there is a critic, and the engines that train: what a checkpoint must share
        to be continued. How an engine spreads a model over devices is not part of it: checkpoints are re-sharded.
    """

    inputs: Inputs
    sizes: Sizes
    resume: checkpoint.Checkpoint | None
    cluster: placement.Cluster
    adaptation: Adaptation
    run_dir: Path
    fingerprint: dict[str, Any]
    plan: Plan


def run(cfg: Config, notices: Sequence[str], origins: Origins | None = None) -> int:
    """Runs a configuration to its end; returns the exit status: 0 done, 1 failed, 130 stopped by the user.

    origins: where values come from, for the plan. Raises UserError for inputs that cannot be used and for a plan that
    cannot work, before any actor starts.
    """
    started = psutil.Process().create_time()
    console = make_console()
    for notice in notices:
        console.print(f"note: {notice}", style="yellow", markup=False)
    try:
        with user_errors():
            prepared = _prepare(cfg, console, notices, origins)
        _show(cfg, prepared, console)
        raise_problems(prepared.plan.verdict.problems)
        return DONE if cfg.trainer.dry_run else _execute(cfg, prepared, started, console)
    except KeyboardInterrupt:
        complain("interrupted; the same command starts again, from the last checkpoint if there is one")
        return INTERRUPTED
    except WorkerOutOfMemory as error:
        complain("\n".join([explain(cfg, error, placement.device_type(cfg)), *getattr(error, "__notes__", ())]))
        return FAILED
    except (WorkerError, RewardErrorRate, checkpoint.CheckpointError) as error:
        complain("\n".join([str(error), *getattr(error, "__notes__", ())]))
        return FAILED
    finally:
        ray.shutdown()


def _prepare(cfg: Config, console: Console, notices: Sequence[str], origins: Origins | None) -> Prepared:
    """Everything that can be wrong, before any actor starts. Ray starts while tokenizer and data are read."""
    run_dir = Path(cfg.trainer.default_local_dir).resolve()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(load_inputs, cfg)
        if _uses_ray(cfg):
            placement.connect(cfg)
        inputs = reading.result()
    of_data = inputs.notices + inputs.train.notices + (inputs.validation.notices if inputs.validation else ())
    for notice in of_data:
        console.print(f"note: {notice}", style="yellow", markup=False)
    derived = sizes(cfg, inputs)
    trainer = cfg.trainer
    trained = {f"{role.key}.strategy": role.strategy for role in training_roles(cfg) if role.name != "ref"}
    fingerprint = inputs.fingerprint | {"critic": cfg.use_critic} | trained
    resume = checkpoint.choose(run_dir / "checkpoints", trainer.resume_mode, trainer.resume_from_path, fingerprint)
    if resume is not None:  # other data or another order would be refused later, with actors running
        PromptOrder(len(inputs.train), seed=cfg.data.seed, shuffle=cfg.data.shuffle).load_state_dict(
            resume.state["order"]
        )
    cluster, devices = _devices(cfg)
    adaptation = adapt(cfg, inputs, cluster)
    for notice in adaptation.notices:
        console.print(f"note: {notice}", style="yellow", markup=False)
    told = (*notices, *of_data, *adaptation.notices)
    plan = make_plan(cfg, inputs, derived, adaptation, devices, origins=origins, notices=told)
    return Prepared(inputs, derived, resume, cluster, adaptation, run_dir, fingerprint, plan)


def _uses_ray(cfg: Config) -> bool:
    """A dry run plans for devices that need not be here; it looks at a cluster only if one is named."""
    named = cfg.ray_kwargs.ray_init.address or os.environ.get("RAY_ADDRESS")
    return not cfg.trainer.dry_run or bool(named)


def _devices(cfg: Config) -> tuple[placement.Cluster, Devices]:
    """Those of the cluster, reserved; of a dry run without one, what the configuration asks for."""
    if _uses_ray(cfg):
        cluster = placement.reserve(cfg)
        return cluster, real_devices(cluster.device_type, ray.nodes(), os.environ)
    devices = planned_devices(cfg, os.environ)
    return planned_cluster(cfg, devices.kind), devices


def _show(cfg: Config, prepared: Prepared, console: Console) -> None:
    """The plan, where the run continues from, and where it is written."""
    plan = prepared.plan
    if cfg.trainer.dry_run:
        show_tree(console, plan)
    show_tables(console, plan, prepared.adaptation, role_rows(cfg, prepared.cluster))
    if prepared.resume is not None:
        console.print(f"resuming after step {prepared.resume.step} from {prepared.resume.path}", markup=False)
    console.print(f"run directory: {prepared.run_dir}", markup=False, soft_wrap=True)
    console.print(f"plan: {plan.write(prepared.run_dir)}", markup=False, soft_wrap=True)


def _execute(cfg: Config, prepared: Prepared, started: float, console: Console) -> int:
    run_dir, resume = prepared.run_dir, prepared.resume
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(cfg.model_dump(mode="json"))))
    console.print("starting workers ...", style="dim")
    workers = start_workers(cfg, prepared.inputs, prepared.cluster)
    phases = Phases()
    driver = build(cfg, prepared.inputs, workers, prepared.sizes, phases, prepared.adaptation.sampling)
    if resume is not None:
        _restore(driver, resume, cfg)
    driver.publish()
    tracker = make_tracker(
        cfg,
        run_dir,
        total_steps=prepared.sizes.total_steps,
        resume_step=None if resume is None else resume.step,
        console=console,
    )
    console.print(f"ready after {time.time() - started:.0f} s", style="dim")
    stop = _stop_on_signals(console)
    session = Session(cfg, prepared.inputs, driver, tracker, phases, run_dir, started, stop, prepared.fingerprint)
    try:
        session.train()
        return DONE
    except Interrupted:
        console.print(f"\nstopped after step {driver.state.step}. To go on, run the same command again:")
        console.print(f"  {command_line()}", style="bold", markup=False, soft_wrap=True)
        return INTERRUPTED
    finally:
        session.finish()


def _restore(driver: Driver, resume: checkpoint.Checkpoint, cfg: Config) -> None:
    driver.state.load_state_dict(resume.state)
    driver.actor.load(resume.path / "actor")
    if cfg.use_critic:
        driver.critic.load(resume.path / "critic")
    driver.state.weight_version -= 1  # the first publish gives the replicas these weights under their old number


def _stop_on_signals(console: Console) -> threading.Event:
    """Ctrl-C or SIGTERM: the first lets the step finish, a second ends at once."""
    requested = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        console.print("\nstopping after this step (again: at once, back to the last checkpoint)")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return requested
