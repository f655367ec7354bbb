"""Subcommand algorithms: learning curves of advantage estimators, or of policy losses, side by side in one picture.

Each is the quick start with another algorithm, several seeds of it, started as a user would. The result is written
after every algorithm; --resume goes on with those that it lacks.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from subcommands import Command

from trainer.algorithms.estimators.catalog import ESTIMATORS
from trainer.algorithms.policy.build import OBJECTIVES
from trainer.tracking.run_data import History

from . import floors, launch
from .measure import Result
from .panels import Curve, panels_svg
from .seeds import SEED_KEYS

METRIC = "val/accuracy"
"""Held-out, sampled as in training."""
TEST_FREQ = 5
LOSS = "actor_rollout_ref.actor.policy_loss"
BASE = (
    f"trainer.test_freq={TEST_FREQ}",
    "trainer.save_freq=0",
    "trainer.logger=[console]",
    "actor_rollout_ref.rollout.val_kwargs.greedy=false",
)
SEVERAL_UPDATES = ("actor_rollout_ref.actor.ppo_mini_batch_size=16", "actor_rollout_ref.actor.ppo_epochs=2")
"""Eight of a batch: with one, no loss has a ratio to bound."""
WITH_ESTIMATOR: Mapping[str, Sequence[str]] = {
    "gae": ("critic.optim.lr=1e-3",),  # it begins with a head of zeros
    "dr_grpo": ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm",),
    "gpg": (f"{LOSS}.loss_mode=gpg",),
    "gdpo": ("reward.custom_reward_function.name=compute_parts",),
}
"""What belongs to an estimator as it was published, or what it cannot do without."""
WITH_LOSS: Mapping[str, Sequence[str]] = {
    "gspo": ("actor_rollout_ref.actor.clip_ratio_low=3e-4", "actor_rollout_ref.actor.clip_ratio_high=4e-4"),
    "dro": (f"{LOSS}.params.dro_beta=0.1",),
    "gpg": ("algorithm.adv_estimator=gpg",),
}


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    launch.add_common_options(parser, out="algorithms.json")
    parser.add_argument(
        "--estimators", default="", metavar="A,B,C", help="or `all`; the first is what others are compared with"
    )
    parser.add_argument("--losses", default="", metavar="A,B,C", help="or `all`, likewise, with 8 updates per step")
    parser.add_argument("--seeds", type=int, default=3, help="number of them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: %(default)s)")
    parser.add_argument("--svg", type=Path, help="where to draw the curves")
    parser.add_argument("--resume", action="store_true", help="keep the curves that --out has already")


def run(options: Namespace, console: Console) -> int:
    """Train, write, draw, show and check."""
    wanted = chosen(options.estimators, options.losses)
    result = _begun(options) | {
        "benchmark": "algorithms",
        "command": launch.command_line(),
        "commit": launch.commit(),
        "machine": launch.machine(),
        "steps": options.steps,
        "seeds": options.seeds,
    }
    for name, overrides in wanted.items():
        if name not in result["curves"]:
            result["curves"][name] = _train(console, name, [*overrides, *options.set], options)
            launch.write(options.out, result)
    curves = {name: result["curves"][name] for name in wanted}
    lacking = [f"{name}: {line}" for name, one in curves.items() for line in floors.missed(one, floors.ALGORITHMS)]
    launch.write(options.out, result | {"missed": lacking})
    if options.svg is not None:
        draw(options.svg, curves, kind="loss" if options.losses else "advantage estimator", seeds=options.seeds)
    console.print(table(curves))
    for line in lacking:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if lacking and options.check else 0


def chosen(estimators: str, losses: str) -> dict[str, list[str]]:
    """Name -> overrides, in the order asked for. Raises RunFailed unless names of one kind are given, and known."""
    if bool(estimators) == bool(losses):
        raise launch.RunFailed("give either --estimators or --losses, names with commas between, or `all`")
    known, asked = (tuple(ESTIMATORS), estimators) if estimators else (tuple(OBJECTIVES), losses)
    names = _reference_first(known) if asked == "all" else asked.split(",")
    if unknown := [name for name in names if name not in known]:
        raise launch.RunFailed(f"unknown: {', '.join(unknown)}; choose of {', '.join(known)}")
    if estimators:
        return {name: [f"algorithm.adv_estimator={name}", *WITH_ESTIMATOR.get(name, ())] for name in names}
    return {name: [f"{LOSS}.loss_mode={name}", *SEVERAL_UPDATES, *WITH_LOSS.get(name, ())] for name in names}


def curve(histories: Sequence[History]) -> Result:
    """Mean, lowest and highest accuracy over the seeds at each step that was measured; and what was gained."""
    steps = [step for step, _ in histories[0].of(METRIC)]
    columns = list(zip(*(one.values(METRIC) for one in histories), strict=True))
    mean = [sum(values) / len(values) for values in columns]
    return {
        "at": steps,
        "mean": mean,
        "low": [min(values) for values in columns],
        "high": [max(values) for values in columns],
        "steps": steps[-1],
        "gain": mean[-1] - mean[0],
    }


def draw(path: Path, curves: Mapping[str, Result], *, kind: str, seeds: int) -> None:
    """All curves as one SVG."""
    drawn = [Curve(name, one["at"], one["mean"], one["low"], one["high"]) for name, one in curves.items()]
    of = "one seed" if seeds == 1 else f"mean and range of {seeds} seeds"
    path.parent.mkdir(parents=True, exist_ok=True)
    subtitle = f"held-out accuracy against the step: {of}; dashed: {drawn[0].name}"
    path.write_text(panels_svg(drawn, title=f"Two-digit addition, by {kind}", subtitle=subtitle))


def table(curves: Mapping[str, Result]) -> Table:
    """A row per algorithm."""
    shown = Table(title="Held-out accuracy, sampled", title_justify="left", box=None)
    for name in ("", "before", "after", "range", "seconds"):
        shown.add_column(name, justify="right" if name else "left")
    for name, one in curves.items():
        span = f"{one['low'][-1]:.1%} to {one['high'][-1]:.1%}"
        shown.add_row(name, f"{one['mean'][0]:.1%}", f"{one['mean'][-1]:.1%}", span, f"{one['seconds']:.0f}")
    return shown


def _begun(options: Namespace) -> dict[str, Any]:
    """The result so far; empty unless it is to be gone on with, and was made alike."""
    if not (options.resume and options.out.exists()):
        return {"curves": {}}
    found: dict[str, Any] = json.loads(options.out.read_text())
    if (found["steps"], found["seeds"]) != (options.steps, options.seeds):
        raise launch.RunFailed(f"--resume: {options.out} has other steps or seeds; give those, or another --out")
    return found


def _train(console: Console, name: str, overrides: Sequence[str], options: Namespace) -> Result:
    runs = []
    for seed in range(1, options.seeds + 1):
        settings = [*BASE, f"trainer.total_training_steps={options.steps}", *(f"{key}={seed}" for key in SEED_KEYS)]
        runs.append(launch.run(console, f"algorithms-{name}-seed{seed}", [*settings, *overrides], recipe="quickstart"))
    return curve([one.history for one in runs]) | {
        "commands": [one.command for one in runs],
        "versions": runs[0].summary["versions"],
        "seconds": sum(one.summary["seconds_total"] for one in runs),
    }


def _reference_first(names: Sequence[str]) -> list[str]:
    """With what people compare others with in front."""
    return sorted(names, key=lambda name: name not in ("grpo", "ppo"))


COMMAND = Command("algorithms", "learning curves of estimators or losses, side by side", add_options, run)
