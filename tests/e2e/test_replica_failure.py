"""A rollout replica dies, or hangs, while it generates: the run goes on, and nothing is lost or counted twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from harness import NO_VALIDATION, Outcome, Process, Record, launch, read_jsonl, wait_until

PROMPTS, RESPONSES, LENGTH, STEPS = 16, 8, 128, 3
TOGETHER = 16
"""Sequences a replica decodes together: a quarter of its share, so that generation takes a while."""
HANG_TIMEOUT_S = 5


@pytest.fixture(scope="module", params=[signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def struck(request: pytest.FixtureRequest, runs: Path, task: Path) -> tuple[Outcome, int, signal.Signals]:
    """A run with two replicas, of which one gets a signal while it generates for step 2; its pid; the signal."""
    how: signal.Signals = request.param
    with launch(
        runs / f"struck_{how.name}",
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
        pid = strike(process, how)
        return process.wait(), pid, how


def strike(process: Process, how: signal.Signals) -> int:
    """Waits until replica 1 is at work on step 2, and sends it the signal; its pid."""
    process.wait_for_step(1)
    before = len(read_jsonl(process.directory / "rollout.jsonl"))

    def at_work() -> Record | None:
        readings = read_jsonl(process.directory / "rollout.jsonl")[before:]
        return next((r for r in readings if r["replica"] == 1 and r["running"]), None)

    pid = int(wait_until(at_work, 60, "replica 1 at work on step 2")["pid"])
    os.kill(pid, how)
    return pid


def test_the_run_goes_on(struck: tuple[Outcome, int, signal.Signals]) -> None:
    outcome, _, _ = struck
    assert outcome.status == 0, outcome.told
    assert [record["rollout/replaced"] for record in outcome.steps()] == [0, 1, 0], outcome.told


def test_the_notice_says_who_and_why(struck: tuple[Outcome, int, signal.Signals]) -> None:
    outcome, pid, how = struck
    (notice,) = [line for line in outcome.stderr.splitlines() if line.startswith("warning: rollout replica")]
    assert f"rollout replica 1 (pid {pid}), generate: " in notice
    if how is signal.SIGKILL:
        assert "the worker process died: Worker exit type: SYSTEM_ERROR" in notice
    else:
        seconds = float(notice.partition("hangs: no answer for ")[2].partition(" s.")[0])
        assert HANG_TIMEOUT_S <= seconds <= HANG_TIMEOUT_S + 3
    assert "note: rollout replica 1 (pid " in outcome.stderr


def test_every_response_counts_once(struck: tuple[Outcome, int, signal.Signals]) -> None:
    outcome, _, _ = struck
    for record in outcome.steps():
        assert record["response_length/min"] == record["response_length/max"] == LENGTH
        tokens = PROMPTS * RESPONSES * (LENGTH + record["prompt_length/mean"])
        assert record["perf/tokens"] == pytest.approx(tokens, abs=0.5)
        assert record["mismatch/num_tokens"] == PROMPTS * RESPONSES * LENGTH


def test_the_new_replica_has_the_weights_of_now(struck: tuple[Outcome, int, signal.Signals]) -> None:
    """Its log-probs are the trainer's, in the step of the failure and after."""
    outcome, _, _ = struck
    for record in outcome.steps():
        assert record["mismatch/logprob_abs_diff_mean"] < 1e-4
    assert outcome.steps()[-1]["sync/weight_version"] == STEPS + 1


def test_readings_come_every_second_from_both(struck: tuple[Outcome, int, signal.Signals]) -> None:
    outcome, pid, _ = struck
    readings = read_jsonl(outcome.directory / "rollout.jsonl")
    assert {r["replica"] for r in readings} == {0, 1}
    pids = {r["pid"] for r in readings if r["replica"] == 1}
    assert len(pids) == 2, "the old one and the new one"
    assert pid in pids
    assert max(r["time"] for r in readings) < time.time()
    for record in outcome.steps():
        assert 0 < record["rollout/running_max"] <= TOGETHER
        assert 0 < record["rollout/cache_use_max"] <= 1
        assert record["rollout/waiting_max"] > 0
        assert record["rollout/tokens_per_second"] > 0
