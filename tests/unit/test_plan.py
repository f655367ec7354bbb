"""The table that is shown before a run starts: which engine each role has, and how its model lies on the devices."""

from __future__ import annotations

from typing import Any

from trainer.config.load import load_config
from trainer.placement import Cluster, Device
from trainer.plan.roles import role_rows

REQUIRED = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model", "trainer.n_gpus_per_node=8"]
ACTOR = "actor_rollout_ref.actor"


def rows(*overrides: str) -> dict[object, tuple[object, ...]]:
    """Role -> devices, engine, parallelism, precision, on eight GPUs."""
    group: Any = None
    cluster = Cluster("cuda", tuple(Device(group, i, 0, i) for i in range(8)), 8, (group,))
    return {row.pop("role"): tuple(row.values()) for row in role_rows(load_config([*REQUIRED, *overrides]), cluster)}


def test_fsdp_takes_the_devices_there_are() -> None:
    assert rows("critic.device_mapping=0-2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2") == {
        "actor": ("cuda 0-7", "FSDP2", "8 ranks", "bfloat16"),
        "critic": ("cuda 0-2", "FSDP2", "3 ranks", "bfloat16"),
        "rollout": ("cuda 0-7", "vLLM", "4 x tp 2", "bfloat16"),
    }


def test_megatron_says_how_it_cuts() -> None:
    found = rows(
        f"{ACTOR}.strategy=megatron",
        f"{ACTOR}.megatron.tensor_model_parallel_size=2",
        f"{ACTOR}.megatron.pipeline_model_parallel_size=2",
        f"{ACTOR}.use_kl_loss=true",
        "actor_rollout_ref.ref.megatron.dtype=float32",
        "actor_rollout_ref.ref.megatron.expert_model_parallel_size=2",
        "critic.device_mapping=[4]",
        "critic.strategy=fsdp",
    )
    assert found["actor"] == ("cuda 0-7", "Megatron", "tp 2 x pp 2 x dp 2", "bfloat16")
    assert found["reference"] == ("cuda 0-7", "Megatron", "tp 2 x pp 2 x dp 2 (ep 2)", "float32")
    assert found["critic"] == ("cuda [4]", "FSDP2", "1 rank", "bfloat16")
