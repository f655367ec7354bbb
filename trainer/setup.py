"""Builds what the actors hold, until a `Driver` can be put together of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ray

from trainer.actors import Workers
from trainer.assembly import Running, assemble
from trainer.config.roles import training_roles
from trainer.config.schema import Config
from trainer.driver import Driver
from trainer.engines import offloads
from trainer.inputs import Inputs, absolute
from trainer.memory import TrainingMemory
from trainer.sources import SyncSource
from trainer.specs import Sizes, engine_specs
from trainer.tracking.phases import Phases
from workers.engines.base import EngineSpec
from workers.group import WorkerError, WorkerGroup
from workers.reward.worker import RewardWorker
from workers.rollout.spec import SamplingSpec
from workers.settings import Auto
from workers.sync.sync import WeightSync
from workers.train_worker import TrainWorker


def build(
    cfg: Config, inputs: Inputs, workers: Workers, sizes: Sizes, phases: Phases, sampling: SamplingSpec
) -> Driver:
    """Builds the engines, waits until every worker is ready, and puts the driver together. sampling: of training.

    Models are read into host memory while the replicas start, as far as `read_ahead` says; the others are read one by
    one afterwards, each placed before the next.
    """
    timeout_s = cfg.trainer.startup_timeout_s
    check_paths(cfg, inputs, workers.groups)
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


def check_paths(cfg: Config, inputs: Inputs, groups: Sequence[WorkerGroup]) -> None:
    """Raises WorkerError unless every training rank sees what the driver does: the models, and the run directory."""
    critic = {absolute(cfg.critic.model.path): "critic.model.path"} if cfg.use_critic else {}
    named = critic | {inputs.model_path: "actor_rollout_ref.model.path"}
    named[str(Path(cfg.trainer.default_local_dir).resolve())] = "trainer.default_local_dir"
    paths = [path for path in named if Path(path).is_absolute() and Path(path).exists()]  # others are names on the hub
    for group in groups:
        for rank, unseen in enumerate(group.broadcast(TrainWorker.unseen, paths).result(cfg.trainer.startup_timeout_s)):
            for path in unseen:
                raise WorkerError(
                    f"{named[path]}={path}: training rank {rank} is on a node that does not have it; put it where all "
                    "nodes see it under the same name"
                )


def read_ahead(specs: Mapping[str, EngineSpec], num_ranks: int) -> tuple[str, ...]:
    """The roles that are prepared while the replicas start. FSDP reads a whole model into the host memory of each rank:
    with several ranks only the actor's, so that a node holds one model for each at most. Megatron reads nothing yet.
    """
    return tuple(
        role for role, spec in specs.items() if num_ranks == 1 or role == "actor" or spec.strategy == "megatron"
    )


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
    sync = WeightSync(workers.train["actor"], workers.replicas, "actor", cfg.trainer.step_timeout_s, workers.routes)
    sync.open(rollout.dtype, rollout.update_weights_bucket_megabytes << 20, workers.channel)
    return sync
