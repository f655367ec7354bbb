"""Starts the actors of a run: training ranks, replicas, scorers; each on the devices that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from trainer.config.schema import Config
from trainer.config.validate import role_devices, training_devices
from trainer.inputs import Inputs
from trainer.placement import Cluster, start
from trainer.specs import rollout_spec
from trainer.tracking.rollout import RolloutLog
from workers.group import WorkerGroup
from workers.reward.decoding import decoder_json
from workers.reward.function import RewardSpec
from workers.reward.worker import RewardWorker
from workers.rollout.pool import PoolLimits, RolloutPool
from workers.rollout.vllm.capabilities import of_installed
from workers.rollout.vllm.replica import CONCURRENCY_GROUPS, VllmReplica
from workers.sync.buckets import Channel
from workers.train_worker import TrainWorker


@dataclass(frozen=True, slots=True)
class Workers:
    """All actors of the run. train: role to the group of its ranks; roles on the same devices share one.

    beside: of each replica, the training ranks on devices that it uses too. log: takes what replicas say of themselves.
    """

    replicas: RolloutPool
    log: RolloutLog
    scorers: WorkerGroup
    train: dict[str, WorkerGroup]
    beside: tuple[tuple[WorkerGroup, ...], ...]
    channel: Channel

    @property
    def groups(self) -> tuple[WorkerGroup, ...]:
        """The groups of training ranks, each once."""
        return tuple({id(group): group for group in self.train.values()}.values())


def start_workers(cfg: Config, inputs: Inputs, cluster: Cluster) -> Workers:
    """Starts every actor; returns at once, while they import what they need."""
    log = RolloutLog(Path(cfg.trainer.default_local_dir).resolve())
    replicas = start_replicas(cfg, inputs, cluster, log)
    groups: dict[tuple[int, ...], WorkerGroup] = {}
    train: dict[str, WorkerGroup] = {}
    for role, ranks in training_devices(cfg, num_devices=len(cluster.devices)).items():
        if ranks not in groups:
            groups[ranks] = _start_ranks(cfg, cluster, ranks)
        train[role] = groups[ranks]
    beside = tuple(_ranks_on(groups, devices) for devices in _replica_ranks(cfg, len(cluster.devices)))
    return Workers(replicas, log, _start_scorers(cfg, inputs), train, beside, _channel(cfg, cluster))


def start_replicas(cfg: Config, inputs: Inputs, cluster: Cluster, log: RolloutLog) -> RolloutPool:
    """Starts the replicas alone; returns at once."""
    rollout = cfg.actor_rollout_ref.rollout
    ranks = _replica_ranks(cfg, len(cluster.devices))

    def start_one(replica: int) -> Any:
        devices = [cluster.devices[r] for r in ranks[replica]]
        spec = rollout_spec(cfg, inputs, cluster.device_type, devices)
        return start(VllmReplica, devices[0], spec, replica, concurrency_groups=CONCURRENCY_GROUPS)

    limits = PoolLimits(
        timeout_s=rollout.timeout_s,
        update_timeout_s=cfg.trainer.step_timeout_s,
        startup_timeout_s=cfg.trainer.startup_timeout_s,
        hang_timeout_s=rollout.hang_timeout_s,
        max_replacements=rollout.max_replacements,
        # where what others hold counts against a replica's share, all that training can do without must go
        memory_share=1.0 if of_installed(cluster.device_type).cache_counts_others else rollout.gpu_memory_utilization,
    )
    return RolloutPool(start_one, len(ranks), limits=limits, observe=log.observe)


def _start_scorers(cfg: Config, inputs: Inputs) -> WorkerGroup:
    function = cfg.reward.custom_reward_function
    actor = ray.remote(RewardWorker).options(num_cpus=0)
    handle = actor.remote(
        RewardSpec(function.path, function.name).resolved(),
        inputs.tokenizer_path,
        cfg.reward.num_workers,
        cfg.reward.timeout_s,
        cfg.actor_rollout_ref.model.trust_remote_code,
        decoder_json(inputs.tokenizer),
    )
    return WorkerGroup("reward", [handle])


def _start_ranks(cfg: Config, cluster: Cluster, ranks: Sequence[int]) -> WorkerGroup:
    threads = cluster.threads(len(ranks))
    actors = [
        start(
            TrainWorker,
            cluster.devices[device],
            rank,
            len(ranks),
            cluster.device_type,
            cluster.devices[device].local_index,
            threads,
            cfg.trainer.step_timeout_s,
            cfg.trainer.full_determinism,
        )
        for rank, device in enumerate(ranks)
    ]
    return WorkerGroup("training", actors)


def _channel(cfg: Config, cluster: Cluster) -> Channel:
    """One GPU's memory where a single training rank and every replica use the same one, else shared memory."""
    generating = _rollout_ranks(cfg, len(cluster.devices))
    training = training_devices(cfg, num_devices=len(cluster.devices))["actor"]
    same = cluster.device_type == "cuda" and len(training) == 1 and set(generating) == set(training)
    return "cuda_ipc" if same else "shared_memory"


def _rollout_ranks(cfg: Config, num_devices: int) -> tuple[int, ...]:
    mapping = cfg.actor_rollout_ref.rollout.device_mapping
    return role_devices(mapping, "actor_rollout_ref.rollout.device_mapping", num_devices=num_devices)


def _replica_ranks(cfg: Config, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """The global device ranks of each replica."""
    ranks, size = _rollout_ranks(cfg, num_devices), cfg.actor_rollout_ref.rollout.tensor_model_parallel_size
    return tuple(ranks[first : first + size] for first in range(0, len(ranks), size))


def _ranks_on(groups: Mapping[tuple[int, ...], WorkerGroup], devices: Sequence[int]) -> tuple[WorkerGroup, ...]:
    """Of every group, the ranks on these devices. groups: by the devices of their ranks."""
    chosen = [(group, [r for r, device in enumerate(of) if device in devices]) for of, group in groups.items()]
    return tuple(WorkerGroup(group.name, [group.actors[r] for r in on], ranks=on) for group, on in chosen if on)
