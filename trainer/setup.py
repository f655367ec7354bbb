"""Starts the workers, and builds what they hold, until a `Driver` can be put together of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from trainer.assembly import Running, assemble
from trainer.config.roles import training_roles
from trainer.config.schema import Config
from trainer.config.validate import role_devices, training_devices
from trainer.driver import Driver
from trainer.engines import offloads
from trainer.inputs import Inputs
from trainer.memory import TrainingMemory
from trainer.placement import Cluster, start
from trainer.sources import SyncSource
from trainer.specs import Sizes, engine_specs, rollout_spec
from trainer.tracking.phases import Phases
from trainer.tracking.rollout import RolloutLog
from workers.engines.base import EngineSpec
from workers.group import WorkerGroup
from workers.reward.decoding import decoder_json
from workers.reward.function import RewardSpec
from workers.reward.worker import RewardWorker
from workers.rollout.pool import PoolLimits, RolloutPool
from workers.rollout.spec import SamplingSpec
from workers.rollout.vllm.capabilities import of_installed
from workers.rollout.vllm.replica import CONCURRENCY_GROUPS, VllmReplica
from workers.settings import Auto
from workers.sync.buckets import Channel
from workers.sync.sync import WeightSync
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


def build(
    cfg: Config, inputs: Inputs, workers: Workers, sizes: Sizes, phases: Phases, sampling: SamplingSpec
) -> Driver:
    """Builds the engines, waits until every worker is ready, and puts the driver together. sampling: of training.

    Models are read into host memory while the replicas start, as far as `read_ahead` says; the others are read one by
    one afterwards, each placed before the next.
    """
    timeout_s = cfg.trainer.startup_timeout_s
    for group in workers.groups:
        host, port = ray.get(group.actors[0].rendezvous.remote(), timeout=timeout_s)
        group.broadcast(TrainWorker.connect, host, port).result(timeout_s)
    specs = engine_specs(cfg, inputs, sizes)
    ahead = read_ahead(specs, sum(len(group) for group in workers.groups))
    prepare_engines(workers.train, {role: specs[role] for role in ahead}, timeout_s)
    workers.replicas.ready()  # they size their caches by what is free: training stays off the devices until then
    source = _source(cfg, workers, phases)
    source.sleep()  # as during training; the first weight sync wakes them
    offload: dict[str, dict[str, Auto]] = {role.name: offloads(role) for role in training_roles(cfg)}
    place_engines(workers.train, specs, offload, prepared=ahead, timeout_s=timeout_s)
    workers.scorers.broadcast(RewardWorker.ping).result(timeout_s)
    return assemble(cfg, inputs, Running(workers.train, source, _sync(cfg, workers), phases), sizes, sampling)


def read_ahead(roles: Iterable[str], num_ranks: int) -> tuple[str, ...]:
    """The roles whose models wait in host memory while the replicas start; FSDP reads a whole model on every rank: with
    several ranks only the actor's, so that a node holds one model for each rank at most. (Megatron reads nothing yet.)
    """
    return tuple(roles) if num_ranks == 1 else ("actor",)


def prepare_engines(train: Mapping[str, WorkerGroup], specs: Mapping[str, EngineSpec], timeout_s: float) -> None:
    """Reads the models of these roles into the host memory of their ranks."""
    for role, spec in specs.items():
        train[role].broadcast(TrainWorker.prepare, role, spec).result(timeout_s)


def place_engines(
    train: Mapping[str, WorkerGroup],
    specs: Mapping[str, EngineSpec],
    offload: Mapping[str, Mapping[str, Auto]],
    *,
    prepared: Sequence[str],
    timeout_s: float,
) -> None:
    """Builds all engines on their devices. prepared: roles whose models are in host memory; others are read here."""
    for role in specs:
        if role not in prepared:
            prepare_engines(train, {role: specs[role]}, timeout_s)
        train[role].broadcast(TrainWorker.place, role, offload[role]).result(timeout_s)


def _source(cfg: Config, workers: Workers, phases: Phases) -> SyncSource:
    rollout = cfg.actor_rollout_ref.rollout
    memory = TrainingMemory(workers.groups, workers.beside, timeout_s=cfg.trainer.step_timeout_s)
    workers.replicas.make_room = memory.make_room
    return SyncSource(
        workers.replicas,
        workers.scorers,
        phases,
        log=workers.log,
        memory=memory,
        timeout_s=rollout.timeout_s,
        seed=rollout.seed,
    )


def _sync(cfg: Config, workers: Workers) -> WeightSync:
    rollout = cfg.actor_rollout_ref.rollout
    sync = WeightSync(workers.train["actor"], workers.replicas, "actor", cfg.trainer.step_timeout_s)
    sync.open(rollout.dtype, rollout.update_weights_bucket_megabytes << 20, workers.channel)
    return sync


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
