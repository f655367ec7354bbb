"""The life of a run: read inputs, start workers, resume, train, and leave a report, however it ends."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
from omegaconf import OmegaConf
from rich.console import Console

from trainer import checkpoint, placement
from trainer.config.errors import user_errors
from trainer.config.schema import Config
from trainer.driver import Driver
from trainer.inputs import Inputs, load_inputs
from trainer.measure import Metrics
from trainer.plan import show_plan
from trainer.roles import TrainRole
from trainer.samples import Samples
from trainer.setup import Workers, build, start_workers
from trainer.specs import Sizes, sizes
from trainer.tracking.console import make_console
from trainer.tracking.phases import Phases
from trainer.tracking.records import CompletionRow
from trainer.tracking.report import write_report
from trainer.tracking.summary import write_atomically, write_summary
from trainer.tracking.tracker import Tracker, make_tracker

COMPLETIONS_PER_STEP = 8


class Interrupted(Exception):
    """The user asked for a stop and the step under way was finished."""


@dataclass(slots=True)
class Stop:
    """Ctrl-C or SIGTERM: the first lets the step finish, a second ends at once."""

    requested: threading.Event = field(default_factory=threading.Event)

    def install(self, console: Console) -> None:
        """Takes the signals over; only possible in the main thread."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.requested.is_set():
                raise KeyboardInterrupt
            self.requested.set()
            console.print("\nstopping after this step (again: at once, back to the last checkpoint)")

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)


@dataclass(slots=True)
class Run:
    """One process of a run, from start to report."""

    cfg: Config
    inputs: Inputs
    sizes: Sizes
    driver: Driver
    tracker: Tracker
    phases: Phases
    run_dir: Path
    started: float
    stop: Stop
    first_step_at: float | None = None
    saving: Metrics = field(default_factory=dict)

    def train(self) -> None:
        """All steps that are left. Raises Interrupted after a requested stop."""
        driver = self.driver
        if driver.state.step == 0 and self.cfg.trainer.val_before_train:
            metrics, samples = driver.validate()
            self.tracker.log(0, metrics | self.phases.metrics())
            if samples is not None:
                self.tracker.completions(0, self._val_rows(samples))
        while not driver.finished:
            self._one_step()
            if self.stop.requested.is_set() and not driver.finished:
                if not driver.is_checkpoint_due():
                    self.save()
                raise Interrupted

    def _one_step(self) -> None:
        driver = self.driver
        self.phases.step(driver.state.step + 1)
        self.first_step_at = self.first_step_at or time.time()
        samples, metrics = driver.step()
        validated: Samples | None = None
        if driver.is_validation_due():
            measured, validated = driver.validate()
            metrics |= measured
        metrics |= self._throughput(samples) | self._position() | self.saving
        self._record(self.phases.metrics() | metrics, samples)
        self.saving = {}
        if validated is not None:
            self.tracker.completions(driver.state.step, self._val_rows(validated))
        if driver.is_checkpoint_due():
            self.save()  # after the line is written: a kill in between repeats the step, and never loses it

    def save(self) -> Path:
        """Writes a checkpoint of now. Its seconds are logged with the next step."""
        begun = time.monotonic()
        with self.phases("checkpoint"):
            path = self._write_checkpoint()
        self.saving = {"time/checkpoint": time.monotonic() - begun}
        return path

    def _write_checkpoint(self) -> Path:
        driver, cfg = self.driver, self.cfg
        writers = {"actor": driver.actor.save}
        if cfg.use_critic:
            writers["critic"] = driver.critic.save
        if "hf_model" in cfg.actor_rollout_ref.actor.checkpoint.save_contents:
            writers["hf_model"] = self._save_hf
        return checkpoint.write(
            self.run_dir / "checkpoints",
            driver.state.step,
            state=driver.state.state_dict(),
            fingerprint=self.inputs.fingerprint,
            writers=writers,
            keep=cfg.trainer.max_actor_ckpt_to_keep,
        )

    def _save_hf(self, directory: Path) -> None:
        assert isinstance(self.driver.actor, TrainRole)
        self.driver.actor.save_hf(directory)
        self.inputs.tokenizer.save_pretrained(directory)

    def finish(self) -> dict[str, Any]:
        """Summary and report of what there is; returns the summary."""
        first = None if self.first_step_at is None else self.first_step_at - self.started
        summary = write_summary(
            self.run_dir,
            command=command_line(),
            seconds_total=time.time() - self.started,
            seconds_to_first_step=first,
            seconds_per_phase=self.phases.totals,
        )
        write_report(self.run_dir)
        self.tracker.finish(summary)
        return summary

    def _record(self, metrics: Metrics, samples: Samples) -> None:
        step = self.driver.state.step
        self.tracker.log(step, metrics)
        every = self.cfg.trainer.log_completions_freq
        if every and (step == 1 or step % every == 0):
            self.tracker.completions(step, self._rows(samples, "train", COMPLETIONS_PER_STEP))

    def _val_rows(self, samples: Samples) -> list[CompletionRow]:
        return self._rows(samples, "val", self.cfg.trainer.log_val_generations)

    def _rows(self, samples: Samples, phase: str, count: int) -> list[CompletionRow]:
        """`count` samples spread evenly over the batch."""
        count = min(count, len(samples))
        spread = [len(samples) * i // count for i in range(count)]
        advantages = samples.sequence_means("advantages") if "advantages" in samples.columns else None
        rows = []
        for row in spread:
            prompt, response = (str(self.inputs.tokenizer.decode(ids)) for ids in samples.fetch_tokens(row))
            truth = samples.prompts[int(samples.meta.group[row])].ground_truth
            rows.append(
                CompletionRow(
                    phase=phase,
                    prompt=prompt,
                    response=response,
                    reward=float(samples.rewards[row]),
                    advantage=None if advantages is None else float(advantages[row]),
                    finish_reason=samples.finish_reason(row),
                    ground_truth="" if truth is None else str(truth),
                )
            )
        return rows

    def _throughput(self, samples: Samples) -> Metrics:
        times = self.phases.metrics()
        work = times["time/step"] - times.get("time/validate", 0.0)
        meta = samples.meta
        tokens = float((meta.prompt_length + meta.response_length).sum())
        return {
            "perf/tokens": tokens,
            "perf/tokens_per_second": tokens / work,
            "memory/rollout_peak_bytes": float(self.driver.source.peak_bytes),
            "perf/generate_tokens_per_second": samples.num_tokens / times["time/generate"],
        }

    def _position(self) -> Metrics:
        order = self.driver.state.order
        return {
            "data/epoch": float(order.epoch),
            "data/position": float(order.position),
            "data/truncated_prompts": float(self.inputs.train.num_truncated),
        }


def run(cfg: Config, notices: Sequence[str]) -> int:
    """Runs a configuration to its end; returns the exit status (0 done, 130 stopped by the user).

    Raises UserError for inputs that cannot be used, before any actor starts.
    """
    started = psutil.Process().create_time()
    console = make_console()
    for notice in notices:
        console.print(f"note: {notice}", style="yellow", markup=False)
    run_dir = Path(cfg.trainer.default_local_dir).resolve()
    stop = Stop()
    try:
        with user_errors():
            inputs, derived, resume, cluster = _prepare(cfg, run_dir)
        show_plan(console, cfg, inputs, derived, cluster, resume, run_dir)
        if cfg.trainer.dry_run:
            return 0
        stop.install(console)
        return _execute(cfg, inputs, derived, cluster, resume, run_dir, started, stop, console)
    finally:
        ray.shutdown()


def command_line() -> str:
    """The command that runs this again."""
    return " ".join(["python -m trainer.main", *sys.argv[1:]])


def _prepare(cfg: Config, run_dir: Path) -> tuple[Inputs, Sizes, checkpoint.Checkpoint | None, placement.Cluster]:
    """Everything that can be wrong, before any actor starts. Ray starts while tokenizer and data are read."""
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(load_inputs, cfg)
        placement.connect(cfg)
        inputs = reading.result()
    for notice in inputs.train.notices + (inputs.validation.notices if inputs.validation else ()):
        print(f"note: {notice}", file=sys.stderr)
    derived = sizes(cfg, inputs)
    trainer = cfg.trainer
    resume = checkpoint.choose(
        run_dir / "checkpoints", trainer.resume_mode, trainer.resume_from_path, inputs.fingerprint
    )
    return inputs, derived, resume, placement.reserve(cfg)


def _execute(
    cfg: Config,
    inputs: Inputs,
    derived: Sizes,
    cluster: placement.Cluster,
    resume: checkpoint.Checkpoint | None,
    run_dir: Path,
    started: float,
    stop: Stop,
    console: Console,
) -> int:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(cfg.model_dump(mode="json"))))
    console.print("starting workers ...", style="dim")
    workers: Workers = start_workers(cfg, inputs, cluster)
    phases = Phases()
    driver = build(cfg, inputs, workers, derived, phases)
    if resume is not None:
        _restore(driver, resume, cfg)
    tracker = make_tracker(
        cfg,
        run_dir,
        total_steps=derived.total_steps,
        resume_step=None if resume is None else resume.step,
        console=console,
    )
    driver.publish()
    console.print(f"ready after {time.time() - started:.0f} s", style="dim")
    session = Run(cfg, inputs, derived, driver, tracker, phases, run_dir, started, stop)
    try:
        session.train()
        return 0
    except Interrupted:
        console.print(f"stopped after step {driver.state.step}; the same command resumes: {command_line()}")
        return 130
    finally:
        session.finish()


def _restore(driver: Driver, resume: checkpoint.Checkpoint, cfg: Config) -> None:
    with user_errors():
        driver.state.load_state_dict(resume.state)
    driver.actor.load(resume.path / "actor")
    if cfg.use_critic:
        driver.critic.load(resume.path / "critic")
    driver.state.weight_version -= 1  # the first publish gives the replicas these weights under their old number
