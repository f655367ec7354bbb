"""Keys that were set and that nothing of this run reads: a section without its role, an option of what is off.

A mistyped key is an error; a key in the right place for another run is not, but to ignore it silently would hide the
other half of the mistake, such as a forgotten `strategy=megatron`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from trainer.algorithms import custom
from trainer.algorithms.estimators.catalog import ESTIMATORS
from trainer.config.algorithms import DRAWING_LOSS
from trainer.config.roles import training_roles
from trainer.config.schema import Config
from trainer.config.verl.report import folded

_ACTOR = "actor_rollout_ref.actor"
_REF = "actor_rollout_ref.ref"
_ROLLOUT = "actor_rollout_ref.rollout"
_CORRECTION = "algorithm.rollout_correction"

Unused = tuple[str, tuple[str, ...]]
"""(why, keys, or sections with all that is below them)."""


def unused_notices(cfg: Config, given: Mapping[str, Any]) -> Iterator[str]:
    """One line per reason. given: the keys that were set to something other than the default, with their values."""
    told: set[str] = set()
    for why, places in _unused(cfg):
        keys = [key for key in given if key not in told and _lies_in(key, places) and not _asks_for_nothing(key, given)]
        told.update(keys)
        if keys:
            yield f"without effect, {why}: {', '.join(folded(keys))}"


def _unused(cfg: Config) -> Iterator[Unused]:
    yield from _roles(cfg)
    yield from _engines(cfg)
    yield from _objective(cfg)
    yield from _advantages(cfg)
    yield from _schedules(cfg)
    yield from _run(cfg)


def _roles(cfg: Config) -> Iterator[Unused]:
    critic = ("model", "optim", "fsdp", "megatron", "strategy", "device_mapping", "shuffle", "cliprange_value")
    sizes = ("ppo_mini_batch_size", "ppo_max_token_len_per_gpu", "ppo_micro_batch_size_per_gpu", "ppo_epochs")
    if not cfg.use_critic:
        why = f"there is no critic (algorithm.adv_estimator={cfg.algorithm.adv_estimator})"
        yield why, tuple(f"critic.{name}" for name in (*critic, *sizes, "loss_agg_mode"))
    if not cfg.use_reference:
        yield f"there is no reference ({_ACTOR}.use_kl_loss=false and algorithm.use_kl_in_reward=false)", (_REF,)


def _engines(cfg: Config) -> Iterator[Unused]:
    """The actor's sections hold in part for every role of their engine, and the other roles follow them."""
    roles = training_roles(cfg)
    sections = {"fsdp": f"{_ACTOR}.fsdp_config", "megatron": f"{_ACTOR}.megatron"}
    for strategy, section in sections.items():
        if strategy not in {role.strategy for role in roles}:
            yield f"{_ACTOR}.strategy={cfg.actor_rollout_ref.actor.strategy}", (section,)
    others = {"fsdp": "megatron", "megatron": "fsdp"}
    for role in roles[1:]:
        other = others[role.strategy]
        section = f"{role.key}.fsdp_config" if role.name == "ref" and other == "fsdp" else f"{role.key}.{other}"
        yield f"{role.key}.strategy={role.strategy}", (section,)


def _objective(cfg: Config) -> Iterator[Unused]:
    actor, control = cfg.actor_rollout_ref.actor, cfg.algorithm.kl_ctrl
    if not actor.use_kl_loss:
        yield f"{_ACTOR}.use_kl_loss=false", (f"{_ACTOR}.kl_loss_coef", f"{_ACTOR}.kl_loss_type")
    if not cfg.algorithm.use_kl_in_reward:
        yield "algorithm.use_kl_in_reward=false", ("algorithm.kl_ctrl", "algorithm.kl_penalty")
    elif control.type == "fixed":
        yield "algorithm.kl_ctrl.type=fixed", ("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl")
    correction = cfg.algorithm.rollout_correction
    if correction.rollout_is is None:
        yield f"{_CORRECTION}.rollout_is=null", (f"{_CORRECTION}.rollout_is_threshold",)
    if correction.rollout_rs is None:
        yield f"{_CORRECTION}.rollout_rs=null", (f"{_CORRECTION}.rollout_rs_threshold",)
    if not cfg.reward.overlong_buffer.len:
        yield "reward.overlong_buffer.len=0", ("reward.overlong_buffer.penalty_factor",)
    if not cfg.algorithm.filter_groups.enable:
        keys = ("algorithm.filter_groups.metric", "algorithm.filter_groups.max_num_gen_batches")
        yield "algorithm.filter_groups.enable=false", keys


def _advantages(cfg: Config) -> Iterator[Unused]:
    """One's own estimator may read any of them."""
    name = cfg.algorithm.adv_estimator
    if custom.is_path(name):
        return
    reads = ESTIMATORS[name].settings
    keys = {"lam": "lam", "norm_by_std": "norm_adv_by_std_in_grpo"} | ({} if cfg.use_critic else {"gamma": "gamma"})
    unread = tuple(f"algorithm.{key}" for argument, key in keys.items() if argument not in reads)
    yield f"algorithm.adv_estimator={name}", unread


def _schedules(cfg: Config) -> Iterator[Unused]:
    critics = [("critic", cfg.critic.optim)] if cfg.use_critic else []
    for key, optim in [(_ACTOR, cfg.actor_rollout_ref.actor.optim), *critics]:
        if optim.lr_scheduler_type == "constant":
            yield f"{key}.optim.lr_scheduler_type=constant", (f"{key}.optim.min_lr_ratio",)
    loss = cfg.actor_rollout_ref.actor.policy_loss.loss_mode
    draws = loss == DRAWING_LOSS or custom.is_path(loss)
    if not draws and not cfg.actor_rollout_ref.actor.shuffle and not (cfg.use_critic and cfg.critic.shuffle):
        yield f"{_ACTOR}.shuffle=false", (f"{_ACTOR}.data_loader_seed",)
    if cfg.trainer.total_training_steps is not None:
        yield f"trainer.total_training_steps={cfg.trainer.total_training_steps}", ("trainer.total_epochs",)


def _run(cfg: Config) -> Iterator[Unused]:
    if cfg.data.val_files is None:
        yield "there is no validation (data.val_files=null)", (f"{_ROLLOUT}.val_kwargs", "data.val_max_samples")
    if cfg.reward.custom_reward_function.path is None:
        yield "reward.custom_reward_function.path=null", ("reward.custom_reward_function.name",)
    if cfg.ray_kwargs.ray_init.address is not None:
        yield f"ray_kwargs.ray_init.address={cfg.ray_kwargs.ray_init.address}", ("ray_kwargs.ray_init.num_cpus",)
    rollout = cfg.actor_rollout_ref.rollout
    if rollout.kv_cache_gb is not None and cfg.trainer.device != "cpu":
        yield f"{_ROLLOUT}.kv_cache_gb={rollout.kv_cache_gb}", (f"{_ROLLOUT}.gpu_memory_utilization",)


def _lies_in(key: str, places: Collection[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _asks_for_nothing(key: str, given: Mapping[str, Any]) -> bool:
    """A weight of 0, of what is off."""
    return key.endswith("_coef") and given[key] == 0
