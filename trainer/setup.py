"""Builds the engines on the actors and puts a `Driver` together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray

from trainer.actors import Workers
from trainer.advantage import AdvantageComputer
from trainer.algorithms.advantages import Estimator, estimator
from trainer.algorithms.kl import kl_controller
from trainer.algorithms.losses import PolicyLoss, policy_loss, value_loss
from trainer.batching import Limits
from trainer.collect import Collector, GroupFilter, Overlong
from trainer.config.roles import training_roles
from trainer.config.schema import Config
from trainer.data.order import PromptOrder
from trainer.driver import Cadence, Driver, validation_sampling
from trainer.engines import offloads, parallel_spec
from trainer.evaluation import Evaluation
from trainer.inputs import Inputs
from trainer.loss_columns import LossColumns
from trainer.memory import TrainingMemory
from trainer.roles import AbsentRole, Passes, Role, TrainRole, UpdateSettings
from trainer.sources import SyncSource
from trainer.specs import Sizes, engine_specs
from trainer.state import TrainState
from trainer.tracking.phases import Phases
from workers.engines.base import EngineSpec
from workers.group import WorkerGroup
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
    return _driver(cfg, inputs, workers, source, sizes, phases, sampling)


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


def _driver(
    cfg: Config,
    inputs: Inputs,
    workers: Workers,
    source: SyncSource,
    sizes: Sizes,
    phases: Phases,
    sampling: SamplingSpec,
) -> Driver:
    rollout = cfg.actor_rollout_ref.rollout
    sync = WeightSync(workers.train["actor"], workers.replicas, "actor", cfg.trainer.step_timeout_s)
    sync.open(rollout.dtype, rollout.update_weights_bucket_megabytes << 20, workers.channel)
    order = PromptOrder(len(inputs.train), seed=cfg.data.seed, shuffle=cfg.data.shuffle)
    val = rollout.val_kwargs
    loss = _policy_loss(cfg)
    return Driver(
        state=TrainState(order=order, kl=kl_controller(cfg.algorithm.kl_ctrl)),
        source=source,
        collector=_collector(cfg, inputs, source, phases, sampling),
        actor=_actor(cfg, workers, inputs),
        reference=_reference(cfg, workers, inputs),
        critic=_critic(cfg, workers, inputs),
        advantages=AdvantageComputer(cfg.algorithm),
        loss_columns=LossColumns(loss, seed=cfg.actor_rollout_ref.actor.data_loader_seed),
        sync=sync,
        evaluation=Evaluation(
            prompts=inputs.validation.prompts if inputs.validation else (),
            sampling=validation_sampling(
                sampling, n=val.n, temperature=val.temperature, top_p=val.top_p, top_k=val.top_k
            ),
            greedy=val.greedy,
            batch_size=cfg.data.val_batch_size,
            max_error_rate=cfg.reward.max_error_rate,
        ),
        cadence=Cadence(
            total_steps=sizes.total_steps,
            test_freq=cfg.trainer.test_freq,
            save_freq=cfg.trainer.save_freq,
            critic_warmup=cfg.trainer.critic_warmup,
            old_logprobs=wants_old_logprobs(loss, sizes.actor_updates_per_step)
            or cfg.algorithm.use_kl_in_reward
            or _estimator(cfg).needs_logprobs,
        ),
        phases=phases,
    )


def _estimator(cfg: Config) -> Estimator:
    return estimator(cfg.algorithm.adv_estimator, cfg.algorithm.adv_params)


def _collector(cfg: Config, inputs: Inputs, source: SyncSource, phases: Phases, sampling: SamplingSpec) -> Collector:
    filtering, overlong = cfg.algorithm.filter_groups, cfg.reward.overlong_buffer
    length = cfg.data.max_response_length
    return Collector(
        source,
        inputs.train.prompts,
        sampling,
        phases,
        batch_size=cfg.data.train_batch_size,
        max_error_rate=cfg.reward.max_error_rate,
        groups=GroupFilter(filtering.metric, filtering.max_num_gen_batches) if filtering.enable else None,
        overlong=Overlong(length, overlong.len, overlong.penalty_factor) if overlong.len else None,
        greedy_baseline=_estimator(cfg).needs_baseline,
    )


def _actor(cfg: Config, workers: Workers, inputs: Inputs) -> TrainRole:
    actor = cfg.actor_rollout_ref.actor
    loss = _policy_loss(cfg)
    settings = UpdateSettings(
        loss=loss,
        entropy=loss.needs_entropy,
        passes=_actor_passes(cfg),
        length=loss.length,
        columns=("advantages", "old_logprobs", "ref_logprobs", *loss.columns),
    )
    share = cfg.actor_rollout_ref.model.share_prompt
    limits = Limits(actor.ppo_max_token_len_per_gpu, actor.ppo_micro_batch_size_per_gpu, share)
    return _role("actor", workers, limits, settings, cfg, inputs)


def _policy_loss(cfg: Config) -> PolicyLoss:
    return policy_loss(cfg.actor_rollout_ref.actor, cfg.data.max_response_length, cfg.algorithm.rollout_correction)


def wants_old_logprobs(loss: PolicyLoss, updates_per_step: int) -> bool:
    """Whether the actor's log-probs of before the first update are needed; with one update the loss has them itself."""
    return loss.needs_old_logprobs or (updates_per_step > 1 and loss.uses_old_logprobs)


def _reference(cfg: Config, workers: Workers, inputs: Inputs) -> Role:
    if not cfg.use_reference:
        return AbsentRole()
    budget = cfg.actor_rollout_ref.ref.log_prob_max_token_len_per_gpu
    key = "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"
    limits = Limits(budget, None, cfg.actor_rollout_ref.model.share_prompt, key)
    return _role("ref", workers, limits, None, cfg, inputs)


def _critic(cfg: Config, workers: Workers, inputs: Inputs) -> Role:
    if not cfg.use_critic:
        return AbsentRole()
    critic = cfg.critic
    loss = value_loss(critic, cfg.data.max_response_length)
    seed = cfg.actor_rollout_ref.actor.data_loader_seed
    settings = UpdateSettings(
        loss=loss,
        entropy=False,
        passes=Passes(critic.ppo_mini_batch_size, critic.ppo_epochs, seed if critic.shuffle else None),
        length=loss.length,
        columns=("values", "returns"),
    )
    share = cfg.actor_rollout_ref.model.share_prompt
    budget, sequences = critic.ppo_max_token_len_per_gpu, critic.ppo_micro_batch_size_per_gpu
    limits = Limits(budget, sequences, share, "critic.ppo_max_token_len_per_gpu")
    return _role("critic", workers, limits, settings, cfg, inputs)


def _role(
    name: str, workers: Workers, limits: Limits, settings: UpdateSettings | None, cfg: Config, inputs: Inputs
) -> TrainRole:
    (role,) = (role for role in training_roles(cfg) if role.name == name)
    return TrainRole(
        name,
        workers.train[name],
        parallel=parallel_spec(role),
        limits=limits,
        temperature=cfg.actor_rollout_ref.rollout.temperature,
        hidden_size=inputs.hidden_size,
        timeout_s=cfg.trainer.step_timeout_s,
        balance=_actor_passes(cfg),
        settings=settings,
    )


def _actor_passes(cfg: Config) -> Passes:
    actor = cfg.actor_rollout_ref.actor
    return Passes(actor.ppo_mini_batch_size, actor.ppo_epochs, actor.data_loader_seed if actor.shuffle else None)
