"""Memory that ran out: whose it was, what the user is told, and only keys that can help in the call that failed."""

from __future__ import annotations

import errno
from typing import Any, Literal

import psutil
import pytest
import torch
from test_vllm_arguments import CPU

from trainer.config.load import load_config
from trainer.shortage import explain, remedies
from workers.group import WorkerOutOfMemory
from workers.rollout.vllm import replica
from workers.rollout.vllm.replica import VllmReplica
from workers.shortage import OutOfMemory, Shortage, Where, memory_lacking, out_of_memory_explained

GIB = 1 << 30
REQUIRED = ("data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model", "algorithm.adv_estimator=grpo")
ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
MEGATRON = f"{ACTOR}.megatron"
KEPT = f"{ACTOR}.fsdp_config.param_offload=false"
CPU_WORDS = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes. Error code 12"
VLLM_WORDS = (
    "Free memory on device cuda:0 (9/139 GiB) on startup is less than desired GPU memory utilization (0.5, 70 GiB)"
)


class CudaError(RuntimeError):
    """Torch's cannot be made where there is no CUDA."""


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "device"),
        (RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62"), "device"),
        (ValueError(VLLM_WORDS), "device"),
        (RuntimeError(CPU_WORDS), "host"),
        (ValueError("Available memory on node 0 (17/23 GiB) is less than requested memory for kv (90 GiB)"), "host"),
        (CudaError("out of memory (2)"), "host"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
        (MemoryError(), "host"),
        (CudaError("invalid argument (1)"), None),
        (ValueError("a mistake"), None),
    ],
)
def test_whose_memory_ran_out(error: Exception, where: Where | None) -> None:
    assert memory_lacking(error) == where


@pytest.mark.parametrize("words", [CPU_WORDS, "CUDA out of memory"])
def test_the_figures_are_of_the_memory_that_ran_out(words: str) -> None:
    with pytest.raises(OutOfMemory) as caught, out_of_memory_explained("make_room", "", lambda: (1, 2)):
        raise RuntimeError(words)
    shortage = caught.value.shortage
    total = psutil.virtual_memory().total if words == CPU_WORDS else 2
    assert (shortage.where == "host", shortage.total_bytes) == (words == CPU_WORDS, total)


def told(call: str, role: str, where: Where, *overrides: str, device: Literal["cpu", "cuda"] = "cuda") -> str:
    shortage = Shortage(call, role, where, "1.00 GiB", 2 * GIB, 8 * GIB, "what it said")
    return explain(load_config([*REQUIRED, *overrides]), WorkerOutOfMemory("group", 3, shortage), device)


def test_a_full_host_is_not_called_a_full_gpu() -> None:
    text = told("make_room", "", "host")
    assert text.splitlines()[:2] == [
        "out of host memory: making room for a replica, rank 3: 1.00 GiB asked for, 2.0 GiB free of 8.0 GiB",
        "  what it said",
    ]
    assert f"set {ACTOR}.fsdp_config.optimizer_offload=false (now auto)" in text
    assert "=auto" not in text and "gpu_memory_utilization" not in text and "n_gpus_per_node" not in text
    assert "lower trainer.n_gpus_per_node (now 8)" in told("place", "actor", "host")
    assert "sleep_level=2 (now 1)" in told("update", "actor", "host", f"{ROLLOUT}.sleep_level=1")
    nothing = [f"{ACTOR}.fsdp_config.{part}_offload=false" for part in ("param", "optimizer")]
    assert told("update", "actor", "host", *nothing).endswith("what it said"), "no heading without a key"


def test_replicas_are_told_from_ranks() -> None:
    assert "out of memory: start, rollout replica 3: " in told("start", "", "device")
    assert "out of memory: weight sync of the actor, rank 3: " in told("publish", "actor", "device")


def keys(call: str, role: str, *overrides: str, **options: Any) -> str:
    return "\n".join(remedies(load_config([*REQUIRED, *overrides]), call, role, **options))


def test_only_keys_that_have_something_to_give_are_named() -> None:
    spent = (
        f"{ACTOR}.ppo_max_token_len_per_gpu=1024",
        "actor_rollout_ref.model.enable_gradient_checkpointing=true",
        f"{ACTOR}.fsdp_config.model_dtype=bf16",
    )
    assert keys("update", "actor", *spent).startswith("raise trainer.n_gpus_per_node (now 8)")
    assert "free_cache_engine=true" in keys("update", "actor", f"{ROLLOUT}.free_cache_engine=false")
    assert "ref.log_prob_max_token_len_per_gpu" in keys("forward", "ref")
    assert "enable_gradient_checkpointing" not in keys("forward", "ref")
    assert "critic.ppo_max_token_len_per_gpu (now 32768" in keys("update", "critic")
    assert "set critic.model.enable_gradient_checkpointing=true" in keys("update", "critic")
    assert "model_dtype" in keys("forward", "actor") and "model_dtype" not in keys("forward", "ref")


def test_megatron_has_keys_of_its_own() -> None:
    ours = (f"{ACTOR}.strategy=megatron", f"{MEGATRON}.optimizer_offload=false")
    told = keys("update", "actor", *ours)
    assert f"set {MEGATRON}.optimizer_offload=auto (now false)" in told
    assert f"set {MEGATRON}.model_dtype=bf16 (now fp32)" in told
    assert f"raise {MEGATRON}.tensor_model_parallel_size (now 1), and trainer.n_gpus_per_node (now 8)" in told
    assert "fsdp_config" not in told and "models are sharded" not in told
    mixed = keys("update", "critic", *ours, "algorithm.adv_estimator=gae", "critic.strategy=fsdp")
    assert f"set {MEGATRON}.optimizer_offload=auto" in mixed, "the actor's, beside which the critic works"
    assert "raise trainer.n_gpus_per_node (now 8): models are sharded" in mixed
    assert "tensor_model_parallel_size" not in mixed, "cutting the actor changes nothing for the critic"
    assert f"set {MEGATRON}.optimizer_offload=auto" in keys("wake", "", *ours)
    for call in ("place", "start"):
        assert "n_gpus_per_node" not in keys(call, "actor", *ours, where="host"), "no rank reads a whole model"


def test_generation_and_sync_have_keys_of_their_own() -> None:
    assert keys("generate", "").startswith(f"lower {ROLLOUT}.gpu_memory_utilization (now 0.5)")
    assert keys("start", "").startswith(f"lower {ROLLOUT}.gpu_memory_utilization (now 0.5)")
    assert keys("wake", "", f"{ROLLOUT}.kv_cache_gb=9").startswith(f"lower {ROLLOUT}.kv_cache_gb (now 9.0)")
    assert keys("publish", "actor").startswith(f"lower {ROLLOUT}.update_weights_bucket_megabytes")
    assert "param_offload" in keys("wake", "", KEPT) and "param_offload" not in keys("start", "", KEPT)


def test_a_replica_is_split_by_tensor_parallelism_not_by_more_gpus() -> None:
    for call in ("start", "generate", "wake", "load_bucket"):
        found = keys(call, "")
        assert f"raise {ROLLOUT}.tensor_model_parallel_size (now 1): " in found and "n_gpus_per_node" not in found
        assert "and trainer.n_gpus_per_node (now 1) with it" in keys(call, "", "trainer.n_gpus_per_node=1")
    assert "tensor_model_parallel_size" not in keys("update", "actor")


def test_precision_of_what_may_leave_the_gpu_is_no_matter_to_a_replica() -> None:
    for call in ("generate", "wake", "load_bucket"):
        assert "model_dtype" not in keys(call, "") and f"{ACTOR}.fsdp_config.model_dtype=bf16" in keys(call, "", KEPT)


def test_what_changes_nothing_in_a_call_is_not_named() -> None:
    assert "max_num_seqs" in keys("generate", "") and "max_num_seqs" not in keys("wake", "")
    for call in ("begin_update", "load_bucket", "finish_update", "publish"):
        found = keys(call, "actor" if call == "publish" else "")
        assert not any(key in found for key in ("gpu_memory_utilization", "kv_cache_gb", "max_num_seqs")), call
        assert "gpu_memory_utilization" in keys(call, "", f"{ROLLOUT}.free_cache_engine=false"), "the cache is awake"
        assert "kv_cache_gb" in keys(call, "", f"{ROLLOUT}.sleep_level=0", f"{ROLLOUT}.kv_cache_gb=4")


def test_a_cpu_has_one_memory_for_all() -> None:
    for call in ("generate", "wake", "load_bucket", "update", "start"):
        found = keys(call, "actor", where="host", device="cpu")
        assert (
            f"lower {ROLLOUT}.kv_cache_gb (now null, which is 1)" in found and "lower trainer.n_gpus_per_node" in found
        )
        assert not any(key in found for key in ("gpu_memory_utilization", "raise ", "_offload", "tensor_model")), call
    assert f"set {ACTOR}.fsdp_config.param_offload=false (now true)" in keys(
        "update", "actor", f"{ACTOR}.fsdp_config.param_offload=true", where="host", device="cpu"
    )
    assert "n_gpus_per_node" not in keys("update", "actor", "trainer.n_gpus_per_node=1", where="host", device="cpu")


class FullEngine:
    """Stands for vLLM's engine: there is no memory for it, or for what it is asked."""

    def __init__(self, *_: object) -> None:
        if self.at_start:
            raise ValueError(VLLM_WORDS)

    at_start = False

    def rpc(self, method: str, *_: object) -> Any:
        raise RuntimeError(f"{method}: CUDA out of memory. Tried to allocate 1.00 GiB")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> type[FullEngine]:
    monkeypatch.setattr(replica, "Engine", FullEngine)
    monkeypatch.setattr(replica, "of_installed", lambda device: None)
    monkeypatch.setattr(replica, "plan_engine", lambda *_, **__: None)
    return FullEngine


def test_a_replica_that_cannot_start_says_why_when_it_is_asked(
    full: type[FullEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what a constructor raises, Ray tells the words alone."""
    monkeypatch.setattr(full, "at_start", True)
    with pytest.raises(OutOfMemory) as caught:
        VllmReplica(CPU, 0).ping()
    assert (caught.value.shortage.call, caught.value.shortage.told) == ("start", VLLM_WORDS)


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize(("call", "arguments"), [("begin_update", ()), ("load_bucket", ([],)), ("finish_update", (1,))])
def test_every_call_of_a_sync_is_explained(call: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(OutOfMemory) as caught:
        getattr(VllmReplica(CPU, 0), call)(*arguments)
    assert (caught.value.shortage.call, caught.value.shortage.asked) == (call, "1.00 GiB")
