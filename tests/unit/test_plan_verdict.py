"""What a plan refuses, what it warns of, and how it knows the GPUs."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
from plan_world import ACTOR, GIB, H200, QWEN_1_5B, QWEN_7B, ROLLOUT, W1, W1_7B, config, devices, language
from transformers import Qwen2Config

from trainer.config.errors import UserError
from trainer.plan import devices as gpus
from trainer.plan.devices import Devices, parse_gpu, planned_devices, real_devices
from trainer.plan.replica import cache_bytes_per_token
from trainer.plan.verdict import Verdict, judge, longest_cache, spans

OWN = "actor_rollout_ref.model"


def verdict(overrides: list[str], hf: Qwen2Config, total: int) -> Verdict:
    cfg = config(overrides)
    per_token = cache_bytes_per_token(cfg.actor_rollout_ref.rollout, language(hf))
    return judge(cfg, devices(cfg, hf, total), total, longest_cache(cfg, per_token))


def test_what_ran_is_let_through() -> None:
    assert verdict(W1, QWEN_1_5B, H200) == verdict(W1_7B, QWEN_7B, H200) == Verdict((), ())


def test_a_model_that_fits_no_way_is_refused_with_the_keys() -> None:
    found = verdict([*W1_7B, f"{ROLLOUT}.gpu_memory_utilization=0.5"], QWEN_7B, 79 * GIB)
    (problem,) = found.problems
    assert problem.startswith(f"{OWN}.path=org/model: update of the actor needs 1")
    assert "of a GPU's 79.0 GiB (GPU 0)" in problem
    assert "set actor_rollout_ref.actor.fsdp_config.model_dtype=bf16 (now fp32)" in problem
    assert "raise trainer.n_gpus_per_node (now 1)" in problem


def test_pinned_parts_count_and_recomputation_that_is_forbidden() -> None:
    assert verdict(W1, QWEN_1_5B, 79 * GIB).problems == ()
    kept = verdict([*W1, f"{OWN}.enable_gradient_checkpointing=false"], QWEN_1_5B, 79 * GIB)
    (problem,) = kept.problems
    assert f"set {OWN}.enable_gradient_checkpointing=true (now false)" in problem
    assert "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu (now 33792" in problem
    pinned = [f"{ACTOR}.fsdp_config.{part}_offload=false" for part in ("param", "optimizer")]
    free = verdict([*W1_7B, *pinned, f"{ROLLOUT}.gpu_memory_utilization=0.9"], QWEN_7B, H200)
    assert any("generate needs" in told and "param_offload=auto (now false)" in told for told in free.problems)


def test_close_to_the_limit_is_a_warning() -> None:
    exact = next(iter(devices(config(W1_7B), QWEN_7B, H200))).phases["update"]
    near = verdict(W1_7B, QWEN_7B, int(exact.floor * 1.02))
    assert near.problems == () and "update of the actor may need" in near.warnings[0]
    over = verdict(W1_7B, QWEN_7B, int(exact.firm * 0.99))
    assert "update of the actor needs" in over.problems[0]


def test_a_cache_for_less_than_one_sequence() -> None:
    found = verdict([*W1_7B, f"{ROLLOUT}.gpu_memory_utilization=0.1"], QWEN_7B, H200)
    (problem,) = found.problems
    assert problem.startswith(
        f"{ROLLOUT}.gpu_memory_utilization=0.1: the KV cache of one sequence of 768 tokens takes 42.0"
    )
    assert f"raise {ROLLOUT}.tensor_model_parallel_size (now 1)" in problem
    (share,) = re.findall(r"raise it to ([\d.]+) or more", problem)
    assert verdict([*W1_7B, f"{ROLLOUT}.gpu_memory_utilization={share}"], QWEN_7B, H200) == Verdict((), ())
    (given,) = verdict([*W1_7B, f"{ROLLOUT}.kv_cache_gb=0.03"], QWEN_7B, H200).problems
    assert given.startswith(f"{ROLLOUT}.kv_cache_gb=0.03: ")
    assert "raise it to 0.05 or more" in given
    small = verdict([*W1_7B, f"{ROLLOUT}.gpu_memory_utilization=0.5"], QWEN_7B, 14 * GIB)
    assert "take a larger GPU, lower data.max_response_length" in small.problems[0]


def test_what_is_counted_already_is_no_remedy_and_one_cause_is_told_once() -> None:
    (problem,) = verdict([*W1_7B, f"{ROLLOUT}.gpu_memory_utilization=0.5"], QWEN_7B, 79 * GIB).problems
    assert "enable_gradient_checkpointing" not in problem, "auto has recomputed all that there is"
    told = verdict([*W1, f"{ROLLOUT}.kv_cache_gb=200"], QWEN_1_5B, H200).problems
    assert [re.search(r": (\w+) needs", each).group(1) for each in told] == ["start", "generate"]  # type: ignore[union-attr]


def test_an_unknown_size_refuses_nothing() -> None:
    cfg = config(W1_7B)
    assert judge(cfg, devices(cfg, QWEN_7B, None), None, 1) == Verdict((), ())


@pytest.mark.parametrize(
    ("told", "gib"),
    [("H100", 79.1), ("nvidia h200", 139.8), ("a100_40g", 39.4), ("80", 80), ("79.1GiB", 79.1), ("80 GB", 80)],
)
def test_gpus_are_told_by_name_or_size(told: str, gib: float) -> None:
    assert parse_gpu(told) == int(gib * GIB)


@pytest.mark.parametrize("told", ["H1000", "many", "0", "-80GiB"])
def test_what_is_no_gpu_is_refused(told: str) -> None:
    with pytest.raises(UserError, match=r"TANDEM_GPU=.*name one of B200, H200"):
        parse_gpu(told)


def test_a_plan_is_for_what_is_told_then_for_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, told = config(W1), {"TANDEM_GPU": "H100"}
    monkeypatch.setattr(gpus, "local_gpu_bytes", lambda: None)
    assert planned_devices(cfg, told) == Devices("cuda", int(79.1 * GIB), "TANDEM_GPU=H100")
    assert planned_devices(cfg, {}).kind == "cpu" and "TANDEM_GPU" in planned_devices(cfg, {}).told_by
    assert planned_devices(config(W1, "trainer.device=cpu"), told).kind == "cpu"
    unknown = planned_devices(config(W1, "trainer.device=cuda"), {})
    assert (unknown.kind, unknown.total_bytes) == ("cuda", None)
    monkeypatch.setattr(gpus, "local_gpu_bytes", lambda: GIB)
    assert planned_devices(cfg, {}).total_bytes == GIB
    assert planned_devices(cfg, told).total_bytes == int(79.1 * GIB), "planning for another machine"


def test_a_run_has_the_gpus_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[Any] = [
        {"Resources": {"GPU": 8.0, "accelerator_type:H200": 1.0}},
        {"Resources": {"accelerator_type:L4": 1}},
    ]
    monkeypatch.setattr(gpus, "local_gpu_bytes", lambda: GIB)
    assert real_devices("cuda", nodes, {"TANDEM_GPU": "H100"}).total_bytes == GIB
    monkeypatch.setattr(gpus, "local_gpu_bytes", lambda: None)
    assert real_devices("cuda", nodes, {}).total_bytes == 22 * GIB, "the smallest that Ray names"
    assert real_devices("cuda", [], {"TANDEM_GPU": "H100"}).total_bytes == int(79.1 * GIB)
    assert real_devices("cuda", [], {}).total_bytes is None
    assert real_devices("cpu", nodes, {"TANDEM_GPU": "H100"}) == Devices("cpu", None, "CPUs")


@pytest.mark.parametrize(
    ("output", "status", "found"), [("81559\n40960\n", 0, 40960 << 20), ("", 0, None), ("9\n", 9, None)]
)
def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, output: str, status: int, found: int | None) -> None:
    monkeypatch.setattr(gpus.shutil, "which", lambda name: "/bin/nvidia-smi")
    done = subprocess.CompletedProcess([], status, stdout=output)
    monkeypatch.setattr(gpus.subprocess, "run", lambda *args, **options: done)
    assert gpus.local_gpu_bytes() == found


def test_devices_in_words() -> None:
    assert [spans(each) for each in ([0], [0, 1, 2], [3, 0, 1])] == ["GPU 0", "GPUs 0-2", "GPUs 0-1, 3"]
