"""The steps of one process of a run, what it records of them, and its checkpoints."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.checkpoint import CheckpointError
from trainer.config.errors import UserError
from trainer.config.schema import Config
from trainer.driver import Driver
from trainer.inputs import Inputs
from trainer.measure import Metrics
from trainer.roles import TrainRole
from trainer.samples import Samples
from trainer.scoring import RewardErrorRate
from trainer.tracking.phases import Phases
from trainer.tracking.records import CompletionRow
from trainer.tracking.report import write_report
from trainer.tracking.run_data import read_history
from trainer.tracking.summary import write_summary
from trainer.tracking.tracker import Tracker
from workers.group import WorkerError

COMPLETIONS_PER_STEP = 8


class Interrupted(Exception):
    """The user asked for a stop, the step under way was finished and saved."""


@dataclass(slots=True)
class Session:
    """One process of a run: its steps, what it records of them, and its checkpoints."""

    cfg: Config
    inputs: Inputs
    driver: Driver
    tracker: Tracker
    phases: Phases
    run_dir: Path
    started: float
    stop: threading.Event
    fingerprint: dict[str, Any]
    first_step_at: float | None = None

    def train(self) -> None:
        """All steps that are left. Raises Interrupted after a requested stop."""
        driver = self.driver
        if driver.state.step == 0 and self.cfg.trainer.val_before_train:
            self.phases.step(0)
            metrics, samples = driver.validate()
            if samples is not None:
                self.tracker.log(0, metrics | driver.source.take_metrics() | self.phases.metrics())
                self.tracker.completions(0, self._val_rows(samples))
        self.phases.step(driver.state.step + 1)
        while not driver.finished:
            self._one_step()
            if self.stop.is_set() and not driver.finished:
                if not driver.is_checkpoint_due():
                    self.save()
                raise Interrupted

    def _one_step(self) -> None:
        driver = self.driver
        self.first_step_at = self.first_step_at or time.time()
        before = driver.state.state_dict()
        try:
            samples, metrics = driver.step()
        except (RewardErrorRate, UserError):  # nothing was trained: what was learned is kept, the step begins anew
            driver.state.load_state_dict(before)
            self.save()
            raise
        measured, validated, failed = self._validate()
        metrics |= measured
        metrics |= driver.source.take_metrics() | self._throughput(samples) | self._position()
        self._record(metrics | self.phases.metrics(), samples)
        if validated is not None:
            self.tracker.completions(driver.state.step, self._val_rows(validated))
        self.phases.step(driver.state.step + 1)
        if failed is not None:
            self._save_before(failed)
            raise failed
        if driver.is_checkpoint_due():
            self.save()  # after the line is written: a kill in between repeats the step, and never loses it

    def _validate(self) -> tuple[Metrics, Samples | None, RuntimeError | None]:
        """What the validation that is due says; an error that ends the run, but not before the step has been kept."""
        if not self.driver.is_validation_due():
            return {}, None, None
        try:
            return *self.driver.validate(), None
        except (RewardErrorRate, WorkerError) as error:
            return {}, None, error

    def _save_before(self, failed: RuntimeError) -> None:
        """Writes a checkpoint although the run ends with `failed`: the step was trained, only its validation failed."""
        try:
            self.save()
        except (WorkerError, CheckpointError) as error:
            failed.add_note(f"the step before it is not kept either: {error}")

    def save(self) -> Path:
        """Writes a checkpoint of now."""
        driver, cfg = self.driver, self.cfg
        writers = {"actor": driver.actor.save}
        if cfg.use_critic:
            writers["critic"] = driver.critic.save
        if "hf_model" in cfg.actor_rollout_ref.actor.checkpoint.save_contents:
            writers["hf_model"] = self._save_hf
        with self.phases("checkpoint"), driver.source.aside():
            return checkpoint.write(
                self.run_dir / "checkpoints",
                driver.state.step,
                state=driver.state.state_dict(),
                fingerprint=self.fingerprint,
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
        if read_history(self.run_dir).series:  # nothing was recorded if the first step failed
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
        decode = self.inputs.tokenizer.decode
        rows = []
        for row in spread:
            prompt, response = samples.fetch_tokens(row)
            truth = samples.prompts[int(samples.meta.group[row])].ground_truth
            rows.append(
                CompletionRow(
                    phase=phase,
                    prompt=str(decode(prompt)),
                    response=str(decode(response, skip_special_tokens=True)),  # what the reward function gets
                    reward=float(samples.rewards[row]),
                    advantage=None if advantages is None else float(advantages[row]),
                    finish_reason=samples.finish_reason(row),
                    ground_truth="" if truth is None else str(truth),
                )
            )
        return rows

    def _throughput(self, samples: Samples) -> Metrics:
        times = self.phases.metrics()
        work = times["time/step"] - times.get("time/validate", 0.0) - times.get("time/checkpoint", 0.0)
        meta = samples.meta
        tokens = float((meta.prompt_length + meta.response_length).sum())
        return {
            "perf/tokens": tokens,
            "perf/tokens_per_second": tokens / work,
            "perf/generate_tokens_per_second": samples.num_tokens / times["time/generate"],
        }

    def _position(self) -> Metrics:
        order = self.driver.state.order
        return {
            "data/epoch": float(order.epoch),
            "data/position": float(order.position),
            "data/truncated_prompts": float(self.inputs.train.num_truncated),
        }


def command_line() -> str:
    """The command that runs this again."""
    return "python -m trainer.main " + shlex.join(sys.argv[1:])
