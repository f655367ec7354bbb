"""A dry run as a user starts it: no Ray, no GPU, the plan on the screen and in a file whose form does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from scripts.benchmarks.w1_model import write_inputs
from scripts.benchmarks.w1_work import SHAPES
from trainer import main as cli
from trainer import placement
from trainer.config.keys import known_keys
from trainer.plan import devices

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
PHASE_FIELDS = {
    *(f"{name}_bytes" for name in ("weights", "gradients", "optimizer", "activations", "buffers", "kv_cache")),
    *("bytes", "overhead_bytes", "offloaded_bytes", "least_bytes", "recomputed_layers"),
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A dry run of a model without weights, which starts no Ray and sees no GPU."""
    model = tmp_path / "model"
    write_inputs(SHAPES["tiny"], model)
    (model / "model.safetensors").touch()  # weights are not read
    monkeypatch.setattr(placement, "connect", lambda cfg: pytest.fail("a plan needs no Ray"))
    monkeypatch.setattr(devices, "local_gpu_bytes", lambda: None)
    for name in ("RAY_ADDRESS", "TANDEM_GPU"):
        monkeypatch.delenv(name, raising=False)
    return [
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.model.tokenizer_path={model}/tokenizer",
        f"data.train_files={model}/prompts.jsonl",
        "data.max_prompt_length=8",
        "data.max_response_length=16",
        "data.train_batch_size=8",
        f"{ACTOR}.ppo_mini_batch_size=4",
        f"{ROLLOUT}.n=4",
        "algorithm.adv_estimator=grpo",
        f"trainer.default_local_dir={tmp_path}/run",
        "trainer.dry_run=true",
    ]


def planned(tmp_path: Path) -> dict[str, Any]:
    """plan.json."""
    record: dict[str, Any] = json.loads((tmp_path / "run" / "plan.json").read_text())
    return record


def test_eight_gpus_are_planned_without_one(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_GPU", "H100")
    assert cli.main([*asked, f"{ROLLOUT}.tensor_model_parallel_size=2"]) == 0
    out = capsys.readouterr().out
    assert "Predicted memory of GPUs 0-7 (actor, rollout), GiB of 79.1 each" in out
    assert f"plan: {tmp_path}/run/plan.json" in out and "sequences of 24 tokens at a time" in out
    assert "train_batch_size: 8" in out and "# command line: data.train_batch_size=8" in out
    record = planned(tmp_path)
    assert set(record) == {
        *("version", "tandem", "config", "devices", "roles", "batch", "memory", "kv_cache", "vllm"),
        *("notices", "warnings", "problems"),
    }
    assert record["version"] == 1 and record["config"].keys() == known_keys().leaves
    assert record["config"]["data.train_batch_size"] == {
        "value": 8,
        "from": "command line",
        "detail": "data.train_batch_size=8",
        "key": None,
    }
    (memory,) = record["memory"]
    assert memory["devices"] == list(range(8)) and set(memory["phases"]) >= {"start", "generate", "update", "sync"}
    assert all(set(phase) == PHASE_FIELDS for phase in memory["phases"].values())
    assert record["devices"] == {
        "type": "cuda",
        "number": 8,
        "memory_bytes": int(79.1 * (1 << 30)),
        "known_from": "TANDEM_GPU=H100",
    }
    assert [role["role"] for role in record["roles"]] == ["actor", "rollout"]
    assert record["roles"][1]["tensor_parallel"] == 2 and record["roles"][1]["data_parallel"] == 4
    assert set(record["kv_cache"]) == {
        *("bytes", "bytes_per_token", "tokens", "sequence_tokens", "max_concurrency", "max_num_seqs")
    }


def test_batches_are_derived(asked: list[str], tmp_path: Path) -> None:
    assert cli.main([*asked, "trainer.n_gpus_per_node=2", "trainer.device=cpu", f"{ACTOR}.ppo_epochs=2"]) == 0
    record = planned(tmp_path)
    batch = record["batch"]
    assert {name: batch[name] for name in ("prompts_per_step", "sequences_per_step", "training_prompts")} == {
        "prompts_per_step": 8,
        "sequences_per_step": 32,
        "training_prompts": 16,
    }
    assert batch["steps_per_epoch"] == 2 and batch["total_steps"] == 60
    actor = batch["roles"]["actor"]
    assert actor["updates_per_step"] == 4 and actor["sequences_per_mini_batch"] == 16
    assert actor["update"] == {"micro_batches": 1, "max_sequences": 8, "max_tokens": 2 * (8 + 4 * 16)}
    assert record["memory"] == [] and record["kv_cache"]["bytes"] == 1 << 30, "of a CPU the cache alone is known"


def test_a_plan_that_cannot_work_is_written_and_refused(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TANDEM_GPU", "1GiB")
    assert cli.main(asked) == 2
    assert "of a GPU's 1.0 GiB" in capsys.readouterr().err
    assert planned(tmp_path)["problems"]


def test_a_model_for_another_machine_may_lack_what_this_one_lacks(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is broken here is told, and no reason not to plan."""
    item = type(
        "Item", (), {"name": "GPU driver", "reason": "none", "verdict": "broken", "told": lambda self: "install"}
    )
    monkeypatch.setattr(cli, "BROKEN", "broken")
    monkeypatch.setattr(cli, "startup_items", lambda device: [item()])
    assert cli.main(asked) == 0
    assert cli.main([*asked, "trainer.dry_run=false"]) == 2


def test_layouts_come_from_the_config_with_its_changes(asked: list[str], tmp_path: Path) -> None:
    assert cli.main([*asked, "+actor_rollout_ref.model.override_config.num_hidden_layers=4"]) == 0
    shape = Qwen2Config.from_pretrained(tmp_path / "model")
    head = shape.hidden_size // shape.num_attention_heads
    per_token = 2 * 4 * shape.num_key_value_heads * head * 2
    assert planned(tmp_path)["kv_cache"]["bytes_per_token"] == per_token


def test_a_run_directory_that_cannot_be_is_the_users_to_change(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main([*asked, f"trainer.default_local_dir={tmp_path}/file/run"]) == 2
    told = capsys.readouterr().err
    assert f"error: trainer.default_local_dir={tmp_path}/file/run: cannot be written to (Not a directory); name" in told
