"""A reward function that raises, hangs or returns nonsense: counted, told, and in the end not put up with."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import NO_VALIDATION, Outcome, read_jsonl, run, write_jsonl

PROMPTS, RESPONSES = 16, 8
REWARD = '''"""Right or wrong, except for answers that ask for trouble."""

_hung = []


def compute_score(data_source, solution_str, ground_truth, extra_info):
    if ground_truth == "raise":
        raise RuntimeError("no score for this one")
    if ground_truth == "nan":
        return float("nan")
    if ground_truth == "hang" and not _hung:
        _hung.append(solution_str)
        while True:
            pass
    return {"score": float(solution_str == ground_truth), "length": len(solution_str)}
'''


@pytest.fixture(scope="module")
def troubled_run(runs: Path, task: Path) -> Outcome:
    """Step 1 goes well; step 2 has 8 responses that raise, 8 of nan and one that hangs; in step 3 all raise."""
    rows = read_jsonl(task / "train.jsonl")[: 4 * PROMPTS]
    for row, answer in zip(range(PROMPTS, PROMPTS + 3), ("raise", "nan", "hang"), strict=True):
        rows[row]["answer"] = answer
    for row in range(2 * PROMPTS, 3 * PROMPTS):
        rows[row]["answer"] = "raise"
    data = write_jsonl(runs / "troubled.jsonl", rows)
    function = runs / "troubled_reward.py"
    function.write_text(REWARD)
    return run(
        runs / "troubled",
        *NO_VALIDATION,
        "trainer.total_training_steps=4",
        "trainer.n_gpus_per_node=1",
        f"data.train_files={data}",
        "data.shuffle=false",
        f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        f"reward.custom_reward_function.path={function}",
        "reward.timeout_s=1",
        "reward.max_error_rate=0.2",
    )


def test_failures_below_the_rate_are_counted_and_left_out(troubled_run: Outcome) -> None:
    first, second = troubled_run.steps()
    assert (first["reward/errors"], first["reward/error_rate"]) == (0, 0)
    failed = 2 * RESPONSES + 1
    assert second["reward/errors"] == failed
    assert second["reward/error_rate"] == pytest.approx(failed / (PROMPTS * RESPONSES))
    assert second["actor/num_updates"] == 1
    assert second["reward/part/length"] > 1
    kept = PROMPTS * RESPONSES - failed
    assert second["reward/mean"] * kept == pytest.approx(round(second["reward/mean"] * kept), abs=1e-3)


def test_the_console_tells_how_many_and_why(troubled_run: Outcome) -> None:
    assert "the reward function failed for 17 responses (13.3%)" in troubled_run.stdout
    told = troubled_run.stderr
    assert "17 of 128 rewards failed and are left out: 8 x " in told
    for reason in ("8 x raised RuntimeError: no score for this one", "8 x returned nan", "1 x timed out after 1 s"):
        assert reason in told, troubled_run.told


def test_failures_above_the_rate_end_the_run(troubled_run: Outcome) -> None:
    assert troubled_run.status == 1, troubled_run.told
    assert "error: 128 of 128 rewards failed (100.0%), more than reward.max_error_rate=0.2" in troubled_run.stderr
    assert "128 x raised RuntimeError: no score for this one" in troubled_run.stderr
    assert "Traceback" not in troubled_run.stderr, troubled_run.told


def test_the_report_is_there_all_the_same(troubled_run: Outcome) -> None:
    assert troubled_run.summary()["steps"] == 2
    assert (troubled_run.directory / "report.html").stat().st_size > 10_000
    assert [record["step"] for record in troubled_run.steps()] == [1, 2]


def test_what_was_learned_before_the_failure_is_saved(troubled_run: Outcome) -> None:
    assert [path.name for path in troubled_run.checkpoints()] == ["step_000002"]


def test_a_failure_in_the_first_step_is_one_message(runs: Path, task: Path) -> None:
    """Nothing was recorded yet, so there is no report to write."""
    function = runs / "never_reward.py"
    function.write_text("def compute_score(*args, **kwargs):\n    raise RuntimeError('no score at all')\n")
    outcome = run(
        runs / "never",
        *NO_VALIDATION,
        "trainer.total_training_steps=2",
        "trainer.n_gpus_per_node=1",
        f"reward.custom_reward_function.path={function}",
    )
    assert outcome.status == 1, outcome.told
    assert "raised RuntimeError: no score at all" in outcome.stderr
    assert "Traceback" not in outcome.stderr, outcome.told
    assert not (outcome.directory / "report.html").exists()
