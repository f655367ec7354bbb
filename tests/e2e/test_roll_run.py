"""A YAML file of ROLL's trains: what stands in it reaches sampler, trainer and reward, and the plan says where from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from harness import ROOT, Outcome, Record, read_jsonl, run, write_jsonl

from trainer.config.load import load_config

FILE = ROOT / "tests" / "data" / "roll" / "addition.yaml"
STEPS, PROMPTS, RESPONSES, RATE, LENGTH = 3, 16, 4, 3.0e-4, 3
"""What the file asks for."""

REWARD = '''"""Right or wrong; a row's domain is known by its tag."""


def compute_score(data_source, solution_str, ground_truth, extra_info):
    if data_source != ("below_100" if int(ground_truth) < 100 else "from_100"):
        raise ValueError(f"{data_source}: not the tag of {ground_truth}")
    return {"score": float(solution_str == ground_truth), "small": data_source == "below_100"}
'''


@pytest.fixture(scope="module")
def overrides(runs: Path, task: Path) -> list[str]:
    """All that a user adds to the file: data with ROLL's columns, a reward function, and what a CPU needs."""
    rows = [
        {"prompt": row["prompt"], "ground_truth": row["answer"], "tag": _tag(row["answer"])}
        for row in read_jsonl(task / "train.jsonl")[:256]
    ]
    data = write_jsonl(runs / "roll.jsonl", rows)
    function = runs / "roll_reward.py"
    function.write_text(REWARD)
    return [
        f"roll.actor_train.data_args.file_name=[{data}]",
        f"reward.custom_reward_function.path={function}",
        "trainer.device=cpu",
        "actor_rollout_ref.rollout.sleep_level=auto",
        "actor_rollout_ref.rollout.kv_cache_gb=0.0625",
    ]


@pytest.fixture(scope="module")
def roll_run(runs: Path, overrides: list[str]) -> Outcome:
    """The whole run."""
    outcome = run(runs / "roll", f"roll.config={FILE}", *overrides, config="roll")
    assert outcome.status == 0, outcome.told
    return outcome


def test_the_run_takes_the_steps_and_sizes_of_the_file(roll_run: Outcome) -> None:
    steps = roll_run.steps()
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert [record["data/position"] for record in steps] == [PROMPTS * step for step in (1, 2, 3)]
    for record in steps:
        assert record["actor/num_updates"] == 2  # 4 sequences x 4 accumulations x 2 ranks, of 16 x 4
        assert record["prompt_length/max"] <= 8
        assert record["response_length/max"] == LENGTH
        assert record["mismatch/num_tokens"] <= PROMPTS * RESPONSES * LENGTH
    assert sum(record["actor/grad_norm"] for record in steps) > 0


def test_the_learning_rate_falls_as_in_the_file(roll_run: Outcome) -> None:
    updates = 2 * STEPS
    last_of_step = [record["actor/lr"] for record in roll_run.steps()]
    assert last_of_step == pytest.approx([RATE * (1 - update / updates) for update in (1, 3, 5)])


def test_what_was_sampled_at_the_files_temperature_is_what_the_trainer_scores(roll_run: Outcome) -> None:
    assert _values(roll_run)["actor_rollout_ref.rollout.temperature"]["value"] == 0.7
    for record in roll_run.steps():
        assert record["mismatch/logprob_abs_diff_mean"] < 1e-4, record
    assert [record["actor/kl_loss"] > 0 for record in roll_run.steps()][1:] == [True, True]


def test_each_domain_is_scored_by_its_tag(roll_run: Outcome) -> None:
    for record in roll_run.steps():
        assert record["reward/errors"] == 0
        assert 0 < record["reward/part/small"] < 1
    assert sum(record["reward/mean"] for record in roll_run.steps()) > 0


@pytest.mark.parametrize(
    ("key", "value", "detail"),
    [
        ("trainer.total_training_steps", STEPS, "max_steps"),
        ("data.train_batch_size", PROMPTS, "rollout_batch_size"),
        ("data.max_response_length", LENGTH, "response_length"),
        ("actor_rollout_ref.actor.optim.lr", RATE, "actor_train.training_args.learning_rate"),
        ("actor_rollout_ref.rollout.temperature", 0.7, "actor_infer.generating_args.temperature"),
        ("actor_rollout_ref.rollout.max_model_len", 64, "actor_infer.strategy_args.strategy_config.max_model_len"),
        ("actor_rollout_ref.rollout.device_mapping", "0-1", "actor_infer.device_mapping"),
        ("reward.num_workers", 2, "rewards.small.world_size, rewards.large.world_size"),
        ("algorithm.gamma", 1.0, "default of gamma"),
    ],
)
def test_the_plan_names_the_place_in_the_file(roll_run: Outcome, key: str, value: object, detail: str) -> None:
    assert _values(roll_run)[key] == {"value": value, "from": "roll", "detail": detail, "key": None}


def test_an_override_is_told_as_such(roll_run: Outcome) -> None:
    found = _values(roll_run)["actor_rollout_ref.rollout.sleep_level"]
    assert (found["value"], found["from"]) == ("auto", "command line")
    notices = json.loads((roll_run.directory / "plan.json").read_text())["notices"]
    assert any("actor_infer.infer_batch_size" in notice for notice in notices)
    assert not any("sleep_level" in notice for notice in notices)


def test_the_converter_writes_the_configuration_that_ran(
    roll_run: Outcome, overrides: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, "scripts/convert_roll.py", str(FILE), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (tmp_path / "mine.yaml").write_text(done.stdout)
    place = f"trainer.default_local_dir={roll_run.directory}"
    mine = load_config([place], "mine", config_dir=tmp_path)
    assert mine == load_config([f"roll.config={FILE}", *overrides, place], "roll")
    assert mine.model_dump(mode="json") == yaml.safe_load((roll_run.directory / "config.yaml").read_text())


def _tag(answer: str) -> str:
    return "below_100" if int(answer) < 100 else "from_100"


def _values(outcome: Outcome) -> Record:
    """The plan's keys: value and where it came from."""
    plan: Record = json.loads((outcome.directory / "plan.json").read_text())
    values: Record = plan["config"]
    return values
