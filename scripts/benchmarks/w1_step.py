"""w1 as a whole: the program runs steps as a user would start it, and its run directory is read."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from trainer.plan.build import PLAN

from . import launch
from .measure import (
    MEMORY,
    WORK,
    Result,
    memory_growth,
    memory_growth_share,
    phase_memory,
    phase_seconds,
    share_of_each,
)
from .w1_model import write_weights
from .w1_work import PEAK_FLOPS, Shape, overrides

MFU_FORMULA = (
    "FLOPs / seconds / 989e12 / GPUs of the role; FLOPs of the reference: one forward pass, of the update: 3; forward: "
    "2 per weight and token, causal attention, a group's prompt once, logits of responses only; recomputation not "
    "counted"
)


def measure(shape: Shape, model: Path, options: Namespace, console: Console) -> Result:
    """Seconds, share and memory of each phase and step, tokens per second, MFU."""
    write_weights(model, console)
    finished = launch.run(console, "w1", overrides(shape, model, options), recipe="ppo_trainer")
    return {"run_command": finished.command, "load_before": finished.load_before} | read(finished, shape)


def read(finished: launch.Finished, shape: Shape) -> Result:
    """What the run directory tells. Steps without the first, but for memory, which is of all.

    devices: of the run, whatever they do. memory_growth_bytes: what the last step held more than the second;
    memory_growth_share: of the phase's peak, where that is most.
    """
    history, summary = finished.history, finished.summary
    phases = phase_seconds(history, summary)
    shares = share_of_each(phases)
    median = {name: float(np.median(seconds)) for name, seconds in phases.items()}
    step = float(np.median(np.sum(list(phases.values()), axis=0)))
    memory = phase_memory(history)
    update, reference = shape.update_flops / median["update"], shape.forward_flops / median["annotate"]
    plan = json.loads((finished.run_dir / PLAN).read_text())
    ranks = {each["role"]: len(each["devices"]) for each in plan["roles"]}
    return {
        "devices": plan["devices"]["number"],
        "steps": 1 + len(phases["update"]),
        "seconds_per_step": step,
        "phases": {
            name: {"median": median[name], "share": shares[name], "steps": seconds.tolist()}
            for name, seconds in phases.items()
        },
        "tokens_per_second": shape.num_tokens / step,
        "mfu_formula": MFU_FORMULA,
        "mfu_update": update / PEAK_FLOPS / ranks["actor"],
        "mfu_reference": reference / PEAK_FLOPS / ranks["ref"],
        "tflops_per_second_update": update / 1e12,
        "tflops_per_second_reference": reference / 1e12,
        "seconds_to_first_step": summary["seconds_to_first_step"],
        "peak_memory_bytes": {kind: max(history.values(name)) for kind, name in MEMORY.items() if history.of(name)},
        "phase_memory_bytes": {name: {"max": max(steps), "steps": steps} for name, steps in memory.items()},
        "memory_growth_bytes": memory_growth(memory),
        "memory_growth_share": memory_growth_share(memory),
        "mismatch_logprob_abs_diff_mean": max(history.values("mismatch/logprob_abs_diff_mean"), default=None),
    }


def table(result: Result) -> Table:
    """The result for people."""
    title = f"W1, {result['shape']}: {result['seconds_per_step']:.2f} s per step"
    shown = Table(title=title, title_justify="left", box=None)
    for name in ("phase", "seconds", "share", "peak GiB", "growth GiB"):
        shown.add_column(name, justify="left" if name == "phase" else "right")
    for name, phase in result["phases"].items():
        cells = [f"{phase['median']:.2f}", f"{phase['share']:.1%}"]
        if name in result["phase_memory_bytes"]:
            growth = result["memory_growth_bytes"][name] / 2**30
            cells += [_gib(result["phase_memory_bytes"][name]["max"]), f"{growth:+.2f}"]
        shown.add_row(name, *cells, style="" if name in WORK else "dim")
    shown.add_section()
    shown.add_row("tokens per second", f"{result['tokens_per_second']:,.0f}")
    for name in ("update", "reference"):
        achieved, share = result[f"tflops_per_second_{name}"], result[f"mfu_{name}"]
        shown.add_row(f"{name}: TFLOP/s, MFU", f"{achieved:,.0f}", f"{share:.1%}")
    shown.add_row("first step after", f"{result['seconds_to_first_step']:.0f} s")
    for kind, num_bytes in result["peak_memory_bytes"].items():
        shown.add_row(f"memory, {kind}", f"{_gib(num_bytes)} GiB")
    return shown


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f}"
