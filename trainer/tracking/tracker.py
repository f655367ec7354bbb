"""One call per step; every sink gets it.

tracker = make_tracker(cfg, run_dir, total_steps=60)
tracker.log(1, {"reward/mean": 0.4, ...})
tracker.completions(1, rows)
tracker.finish(summary)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trainer.tracking.console import ConsoleSink, make_console
from trainer.tracking.jsonl import JsonlSink
from trainer.tracking.records import CompletionRow, Metrics, Sink
from trainer.tracking.rollout import ROLLOUT_FILE
from trainer.tracking.tensorboard import TensorBoardSink
from trainer.tracking.wandb import WandbSink

if TYPE_CHECKING:
    from trainer.config.schema import Config

__all__ = ["CompletionRow", "Tracker", "make_tracker"]


class Tracker:
    """Hands metrics, completions and the final summary to each sink, in order.

    An exception of a sink (a full disk, say) passes through with a note naming the sink.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Metrics) -> None:
        """Metrics of a step; step 0 is the validation before the first step. Names: docs/metrics.md."""
        for sink in self._sinks:
            with _named(sink):
                sink.log(step, metrics)

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """Sample completions of a step, for the table, completions.jsonl and the report."""
        if not rows:
            return
        for sink in self._sinks:
            with _named(sink):
                sink.completions(step, rows)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close every sink. `summary` is the content of summary.json; write the report before, the console names it."""
        for sink in self._sinks:
            with _named(sink):
                sink.finish(summary)


@contextmanager
def _named(sink: Sink) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"while writing to {type(sink).__name__}")
        raise


def make_tracker(
    cfg: Config,
    run_dir: Path,
    *,
    total_steps: int,
    resume_step: int | None = None,
    next_command: str = "",
    console: Console | None = None,
) -> Tracker:
    """The sinks of `trainer.logger`, after the JSONL files that are always written.

    resume_step: step of the checkpoint that the run continues from: what earlier processes wrote for later steps is
        dropped. None: a new run; metrics of an earlier run in the same directory are emptied.
    next_command: shown to the user at the end.
    console: rich console to print on, standard output by default.
    Raises ValueError for an unknown logger, or one whose package is not installed.
    """
    console = console or make_console()
    jsonl = JsonlSink(run_dir)
    jsonl.truncate_after(-1 if resume_step is None else resume_step)
    if resume_step is None:
        (run_dir / ROLLOUT_FILE).unlink(missing_ok=True)
    sinks: list[Sink] = [jsonl]
    for name in dict.fromkeys(cfg.trainer.logger):
        if name == "console":
            freq = cfg.trainer.log_completions_freq
            report = run_dir / "report.html"
            sinks.append(
                ConsoleSink(
                    console, total_steps=total_steps, completions_freq=freq, report=report, next_command=next_command
                )
            )
        elif name == "tensorboard":
            sinks.append(TensorBoardSink(run_dir, resume_step=resume_step))
        elif name == "wandb":
            sinks.append(_wandb_sink(cfg, run_dir, console))
        else:
            raise ValueError(f"trainer.logger={name!r} is not known: choose from console, tensorboard, wandb")
    return Tracker(sinks)


def _wandb_sink(cfg: Config, run_dir: Path, console: Console) -> WandbSink:
    return WandbSink(
        run_dir,
        project=cfg.trainer.project_name,
        name=cfg.trainer.experiment_name,
        config=cfg.model_dump(mode="json"),
        notice=lambda text: console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True),
    )
