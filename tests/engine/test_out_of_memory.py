"""A device that runs out of memory in a real TrainWorker: one error with figures, and the keys that would help."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from engine_harness import ADAMW, make_spec
from torch import Tensor

from trainer.config.load import load_config
from trainer.shortage import explain
from workers.batch import MicroBatch
from workers.engines.base import Update
from workers.group import WorkerGroup, WorkerOutOfMemory
from workers.normalizers import Normalizers
from workers.protocol import RolloutBlock, Trajectory
from workers.train_worker import RankBatch, TrainWorker

TIMEOUT_S = 60.0
REQUIRED = ("data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model", "algorithm.adv_estimator=grpo")
TOLD = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.80 GiB"


class Greedy:
    """A loss that asks for more than there is."""

    def __call__(self, outputs: Tensor, entropy: Tensor | None, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        raise torch.OutOfMemoryError(TOLD)


@pytest.fixture(scope="module")
def alone() -> Iterator[WorkerGroup]:
    """One training rank of a small local Ray."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield WorkerGroup("training", [ray.remote(num_cpus=0)(TrainWorker).remote(0, 1, "cpu", 0, 1, TIMEOUT_S, False)])
    ray.shutdown()


@pytest.fixture(scope="module")
def group(alone: WorkerGroup, qwen2: Path) -> WorkerGroup:
    """One training rank with an actor whose weights are always offloaded."""
    host, port = ray.get(alone.actors[0].rendezvous.remote())
    alone.broadcast(TrainWorker.connect, host, port).result(TIMEOUT_S)
    alone.broadcast(TrainWorker.prepare, "actor", make_spec(qwen2, optimizer=ADAMW)).result(TIMEOUT_S)
    placed = alone.broadcast(TrainWorker.place, "actor", {"weights": True, "optimizer": "auto"})
    assert placed.result(TIMEOUT_S)[0] > 0
    return alone


def batch() -> RankBatch:
    """Two responses to one prompt."""
    block = RolloutBlock.collate([Trajectory(0, sample, (1, 2), (3, 4, 5), "stop", 0) for sample in range(2)])
    rows = np.arange(2)
    return RankBatch("k", (ray.put(block),), np.stack([np.zeros(2, np.intp), rows], axis=1), rows, np.full(2, 3))


def test_an_update_without_memory_is_one_error_with_keys(group: WorkerGroup) -> None:
    update = Update([[0, 1]], Normalizers(1.0, 1.0))
    call = group.scatter(TrainWorker.update, [("actor", batch(), (), [update], Greedy(), 1.0, False)])
    with pytest.raises(WorkerOutOfMemory) as caught:
        call.result(TIMEOUT_S)
    shortage = caught.value.shortage
    assert (shortage.call, shortage.role, shortage.where, shortage.asked) == ("update", "actor", "device", "2.50 GiB")
    assert 0 < shortage.free_bytes <= shortage.total_bytes
    cfg = load_config([*REQUIRED, "actor_rollout_ref.actor.fsdp_config.param_offload=false"])
    told = explain(cfg, caught.value, "cuda")
    assert told.splitlines()[0].startswith("out of memory: update of the actor, rank 0: 2.50 GiB asked for, ")
    assert "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu (now 16384; a sequence has up to 1024" in told
    assert "set actor_rollout_ref.model.enable_gradient_checkpointing=true (now auto)" in told
    assert "set actor_rollout_ref.actor.fsdp_config.param_offload=auto (now false)" in told


def test_a_worker_reports_its_memory_and_makes_room(group: WorkerGroup) -> None:
    """On a CPU what is to be offloaded always is, and nothing leaves for the sake of room."""
    group.broadcast(TrainWorker.make_room, 1 << 60).result(TIMEOUT_S)
    calls = group.scatter(TrainWorker.forward, [("actor", batch(), (), [[0, 1]], 1.0)])
    ((holds, values),) = calls.result(TIMEOUT_S)
    assert holds and len(values) == 6
    (report,) = group.broadcast(TrainWorker.memory_report, True).result(TIMEOUT_S)
    assert set(report.offloaded) == {"actor_weights"}
    assert 1 << 20 < report.peaks["forward"] < report.total_bytes
    assert group.broadcast(TrainWorker.memory_report, True).result(TIMEOUT_S)[0].peaks == {}
