"""Mistakes of the user's that only the real machinery can see: one clear message, and no worker is ever started.

Mistakes in the configuration alone are in tests/unit; a few of them go through the whole command here.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import Outcome, read_jsonl, run, write_jsonl

ACTOR = "actor_rollout_ref.actor"
TENSOR = f"{ACTOR}.megatron.tensor_model_parallel_size"


def refused(directory: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command that must be refused before anything is started or written; returns what it said."""
    outcome: Outcome = run(directory, *overrides, "trainer.total_training_steps=2", environment=environment)
    assert outcome.status == 2, outcome.told
    assert "Traceback" not in outcome.stderr + outcome.stdout, outcome.told
    assert "Roles" not in outcome.stdout, "the plan is shown only for a run that can start"
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.told
    return outcome.stderr[outcome.stderr.index("error: ") :]


def refused_together(directory: Path, cases: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """`refused` for several commands at once: each spends its time waiting for Ray. Name to what it said."""
    with ThreadPoolExecutor(len(cases)) as pool:
        told = {name: pool.submit(refused, directory / name, *overrides) for name, overrides in cases.items()}
        results = {name: future.result() for name, future in told.items()}
    assert not any((directory / name).exists() for name in cases), "a refused run leaves nothing behind"
    return results


def test_more_devices_than_ray_has(tmp_path: Path, task: Path) -> None:
    cases = {
        "build": ["trainer.device=cuda"],
        "gpu": ["trainer.device=cuda", "trainer.n_gpus_per_node=8", "actor_rollout_ref.rollout.auto_adapt=false"],
        "cpu": ["trainer.device=cpu", "trainer.n_gpus_per_node=512"],
    }
    told = refused_together(tmp_path, cases)
    for part in ("+cpu is a CPU build", "trainer.device=cpu", "scripts/diagnose.py"):
        assert part in told["build"]
    for part in ("trainer.n_gpus_per_node=8", "GPU", "trainer.device=cpu"):
        assert part in told["gpu"]
    assert "set trainer.n_gpus_per_node=0" not in told["gpu"], "that would not help"
    for part in ("trainer.n_gpus_per_node=512", "CPU", "set trainer.n_gpus_per_node="):
        assert part in told["cpu"]


def test_no_cluster_at_the_address(tmp_path: Path, task: Path) -> None:
    """Ray would wait for minutes."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # ours, but nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        told = refused(tmp_path / "run", environment={"RAY_ADDRESS": address})
    assert f"RAY_ADDRESS={address}: cannot join a Ray cluster there" in told
    assert "leave RAY_ADDRESS out" in told


def test_data_and_models_that_cannot_be_used(tmp_path: Path, task: Path) -> None:
    rows = read_jsonl(task / "train.jsonl")[:128]
    questions = [{"question": row["prompt"], "answer": row["answer"]} for row in rows]
    cases = {
        "column": [f"data.train_files={write_jsonl(tmp_path / 'questions.jsonl', questions)}"],
        "empty": [f"data.train_files={write_jsonl(tmp_path / 'empty.jsonl', [])}"],
        "overlong": [
            f"data.train_files={write_jsonl(tmp_path / 'sums.jsonl', rows)}",
            "data.max_prompt_length=5",
            "data.truncation=error",
        ],
        "cut": [f"{ACTOR}.strategy=megatron", f"{TENSOR}=4", "trainer.n_gpus_per_node=4"],
    }
    parts = {
        "column": ("data.train_files", "no column data.prompt_key=prompt", "question, answer", "Set data.prompt_key"),
        "empty": ("data.train_files=", "empty data set"),
        "overlong": ("data.max_prompt_length=5", "6 tokens", "data.truncation", "data.filter_overlong_prompts"),
        "cut": (f"{TENSOR}=4 does not divide the model's num_key_value_heads=2",),
    }
    told = refused_together(tmp_path / "runs", cases)
    missing = {name: [part for part in parts[name] if part not in told[name]] for name in cases}
    assert not any(missing.values()), (missing, told)


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
