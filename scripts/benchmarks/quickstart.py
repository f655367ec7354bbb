"""Subcommand quickstart: seconds per step of the quick start, where they go, and how long it takes to begin."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from rich.console import Console
from rich.table import Table
from subcommands import Command

from . import floors, launch
from .measure import combine, measure

OVERRIDES = ("trainer.val_before_train=false", "trainer.test_freq=-1")  # validation once, after the last step


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    launch.add_common_options(parser, out="quickstart.json")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="runs; the result is the median of each number")
    parser.add_argument("--ranks", type=int, choices=(1, 2), help="training ranks and replicas (default: the recipe's)")


def run(options: Namespace, console: Console) -> int:
    """Measure, write, show and check."""
    overrides = [f"trainer.total_training_steps={options.steps}", *OVERRIDES, *options.set]
    if options.ranks is not None:
        overrides.append(f"trainer.n_gpus_per_node={options.ranks}")
    runs = [launch.run(console, "quickstart", overrides, recipe="quickstart") for _ in range(options.repeat)]
    results = [measure(one.history, one.summary) | {"load_before": one.load_before} for one in runs]
    result = {
        "benchmark": "quickstart",
        "command": runs[0].command,
        "commit": launch.commit(),
        "versions": runs[0].summary["versions"],
        "machine": launch.machine(),
        **combine(results),
        "runs": results,
    }
    lacking = floors.missed(result, floors.QUICKSTART)
    launch.write(options.out, result | {"missed": lacking})
    console.print(table(result))
    for line in lacking:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if lacking and options.check else 0


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    step = result["seconds_per_step"]
    shown = Table(title=f"Quick start: {step['median']:.3f} s per step", title_justify="left", box=None)
    for name in ("phase", "median ms", "share"):
        shown.add_column(name, justify="left" if name == "phase" else "right")
    for name, phase in result["phases"].items():
        shown.add_row(name, f"{1000 * phase['seconds']:.1f}", f"{phase['share']:.1%}")
    shown.add_section()
    shown.add_row("overhead", "", f"{result['overhead_share']:.1%}", style="bold")
    shown.add_row("step, 10 % to 90 %", f"{1000 * step['p10']:.0f} to {1000 * step['p90']:.0f}", "")
    shown.add_row("first step after", f"{result['seconds_to_first_step']:.1f} s", "")
    shown.add_row("tokens per second", f"{result['tokens_per_second']:,.0f}", "")
    for kind, num_bytes in result["peak_memory_bytes"].items():
        shown.add_row(f"memory, {kind}", f"{num_bytes / 2**20:,.0f} MiB", "")
    return shown


COMMAND = Command("quickstart", "seconds per step of the quick start, by phase, and start-up", add_options, run)
