"""Settings that are allowed but may surprise: one sentence each, shown at the start of a run."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.algorithms.estimators import catalog
from trainer.config.mapping import unused_notice
from trainer.config.roles import training_roles
from trainer.config.schema import Config

_ROLLOUT = "actor_rollout_ref.rollout"
_ACTOR = "actor_rollout_ref.actor"


def notices(cfg: Config) -> list[str]:
    """Return what is worth telling about a valid configuration."""
    return [*_objective(cfg), *_sampling(cfg), *_offload(cfg), *_run(cfg), *unused_notice(cfg)]


def _objective(cfg: Config) -> Iterator[str]:
    actor = cfg.actor_rollout_ref.actor
    if actor.use_kl_loss and cfg.algorithm.use_kl_in_reward:
        yield (
            f"the KL to the reference counts twice: in the loss ({_ACTOR}.use_kl_loss=true) and in the reward "
            "(algorithm.use_kl_in_reward=true)"
        )
    if actor.loss_scale_factor is not None and actor.loss_agg_mode != "seq-mean-token-sum-norm":
        yield (
            f"{_ACTOR}.loss_scale_factor={actor.loss_scale_factor} has no effect: it belongs to "
            f"loss_agg_mode=seq-mean-token-sum-norm, and {_ACTOR}.loss_agg_mode={actor.loss_agg_mode}"
        )
    if cfg.critic.enable is True and "values" not in catalog.needs(cfg.algorithm.adv_estimator):
        yield (
            f"critic.enable=true trains a critic whose values algorithm.adv_estimator={cfg.algorithm.adv_estimator} "
            "does not use"
        )


def _sampling(cfg: Config) -> Iterator[str]:
    rollout = cfg.actor_rollout_ref.rollout
    truncated = [f"{_ROLLOUT}.top_p={rollout.top_p}"] if rollout.top_p < 1 else []
    truncated += [f"{_ROLLOUT}.top_k={rollout.top_k}"] if rollout.top_k > 0 else []
    if truncated and rollout.calculate_log_probs is not False:
        yield (
            f"{' and '.join(truncated)}: the sampler draws from a truncated distribution and the trainer scores with "
            "the full one, so mismatch/* will not be near zero"
        )
    val = rollout.val_kwargs
    if cfg.data.val_files is not None and val.temperature == 0 and val.n > 1:
        yield f"{_ROLLOUT}.val_kwargs.n={val.n}: greedy validation (temperature=0) draws the same response each time"
    if cfg.trainer.device == "cpu" and rollout.kv_cache_gb is None:
        yield f"{_ROLLOUT}.kv_cache_gb=null: on a CPU the KV cache gets 1 GiB"


def _offload(cfg: Config) -> Iterator[str]:
    roles = training_roles(cfg)
    asked = [f"{role.engine_key}.{key}=true" for role in roles for key, value in role.offloads.items() if value is True]
    if cfg.trainer.device == "cpu" and asked:
        yield f"{', '.join(asked)}: on a CPU this copies from host memory to host memory, and saves none"


def _run(cfg: Config) -> Iterator[str]:
    trainer = cfg.trainer
    if trainer.resume_from_path is not None and trainer.resume_mode != "resume_path":
        yield (
            f"trainer.resume_from_path={trainer.resume_from_path} has no effect: "
            f"trainer.resume_mode={trainer.resume_mode}, not resume_path"
        )
