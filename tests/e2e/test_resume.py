"""A run that is killed, stopped and resumed goes the same way as one that nobody touched, to the last bit."""

from __future__ import annotations

import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import CLEANUP_TIMEOUT_S, Outcome, launch, read_jsonl, reproducible, run, wait_until

STEPS = 10
COMMAND = (
    f"trainer.total_training_steps={STEPS}",
    "trainer.full_determinism=true",
    "trainer.test_freq=5",
    "trainer.save_freq=1",
    "trainer.log_completions_freq=5",
    "trainer.log_val_generations=8",
)


@dataclass(frozen=True, slots=True)
class Interrupted:
    """One run directory, three processes: killed in the middle of a step, stopped by Ctrl-C, run to the end.

    killed_after: last step whose line was there when the first was killed; told: the moment, for messages.
    """

    directory: Path
    told: str
    killed_after: int
    stopped: Outcome
    stopped_summary: dict[str, object]
    finished: Outcome


@pytest.fixture(scope="module")
def interrupted(runs: Path, chance_seed: int) -> Interrupted:
    """The first ten steps of the main run, by a command that is given three times."""
    directory = runs / "interrupted"
    chance = random.Random(chance_seed)
    step, moment = chance.randint(2, 5), chance.random()
    with launch(directory, *COMMAND) as process:
        seconds = process.wait_for_step(step)["time/step"]
        time.sleep(moment * min(seconds, 3.0))
        process.kill()
        wait_until(lambda: not process.survivors(), CLEANUP_TIMEOUT_S, "Ray and vLLM to follow their driver")
    killed_after = read_jsonl(directory / "metrics.jsonl")[-1]["step"]
    with launch(directory, *COMMAND) as process:
        process.wait_for_step(killed_after + 1)
        process.interrupt()
        stopped = process.wait()
    stopped_summary = stopped.summary()
    assert (directory / "report.html").exists()
    finished = run(directory, *COMMAND)
    told = f"seed {chance_seed}: killed {moment:.2f} of a step after step {step}"
    return Interrupted(directory, told, killed_after, stopped, stopped_summary, finished)


def test_the_trajectory_is_that_of_an_undisturbed_run(interrupted: Interrupted, main_run: Outcome) -> None:
    assert interrupted.finished.status == 0, interrupted.finished.told
    records = interrupted.finished.records()
    assert [record["step"] for record in records] == list(range(STEPS + 1)), interrupted.told
    for mine, theirs in zip(records, main_run.records(), strict=False):
        assert differences(reproducible(mine), reproducible(theirs)) == {}, (interrupted.told, mine["step"])


def test_completions_are_neither_missing_nor_doubled(interrupted: Interrupted, main_run: Outcome) -> None:
    rows = read_jsonl(interrupted.directory / "completions.jsonl")
    theirs = read_jsonl(main_run.directory / "completions.jsonl")
    steps = {row["step"] for row in rows}
    assert steps == {0, 1, 5, 10}, "validations, the first step and every fifth"
    for phase in ("train", "val"):
        for step in steps:
            mine = [row for row in rows if (row["step"], row["phase"]) == (step, phase)]
            same = [row for row in theirs if (row["step"], row["phase"]) == (step, phase)]
            assert [r["response"] for r in mine] == [r["response"] for r in same], (interrupted.told, step, phase)


def test_the_console_says_where_it_resumed(interrupted: Interrupted) -> None:
    for outcome, least in ((interrupted.stopped, interrupted.killed_after - 1), (interrupted.finished, 2)):
        step = step_in("resuming after step", outcome)
        assert step >= least
        assert f"step_{step:06d}" in outcome.stdout.replace("\n", ""), outcome.told


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(interrupted: Interrupted) -> None:
    stopped = interrupted.stopped
    assert stopped.status == 130, stopped.told
    assert "stopping after this step" in stopped.stdout
    last = step_in("stopped after step", stopped)
    assert f"\n  python -m trainer.main {' '.join(stopped.arguments)}\n" in stopped.stdout, stopped.told
    assert last == interrupted.stopped_summary["steps"]
    assert stopped.complaints == "", stopped.told
    assert step_in("resuming after step", interrupted.finished) == last, "nothing is done twice after a clean stop"


def test_resuming_under_fewer_ranks(interrupted: Interrupted) -> None:
    """Two ranks saved; one rank and one replica go on."""
    outcome = run(
        interrupted.directory, f"trainer.total_training_steps={STEPS + 1}", *COMMAND[1:], "trainer.n_gpus_per_node=1"
    )
    assert outcome.status == 0, outcome.told
    records = outcome.records()
    assert [record["step"] for record in records] == list(range(STEPS + 2))
    last = {name: value for name, value in records[-1].items() if name.startswith("actor/")}
    assert last["actor/num_updates"] == 1
    assert all(value is not None and math.isfinite(value) for value in last.values()), last
    assert records[-1]["reward/mean"] > 0.5, "the weights are the trained ones"
    assert records[-1]["sync/weight_version"] == records[-2]["sync/weight_version"] + 1


def step_in(phrase: str, outcome: Outcome) -> int:
    """The number after a phrase that the console says once."""
    (number,) = re.findall(rf"^{phrase} (\d+)", outcome.stdout, re.MULTILINE)
    return int(number)


def differences(mine: dict[str, float], theirs: dict[str, float]) -> dict[str, tuple[float | None, float | None]]:
    """Metrics that are not the same, to the last bit."""
    names = mine.keys() | theirs.keys()
    return {name: (mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)}
