"""Rollout replicas die, or hang, while they generate: the run goes on, and nothing is lost or counted twice."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import NO_VALIDATION, Outcome, Process, Record, launch, read_jsonl, wait_until

PROMPTS, RESPONSES, LENGTH, STEPS = 16, 4, 128, 4
TOGETHER = 8
"""Sequences a replica decodes together: a quarter of its share, so that generation takes a while."""
HANG_TIMEOUT_S = 5
KILLED, STOPPED = 1, 0
"""Replicas, in steps 2 and 3."""


@dataclass(frozen=True, slots=True)
class Struck:
    """A run with two replicas, each of which got a signal while it generated. pids: of those that got it."""

    outcome: Outcome
    pids: dict[int, int]


@pytest.fixture(scope="module")
def struck(runs: Path, task: Path) -> Struck:
    """One replica is killed in step 2, the other stopped in step 3."""
    with launch(
        runs / "struck",
        *NO_VALIDATION,
        f"trainer.total_training_steps={STEPS}",
        f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        f"data.max_response_length={LENGTH}",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        "actor_rollout_ref.rollout.ignore_eos=true",
        f"actor_rollout_ref.rollout.max_num_seqs={TOGETHER}",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        f"actor_rollout_ref.rollout.hang_timeout_s={HANG_TIMEOUT_S}",
    ) as process:
        killed = strike(process, KILLED, signal.SIGKILL, step=2)
        stopped = strike(process, STOPPED, signal.SIGSTOP, step=3)
        return Struck(process.wait(), {KILLED: killed, STOPPED: stopped})


def strike(process: Process, replica: int, how: signal.Signals, *, step: int) -> int:
    """Waits until the replica is at work on this step, and sends it the signal; its pid."""
    process.wait_for_step(step - 1)
    before = len(read_jsonl(process.directory / "rollout.jsonl"))

    def at_work() -> Record | None:
        readings = read_jsonl(process.directory / "rollout.jsonl")[before:]
        return next((r for r in readings if r["replica"] == replica and r["running"]), None)

    pid = int(wait_until(at_work, 60, f"replica {replica} at work on step {step}")["pid"])
    os.kill(pid, how)
    return pid


def test_the_run_goes_on(struck: Struck) -> None:
    assert struck.outcome.status == 0, struck.outcome.told
    assert [record["rollout/replaced"] for record in struck.outcome.steps()] == [0, 1, 1, 0], struck.outcome.told


@pytest.mark.parametrize("replica", [KILLED, STOPPED], ids=["killed", "stopped"])
def test_the_notice_says_who_and_why(struck: Struck, replica: int) -> None:
    told = f"warning: rollout replica {replica} "
    (notice,) = [line for line in struck.outcome.stderr.splitlines() if line.startswith(told)]
    assert f"rollout replica {replica} (pid {struck.pids[replica]}), generate: " in notice
    if replica == KILLED:
        assert "the worker process died: Worker exit type: SYSTEM_ERROR" in notice
    else:
        seconds = float(notice.partition("hangs: no answer for ")[2].partition(" s.")[0])
        assert HANG_TIMEOUT_S <= seconds <= HANG_TIMEOUT_S + 3
    assert f"note: rollout replica {replica} (pid " in struck.outcome.stderr


def test_every_response_counts_once(struck: Struck) -> None:
    for record in struck.outcome.steps():
        assert record["response_length/min"] == record["response_length/max"] == LENGTH
        tokens = PROMPTS * RESPONSES * (LENGTH + record["prompt_length/mean"])
        assert record["perf/tokens"] == pytest.approx(tokens, abs=0.5)
        assert record["mismatch/num_tokens"] == PROMPTS * RESPONSES * LENGTH


def test_the_new_replica_has_the_weights_of_now(struck: Struck) -> None:
    """Its log-probs are the trainer's, in the steps of the failures and after."""
    for record in struck.outcome.steps():
        assert record["mismatch/logprob_abs_diff_mean"] < 1e-4
    assert struck.outcome.steps()[-1]["sync/weight_version"] == STEPS + 1


def test_readings_come_every_second_from_both(struck: Struck) -> None:
    readings = read_jsonl(struck.outcome.directory / "rollout.jsonl")
    assert {r["replica"] for r in readings} == {0, 1}
    for replica, struck_one in struck.pids.items():
        pids = {r["pid"] for r in readings if r["replica"] == replica}
        assert len(pids) == 2, "the old one and the new one"
        assert struck_one in pids
    assert max(r["time"] for r in readings) < time.time()
    for record in struck.outcome.steps():
        assert 0 < record["rollout/running_max"] <= TOGETHER
        assert 0 < record["rollout/cache_use_max"] <= 1
        assert record["rollout/waiting_max"] > 0
        assert record["rollout/tokens_per_second"] > 0
