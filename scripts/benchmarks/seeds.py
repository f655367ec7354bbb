"""Subcommand quickstart-seeds: what the full quick-start recipe learns, for several seeds, and its learning curve."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from subcommands import Command

from trainer.tracking.report import learning_curve_svg
from trainer.tracking.run_data import History

from . import floors, launch

SEED_KEYS = ("data.seed", "actor_rollout_ref.rollout.seed", "actor_rollout_ref.actor.data_loader_seed")
COLUMNS = (
    "accuracy_before",
    "accuracy_after",
    "greedy_before",
    "greedy_after",
    "steps",
    "seconds_to_first_step",
    "seconds_total",
)
"""Entries of summary.json that are kept of each run."""
KINDS = ("accuracy", "greedy")


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    launch.add_common_options(parser, out="quickstart-seeds.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--svg", type=Path, help="where to draw the learning curves")


def run(options: Namespace, console: Console) -> int:
    """Train once per seed, write, draw, show and check every seed."""
    runs = []
    for seed in options.seeds:
        overrides = [*(f"{key}={seed}" for key in SEED_KEYS), *options.set]
        runs.append(launch.run(console, f"quickstart-seed{seed}", overrides, recipe="quickstart"))
    rows = [
        {"seed": seed, **{name: one.summary[name] for name in COLUMNS}, "command": one.command}
        for seed, one in zip(options.seeds, runs, strict=True)
    ]
    lacking = [f"seed {row['seed']}: {line}" for row in rows for line in floors.missed(row, floors.QUICKSTART_SEEDS)]
    result = {
        "benchmark": "quickstart-seeds",
        "commit": launch.commit(),
        "versions": runs[0].summary["versions"],
        "machine": launch.machine(),
        "seeds": rows,
        "missed": lacking,
    }
    launch.write(options.out, result)
    if options.svg is not None:
        draw(options.svg, [one.history for one in runs], num_cores=result["machine"]["cores"])
    console.print(table(rows))
    for line in lacking:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if lacking and options.check else 0


def draw(path: Path, runs: Sequence[History], *, num_cores: int) -> None:
    """The learning curves of the runs, with their mean, as one SVG."""
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(learning_curve_svg(runs, title=f"Two-digit addition by GRPO on {num_cores} CPU cores, {seeds}"))


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row per seed."""
    shown = Table(title="Held-out accuracy, before and after", title_justify="left", box=None)
    for name in ("seed", "sampled", "greedy", "steps", "seconds"):
        shown.add_column(name, justify="right")
    for row in rows:
        change = [f"{_percent(row[f'{kind}_before'])} -> {_percent(row[f'{kind}_after'])}" for kind in KINDS]
        shown.add_row(str(row["seed"]), *change, str(row["steps"]), f"{row['seconds_total']:.0f}")
    return shown


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


COMMAND = Command("quickstart-seeds", "accuracy for several seeds, and the learning curve", add_options, run)
