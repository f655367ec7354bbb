"""The life of a run: read inputs, start workers, resume, train, and leave a report, however it ends."""

from __future__ import annotations

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
from trainer.config.errors import complain, user_errors
from trainer.config.roles import training_roles
from trainer.config.schema import Config
from trainer.data.order import PromptOrder
from trainer.driver import Driver
from trainer.inputs import Inputs, load_inputs
from trainer.plan import show_plan
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


def run(cfg: Config, notices: Sequence[str]) -> int:
    """Runs a configuration to its end; returns the exit status: 0 done, 1 failed, 130 stopped by the user.

    Raises UserError for inputs that cannot be used, before any actor starts.
    """
    started = psutil.Process().create_time()
    console = make_console()
    for notice in notices:
        console.print(f"note: {notice}", style="yellow", markup=False)
    try:
        with user_errors():
            prepared = _prepare(cfg, console)
        show_plan(
            console,
            cfg,
            prepared.inputs,
            prepared.sizes,
            prepared.cluster,
            prepared.adaptation,
            prepared.resume,
            prepared.run_dir,
        )
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


def _prepare(cfg: Config, console: Console) -> Prepared:
    """Everything that can be wrong, before any actor starts. Ray starts while tokenizer and data are read."""
    run_dir = Path(cfg.trainer.default_local_dir).resolve()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(load_inputs, cfg)
        placement.connect(cfg)
        inputs = reading.result()
    for notice in inputs.train.notices + (inputs.validation.notices if inputs.validation else ()):
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
    cluster = placement.reserve(cfg)
    adaptation = adapt(cfg, inputs, cluster)
    for notice in adaptation.notices:
        console.print(f"note: {notice}", style="yellow", markup=False)
    return Prepared(inputs, derived, resume, cluster, adaptation, run_dir, fingerprint)


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
