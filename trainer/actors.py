"""Starts the actors of a run: training ranks, replicas, scorers; each on the devices that the configuration names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.config.mapping import is_shared, replica_devices, training_devices
from trainer.config.schema import Config
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
from workers.sync.relay import BucketRelay, Routes, far_ranks
from workers.train_worker import TrainWorker


@dataclass(frozen=True, slots=True)
class Workers:
    """All actors of the run. train: role to the group of its ranks; roles on the same devices share one.

    beside: of each replica, the training ranks on devices that it uses too. log: takes what replicas say of themselves.
    channel, routes: how weights get from the actor's ranks to the replicas.
    """

    replicas: RolloutPool
    log: RolloutLog
    scorers: WorkerGroup
    train: dict[str, WorkerGroup]
    beside: tuple[tuple[WorkerGroup, ...], ...]
    channel: Channel
    routes: Routes

    @property
    def groups(self) -> tuple[WorkerGroup, ...]:
        """The groups of training ranks, each once."""
        return tuple({id(group): group for group in self.train.values()}.values())


def start_workers(cfg: Config, inputs: Inputs, cluster: Cluster) -> Workers:
    """Starts every actor; returns at once, while they import what they need."""
    log = RolloutLog(Path(cfg.trainer.default_local_dir).resolve())
    replicas = start_replicas(cfg, inputs, cluster, log)
    training, generating = training_devices(cfg, num_devices=cfg.num_devices), replica_devices(cfg)
    groups = {ranks: _start_ranks(cfg, cluster, ranks) for ranks in dict.fromkeys(training.values())}
    train = {role: groups[ranks] for role, ranks in training.items()}
    return Workers(
        replicas,
        log,
        _start_scorers(cfg, inputs),
        train,
        tuple(_ranks_on(groups, devices) for devices in generating),
        _channel(cluster, training["actor"], generating),
        _routes(cluster, training["actor"], generating),
    )


def start_replicas(cfg: Config, inputs: Inputs, cluster: Cluster, log: RolloutLog) -> RolloutPool:
    """Starts the replicas alone; returns at once."""
    rollout = cfg.actor_rollout_ref.rollout
    ranks = replica_devices(cfg)

    def start_one(replica: int) -> Any:
        devices = [cluster.devices[r] for r in ranks[replica]]
        spec = rollout_spec(cfg, inputs, cluster.device_type, devices, shared=is_shared(cfg, ranks[replica]))
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
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(RewardWorker).options(num_cpus=0, scheduling_strategy=here)
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
    threads = cluster.threads(ranks)
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


def _channel(cluster: Cluster, training: Sequence[int], generating: Sequence[Sequence[int]]) -> Channel:
    """One GPU's memory where a single training rank and every replica use the same one, else shared memory."""
    devices = {device for replica in generating for device in replica}
    same = cluster.device_type == "cuda" and len(training) == 1 and devices == set(training)
    return "cuda_ipc" if same else "shared_memory"


def _routes(cluster: Cluster, training: Sequence[int], generating: Sequence[Sequence[int]]) -> Routes:
    """Where the weights start and end, with a relay on each node that they reach from others."""
    trainers = tuple(cluster.devices[rank].node for rank in training)
    replicas = tuple(cluster.devices[devices[0]].node for devices in generating)
    places = {node: generating[replicas.index(node)][0] for node in far_ranks(trainers, replicas)}
    relays = {node: start(BucketRelay, cluster.devices[device]) for node, device in places.items()}
    return Routes(trainers, replicas, relays)


def _ranks_on(groups: Mapping[tuple[int, ...], WorkerGroup], devices: Sequence[int]) -> tuple[WorkerGroup, ...]:
    """Of every group, the ranks on these devices. groups: by the devices of their ranks."""
    chosen = [(group, [r for r, device in enumerate(of) if device in devices]) for of, group in groups.items()]
    return tuple(WorkerGroup(group.name, [group.actors[r] for r in on], ranks=on) for group, on in chosen if on)
