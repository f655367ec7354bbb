"""The quick start through the real command line: what it proves about numbers, and what it leaves behind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from harness import MAIN_STEPS, Outcome, read_jsonl

SUMMARY_KEYS = {
    "accuracy_before",
    "accuracy_after",
    "greedy_before",
    "greedy_after",
    "steps",
    "seconds_total",
    "seconds_to_first_step",
    "seconds_per_phase",
    "tokens_per_second",
    "peak_memory_bytes",
    "versions",
    "command",
}


def test_every_step_is_logged_once(main_run: Outcome) -> None:
    assert [record["step"] for record in main_run.records()] == list(range(MAIN_STEPS + 1))


def test_the_first_update_is_on_policy(main_run: Outcome) -> None:
    first = main_run.steps()[0]
    assert first["actor/ratio_max"] == first["actor/ratio_min"] == 1.0
    assert abs(first["actor/ppo_kl"]) <= 1e-6


def test_sampler_and_trainer_agree_on_every_step(main_run: Outcome) -> None:
    for record in main_run.steps():
        assert record["mismatch/num_tokens"] > 0, record
        assert record["mismatch/logprob_abs_diff_mean"] < 1e-4, record
        assert record["mismatch/logprob_abs_diff_max"] < 1e-3, record


def test_each_step_publishes_every_tensor_of_the_model(main_run: Outcome, task: Path) -> None:
    tensors = tensor_names(task / "model")
    versions = [record["sync/weight_version"] for record in main_run.steps()]
    assert versions == [versions[0] + i for i in range(MAIN_STEPS)]
    assert {record["sync/parameters"] for record in main_run.steps()} == {len(tensors)}


def test_it_learns(main_run: Outcome) -> None:
    """Held-out sums, sampled; measured with this seed: 0.36 before, 0.95 after 25 steps, 0.84 after 15."""
    summary = main_run.summary()
    assert summary["accuracy_before"] <= 0.40
    assert summary["accuracy_after"] >= 0.80
    assert summary["greedy_after"] >= 0.95
    assert all(record["actor/skipped_updates"] == 0 for record in main_run.steps())


def test_the_phases_make_up_the_step(main_run: Outcome) -> None:
    for record in main_run.steps():
        phases = sum(value for name, value in record.items() if name.startswith("time/") and name != "time/step")
        assert phases == pytest.approx(record["time/step"], abs=1e-3)


def test_summary(main_run: Outcome) -> None:
    summary = main_run.summary()
    assert set(summary) == SUMMARY_KEYS
    assert summary["steps"] == MAIN_STEPS
    assert 0 < summary["seconds_to_first_step"] < summary["seconds_total"] < main_run.seconds + 1
    assert summary["tokens_per_second"] > 0
    assert summary["peak_memory_bytes"] > 100e6
    assert {"generate", "update", "sync", "validate", "checkpoint"} <= set(summary["seconds_per_phase"])
    assert summary["command"].startswith("python -m trainer.main --config-name quickstart ")
    assert all(re.match(r"\d+\.\d+", summary["versions"][name]) for name in ("python", "torch", "vllm", "ray"))


def test_report_stands_alone(main_run: Outcome) -> None:
    html = (main_run.directory / "report.html").read_text()
    assert len(html) > 20_000
    assert "<svg" in html
    assert not re.search(r"""(src|href)=["']https?://""", html), "the report must not need the network"


def test_completions_of_both_phases(main_run: Outcome) -> None:
    rows = read_jsonl(main_run.directory / "completions.jsonl")
    assert {row["phase"] for row in rows} == {"train", "val"}
    assert {row["step"] for row in rows if row["phase"] == "train"} == {1, 5, 10, 15, 20, 25}
    for row in rows:
        assert re.fullmatch(r"\d\d\+\d\d=", row["prompt"]), row
        assert row["reward"] == float(row["response"] == row["ground_truth"]), row
        assert (row["advantage"] is None) == (row["phase"] == "val"), row
        assert row["finish_reason"] in ("stop", "length")


def test_tensorboard_has_the_same_numbers(main_run: Outcome) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(main_run.directory / "tensorboard"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("reward/mean")}
    assert scalars == pytest.approx({record["step"]: record["reward/mean"] for record in main_run.steps()})
    assert len(events.Scalars("val/accuracy")) == 1 + MAIN_STEPS // 5


def test_wandb_works_without_an_account(main_run: Outcome) -> None:
    (log,) = (main_run.directory / "wandb").glob("offline-run-*/run-*.wandb")
    assert log.stat().st_size > 10_000
    assert "keeping the run offline" in main_run.stdout


def test_console_shows_the_plan_the_steps_and_the_result(main_run: Outcome) -> None:
    out = main_run.stdout
    assert re.search(r"actor +cpu 0-1 +FSDP2 +2 ranks +float32", out)
    assert re.search(r"rollout +cpu 0-1 +vLLM +2 x tp 1 +float32", out)
    assert re.search(r"responses per step \(x rollout\.n\) +512", out)
    lines = re.findall(rf"^step (\d+)/{MAIN_STEPS} .*time \d+\.\d+s \((.+)\)", out, re.MULTILINE)
    assert [int(number) for number, _ in lines] == list(range(MAIN_STEPS + 1))
    assert all("generate" in shares and "update" in shares for _, shares in lines[1:])
    assert out.count("Completions of step") == MAIN_STEPS // 5
    assert f"-> {main_run.summary()['accuracy_after'] * 100:.1f} %" in out
    assert str(main_run.directory / "report.html") in out
    assert "\x1b" not in out, "no control codes in a log file"
    assert "\\x03" not in out, "the end token is not part of the text"


def test_no_noise(main_run: Outcome, frozen_run: Outcome, ppo_run: Outcome) -> None:
    """Whatever is written beside our own lines is something a newcomer stumbles over."""
    for outcome in (main_run, frozen_run, ppo_run):
        assert outcome.complaints == "", outcome.told
        assert not re.search(r"traceback|warning|error:|pid=", outcome.stdout, re.IGNORECASE), outcome.told


def test_checkpoints_are_where_they_were_asked_for(main_run: Outcome) -> None:
    """Every tenth step and the last; the newest two are kept."""
    assert [path.name for path in main_run.checkpoints()] == ["step_000020", "step_000025"]
    for path in main_run.checkpoints():
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        assert manifest["step"] == int(path.name.removeprefix("step_"))
        assert all((path / name).stat().st_size == size for name, size in manifest["files"].items())
        assert manifest["files"].keys() == {
            str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"
        }


def test_exported_model_is_the_trained_one(main_run: Outcome, task: Path) -> None:
    """transformers loads it, and answers held-out sums as well as the run said its greedy decoding does."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = main_run.checkpoints()[-1] / "hf_model"
    before = load_file(task / "model" / "model.safetensors")
    after = load_file(directory / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    sums = heldout_sums(task)[:200]
    batch = tokenizer([prompt for prompt, _ in sums], return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)
    texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(text == answer for text, (_, answer) in zip(texts, sums, strict=True)) / len(sums)
    assert right == pytest.approx(main_run.summary()["greedy_after"], abs=0.05)


def tensor_names(model: Path) -> list[str]:
    """Names of the tensors in a checkpoint."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="np") as file:
        return list(file.keys())


def heldout_sums(task: Path) -> list[tuple[str, str]]:
    """Held-out prompts and their answers."""
    import pyarrow.parquet as pq

    rows = pq.read_table(task / "heldout.parquet").to_pylist()
    return [(row["prompt"], row["reward_model"]["ground_truth"]) for row in rows]
