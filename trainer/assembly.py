"""Puts a `Driver` together of what runs already: all that the configuration decides about a step, and starts nothing.

The same workers can serve one driver after the other, with another algorithm each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
from trainer.engines import parallel_spec
from trainer.evaluation import Evaluation
from trainer.inputs import Inputs
from trainer.loss_columns import LossColumns
from trainer.roles import AbsentRole, Passes, Role, TrainRole, UpdateSettings
from trainer.sources import SyncSource
from trainer.specs import Sizes
from trainer.state import TrainState
from trainer.tracking.phases import Phases
from workers.group import WorkerGroup
from workers.rollout.spec import SamplingSpec
from workers.sync.sync import WeightSync


@dataclass(frozen=True, slots=True)
class Running:
    """What a driver drives. train: role to the ranks that hold its engine; sync: opened for the actor's weights."""

    train: Mapping[str, WorkerGroup]
    source: SyncSource
    sync: WeightSync
    phases: Phases


def assemble(cfg: Config, inputs: Inputs, running: Running, sizes: Sizes, sampling: SamplingSpec) -> Driver:
    """A driver at the beginning of its run. sampling: of training."""
    loss = _policy_loss(cfg)
    return Driver(
        state=TrainState(
            order=PromptOrder(len(inputs.train), seed=cfg.data.seed, shuffle=cfg.data.shuffle),
            kl=kl_controller(cfg.algorithm.kl_ctrl),
        ),
        source=running.source,
        collector=_collector(cfg, inputs, running, sampling),
        actor=_actor(cfg, running, inputs),
        reference=_reference(cfg, running, inputs),
        critic=_critic(cfg, running, inputs),
        advantages=AdvantageComputer(cfg.algorithm),
        loss_columns=LossColumns(loss, seed=cfg.actor_rollout_ref.actor.data_loader_seed),
        sync=running.sync,
        evaluation=_evaluation(cfg, inputs, sampling),
        cadence=_cadence(cfg, sizes),
        phases=running.phases,
    )


def wants_old_logprobs(loss: PolicyLoss, updates_per_step: int) -> bool:
    """Whether the actor's log-probs of before the first update are needed; with one update the loss has them itself."""
    return loss.needs_old_logprobs or (updates_per_step > 1 and loss.uses_old_logprobs)


def annotates_actor(cfg: Config, sizes: Sizes) -> bool:
    """Whether each step has a pass for the actor's log-probs, of before its first update."""
    chosen, loss = _estimator(cfg), _policy_loss(cfg)
    needed = wants_old_logprobs(loss, sizes.actor_updates_per_step)
    return needed or cfg.algorithm.use_kl_in_reward or chosen.needs_logprobs


def _cadence(cfg: Config, sizes: Sizes) -> Cadence:
    chosen = _estimator(cfg)
    return Cadence(
        total_steps=sizes.total_steps,
        test_freq=cfg.trainer.test_freq,
        save_freq=cfg.trainer.save_freq,
        critic_warmup=cfg.trainer.critic_warmup,
        old_logprobs=annotates_actor(cfg, sizes),
        sum_pi_squared=chosen.needs_sum_pi_squared,
    )


def _evaluation(cfg: Config, inputs: Inputs, sampling: SamplingSpec) -> Evaluation:
    val = cfg.actor_rollout_ref.rollout.val_kwargs
    return Evaluation(
        prompts=inputs.validation.prompts if inputs.validation else (),
        sampling=validation_sampling(sampling, n=val.n, temperature=val.temperature, top_p=val.top_p, top_k=val.top_k),
        greedy=val.greedy,
        batch_size=cfg.data.val_batch_size,
        max_error_rate=cfg.reward.max_error_rate,
    )


def _estimator(cfg: Config) -> Estimator:
    return estimator(cfg.algorithm.adv_estimator, cfg.algorithm.adv_params)


def _collector(cfg: Config, inputs: Inputs, running: Running, sampling: SamplingSpec) -> Collector:
    filtering, overlong = cfg.algorithm.filter_groups, cfg.reward.overlong_buffer
    length = cfg.data.max_response_length
    return Collector(
        running.source,
        inputs.train.prompts,
        sampling,
        running.phases,
        batch_size=cfg.data.train_batch_size,
        max_error_rate=cfg.reward.max_error_rate,
        groups=GroupFilter(filtering.metric, filtering.max_num_gen_batches) if filtering.enable else None,
        overlong=Overlong(length, overlong.len, overlong.penalty_factor) if overlong.len else None,
        greedy_baseline=_estimator(cfg).needs_baseline,
    )


def _actor(cfg: Config, running: Running, inputs: Inputs) -> TrainRole:
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
    return _role("actor", running, limits, settings, cfg, inputs)


def _policy_loss(cfg: Config) -> PolicyLoss:
    return policy_loss(cfg.actor_rollout_ref.actor, cfg.data.max_response_length, cfg.algorithm.rollout_correction)


def _reference(cfg: Config, running: Running, inputs: Inputs) -> Role:
    if not cfg.use_reference:
        return AbsentRole()
    budget = cfg.actor_rollout_ref.ref.log_prob_max_token_len_per_gpu
    key = "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"
    limits = Limits(budget, None, cfg.actor_rollout_ref.model.share_prompt, key)
    return _role("ref", running, limits, None, cfg, inputs)


def _critic(cfg: Config, running: Running, inputs: Inputs) -> Role:
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
    return _role("critic", running, limits, settings, cfg, inputs)


def _role(
    name: str, running: Running, limits: Limits, settings: UpdateSettings | None, cfg: Config, inputs: Inputs
) -> TrainRole:
    (role,) = (role for role in training_roles(cfg) if role.name == name)
    return TrainRole(
        name,
        running.train[name],
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
