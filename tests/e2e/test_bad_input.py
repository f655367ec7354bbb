"""Mistakes of the user's that only the real machinery can see: one clear message, and no worker is ever started.

Mistakes in the configuration alone are in tests/unit; a few of them go through the whole command here.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from conftest import write_jsonl
from harness import Outcome, read_jsonl, run


def refused(directory: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command that must be refused before anything is started or written; returns what it said."""
    outcome: Outcome = run(directory, *overrides, "trainer.total_training_steps=2", environment=environment)
    assert outcome.status == 2, outcome.told
    assert "Traceback" not in outcome.stderr + outcome.stdout, outcome.told
    assert "Roles" not in outcome.stdout, "the plan is shown only for a run that can start"
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.told
    return outcome.stderr[outcome.stderr.index("error: ") :]


def test_more_gpus_than_ray_has(tmp_path: Path, task: Path) -> None:
    told = refused(tmp_path / "run", "trainer.device=cuda", "trainer.n_gpus_per_node=8")
    assert "trainer.n_gpus_per_node=8" in told
    assert "GPU" in told
    assert "set trainer.n_gpus_per_node=0" not in told, "that would not help"
    assert "trainer.device=cpu" in told
    assert not (tmp_path / "run").exists()


def test_more_cpus_than_ray_has(tmp_path: Path, task: Path) -> None:
    told = refused(tmp_path / "run", "trainer.device=cpu", "trainer.n_gpus_per_node=512")
    assert "trainer.n_gpus_per_node=512" in told
    assert "set trainer.n_gpus_per_node=" in told
    assert not (tmp_path / "run").exists()


def test_no_cluster_at_the_address(tmp_path: Path, task: Path) -> None:
    """Ray would wait for minutes."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # ours, but nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        told = refused(tmp_path / "run", environment={"RAY_ADDRESS": address})
    assert f"RAY_ADDRESS={address}: cannot join a Ray cluster there" in told
    assert "leave RAY_ADDRESS out" in told


def _no_prompt_column(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"question": row["prompt"], "answer": row["answer"]} for row in rows]


@pytest.mark.parametrize(
    ("change", "overrides", "parts"),
    [
        (
            _no_prompt_column,
            (),
            ("data.train_files", "no column data.prompt_key=prompt", "question, answer", "Set data.prompt_key"),
        ),
        (lambda rows: [], (), ("data.train_files=", "empty data set")),
        (
            lambda rows: rows,
            ("data.max_prompt_length=5", "data.truncation=error"),
            ("data.max_prompt_length=5", "6 tokens", "data.truncation", "data.filter_overlong_prompts"),
        ),
    ],
    ids=["no prompt column", "empty", "overlong"],
)
def test_data_that_cannot_be_used(
    tmp_path: Path,
    task: Path,
    change: Callable[[list[dict[str, str]]], list[dict[str, str]]],
    overrides: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", change(read_jsonl(task / "train.jsonl")[:128]))
    told = refused(tmp_path / "run", f"data.train_files={data}", *overrides)
    for part in parts:
        assert part in told
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model(tmp_path: Path, main_run: Outcome) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000010"
    shutil.copytree(main_run.checkpoints()[0], checkpoint)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["fingerprint"]["hidden_size"] = 256
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    told = refused(tmp_path / "run").replace("\n", " ")
    for part in (str(checkpoint), "another model", "hidden_size", "256", "192", "trainer.resume_mode=disable"):
        assert part in told
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_a_model_without_tokenizer(tmp_path: Path, task: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(task / "model" / name, model)
    told = refused(tmp_path / "run", f"actor_rollout_ref.model.path={model}")
    assert f"actor_rollout_ref.model.path={model}" in told
    assert "no tokenizer" in told
    assert "actor_rollout_ref.model.tokenizer_path" in told


def test_all_mistakes_of_the_configuration_at_once(tmp_path: Path, task: Path) -> None:
    told = refused(
        tmp_path / "run",
        "data.train_batch_size=100",
        "trainer.device=cpu",
        "critic.enable=false",
        "algorithm.adv_estimator=gae",
    )
    assert "data.train_batch_size=100: not divisible by actor_rollout_ref.actor.ppo_mini_batch_size=64" in told
    assert "critic.enable=false" in told


def test_a_mistyped_key(tmp_path: Path, task: Path) -> None:
    told = refused(tmp_path / "run", "actor_rollout_ref.rollout.temprature=0.9")
    assert "did you mean actor_rollout_ref.rollout.temperature" in told
