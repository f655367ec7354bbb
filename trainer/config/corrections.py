"""Checks of actor_rollout_ref.actor.policy_loss and algorithm.rollout_correction: what makes no sense."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.algorithms.thresholds import KEY, Correction, read_correction
from trainer.config.errors import show
from trainer.config.schema import Config

LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs"
MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
WITHOUT_RATIO = ("gpg",)
"""Losses that do not look at the old log-probs."""


def policy_loss_problems(cfg: Config) -> Iterator[str]:
    """An unknown loss or parameter, a bad value, a function that cannot be imported."""
    actor = cfg.actor_rollout_ref.actor
    if actor.policy_loss.loss_mode == "ppo" and not actor.policy_loss.params:
        return  # the default needs no import of torch
    from trainer.algorithms.policy.build import ClipRange, policy_objective

    clips = ClipRange(actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c)
    try:
        policy_objective(actor.policy_loss.loss_mode, actor.policy_loss.params, clips)
    except ValueError as error:
        yield str(error)


def rollout_correction_problems(cfg: Config) -> Iterator[str]:
    """Thresholds that are none, corrections without the sampler's log-probs, and combinations that undo each other."""
    try:
        correction = read_correction(cfg.algorithm.rollout_correction)
    except ValueError as error:
        yield str(error)
        return
    wanted = _wanted(cfg)
    calculated = cfg.actor_rollout_ref.rollout.calculate_log_probs
    if wanted and calculated is not True:
        yield (
            f"{KEY}.{wanted}: needs the sampler's log-probs of every response, and {LOG_PROBS}={show(calculated)}; "
            f"set {LOG_PROBS}=true"
        )
    yield from _normalization(correction)
    if correction.bypass:
        yield from _bypass(correction, cfg.actor_rollout_ref.actor.policy_loss.loss_mode)


def _wanted(cfg: Config) -> str | None:
    """The first setting, as key=value, that needs the sampler's log-probs."""
    section = cfg.algorithm.rollout_correction
    asked = {
        f"rollout_is={section.rollout_is}": section.rollout_is is not None,
        f"rollout_rs={section.rollout_rs}": section.rollout_rs is not None,
        "bypass_mode=true": section.bypass_mode,
    }
    return next((setting for setting, on in asked.items() if on), None)


def _normalization(correction: Correction) -> Iterator[str]:
    key = f"{KEY}.rollout_is_batch_normalize=true"
    if correction.batch_normalize and correction.level is None:
        yield f"{key}: there are no weights to normalise, {KEY}.rollout_is=null; set rollout_is=token, or this to false"
    elif correction.batch_normalize and correction.bypass:
        yield (
            f"{key}: with {KEY}.bypass_mode=true weights follow the policy of each update, and their mean over the "
            "batch is not known before; set one of the two to false"
        )


def _bypass(correction: Correction, loss_mode: str) -> Iterator[str]:
    without = loss_mode in WITHOUT_RATIO
    if correction.level is not None and not without and ":" not in loss_mode:
        yield (
            f"{KEY}.rollout_is={correction.level}: with {KEY}.bypass_mode=true the ratio of {MODE}={loss_mode} is "
            "taken against the sampler already, and would be corrected twice; set rollout_is=null, or bypass_mode=false"
        )
    if without and not correction.weighs:
        yield (
            f"{KEY}.bypass_mode=true: {MODE}={loss_mode} has no ratio, so nothing would change; set bypass_mode=false, "
            f"or {KEY}.rollout_is=sequence"
        )
