"""Subcommand memory: what a plan predicts of a GPU's memory, against what short runs measure.

    python scripts/benchmark.py memory                   # W1 with the 1.5B and the 7B shape: 7 minutes on a GPU
    python scripts/benchmark.py memory --prompts 16      # shorter steps: peaks are those of a micro-batch all the same
    python scripts/benchmark.py memory --shapes 1.5b --set actor_rollout_ref.actor.strategy=megatron
    python scripts/benchmark.py memory --shapes tiny     # on a CPU: its mechanics only, nothing is predicted there

The work is that of w1: random weights, real runs. Each run writes its plan (plan.json) before it starts, and the peaks
of every step (metrics.jsonl) as it goes. Steps from the second on are compared: in the first, optimizer state is made.
Writes JSON (--out) and, beside it, the same as a Markdown table.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table
from subcommands import Command

from trainer.plan.build import PLAN
from trainer.tracking.run_data import History
from trainer.tracking.summary import versions

from . import launch
from .measure import Result, phase_memory
from .w1_model import write_inputs, write_weights
from .w1_work import SHAPES, Shape, overrides

LIMIT = 0.15
"""A prediction may be off by this share of what was measured."""
_GIB = 1 << 30
_OFFLOADED = "memory/offloaded_bytes/"


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    launch.add_common_options(parser, out="memory.json")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.5b", "7b"], help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--prompts", type=int, help="of a step, instead of the shape's")
    parser.set_defaults(eager=False, sampler_logprobs=False)


def run(options: Namespace, console: Console) -> int:
    """A run of each shape; writes, shows and checks."""
    runs = {name: measure(name, options, console) for name in options.shapes}
    missed = [line for name, found in runs.items() for line in missed_by(name, found)]
    result = {
        "benchmark": "memory",
        "command": launch.command_line(),
        "commit": launch.commit(),
        "versions": versions(),
        "machine": launch.machine(),
        "limit": LIMIT,
        "runs": runs,
        "missed": missed,
    }
    launch.write(options.out, result)
    options.out.with_suffix(".md").write_text(markdown(runs))
    console.print(table(runs))
    for line in missed:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if missed and options.check else 0


def measure(name: str, options: Namespace, console: Console) -> Result:
    """One run of w1's work with a shape, and its plan."""
    shape, model = SHAPES[name], launch.ROOT / ".cache" / "benchmarks" / f"qwen2-{name}"
    write_inputs(shape, model)
    write_weights(model, console)
    chosen: Shape = shape if options.prompts is None else replace(shape, prompts=options.prompts)
    asked = overrides(chosen, model, Namespace(**vars(options) | {"shape": name}))
    finished = launch.run(console, f"memory-{name}", asked, recipe="ppo_trainer")
    plan = json.loads((finished.run_dir / PLAN).read_text())
    return {"run_command": finished.command} | compare(plan, finished.history)


def compare(plan: Mapping[str, Any], history: History) -> Result:
    """Predicted and measured bytes of each phase that was measured; off: predicted over measured, less 1.

    Measured: the most of the steps from the second on. Predicted: None where nothing is (a CPU).
    """
    phases: Result = {}
    for phase, steps in phase_memory(history).items():
        measured = max(steps[1:] or steps)
        found = [each["phases"][phase] for each in plan["memory"] if phase in each["phases"]]
        predicted = max(found, key=lambda each: int(each["bytes"]), default=None)
        phases[phase] = {
            "measured_bytes": measured,
            "predicted_bytes": predicted and predicted["bytes"],
            "off": predicted and predicted["bytes"] / measured - 1,
            "predicted": predicted,
            "measured_steps": steps,
        }
    return {
        "phases": phases,
        "device_bytes": max(history.values("memory/device_bytes"), default=None),
        "planned_device_bytes": plan["devices"]["memory_bytes"],
        "offloaded_bytes": {
            name.removeprefix(_OFFLOADED): max(history.values(name))
            for name in sorted(history.series)
            if name.startswith(_OFFLOADED)
        },
        "kv_cache": plan["kv_cache"],
    }


def missed_by(name: str, found: Result) -> list[str]:
    """Phases whose prediction is off by more than LIMIT."""
    return [
        f"{name}, {phase}: predicted {_gib(each['predicted_bytes'])} GiB, measured {_gib(each['measured_bytes'])} GiB"
        for phase, each in found["phases"].items()
        if each["off"] is not None and abs(each["off"]) > LIMIT
    ]


def rows(runs: Mapping[str, Result]) -> list[tuple[str, str, str, str, str]]:
    """Shape, phase, predicted and measured GiB, and by how much they differ."""
    return [
        (name, phase, _gib(each["predicted_bytes"]), _gib(each["measured_bytes"]), _percent(each["off"]))
        for name, found in runs.items()
        for phase, each in found["phases"].items()
    ]


COLUMNS = ("shape", "phase", "predicted, GiB", "measured, GiB", "difference")


def markdown(runs: Mapping[str, Result]) -> str:
    """The comparison as a table for the docs."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|--:|--:|--:|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows(runs))]) + "\n"


def table(runs: Mapping[str, Result]) -> Table:
    """The comparison for people."""
    shown = Table(title="Memory of a GPU, predicted and measured", title_justify="left", box=None)
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name in ("shape", "phase") else "right")
    for row in rows(runs):
        shown.add_row(*row)
    return shown


def _gib(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / _GIB:.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:+.1%}"


COMMAND = Command("memory", "predicted memory of a GPU against what runs measure", add_options, run)
