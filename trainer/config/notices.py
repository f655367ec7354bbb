"""Settings that are allowed but may surprise: one sentence each, shown at the start of a run."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.algorithms.estimators import catalog
from trainer.config.batches import micro_batch_notices
from trainer.config.mapping import replica_devices, unused_notice
from trainer.config.roles import training_roles
from trainer.config.schema import Config, RefConfig

_ROLLOUT = "actor_rollout_ref.rollout"
_ACTOR = "actor_rollout_ref.actor"
OWN_AGGREGATION = ("gspo", "gmpo", "geo_mean", "sapo")
"""Policy losses that are averaged in one way only."""


def notices(cfg: Config) -> list[str]:
    """Return what is worth telling about a valid configuration."""
    checks = (
        _objective,
        _sampling,
        _idle_replicas,
        _awake,
        _offload,
        micro_batch_notices,
        _schedule,
        _run,
        unused_notice,
    )
    return [notice for check in checks for notice in check(cfg)]


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
    if actor.policy_loss.loss_mode in OWN_AGGREGATION and actor.loss_agg_mode != "seq-mean-token-mean":
        yield (
            f"{_ACTOR}.loss_agg_mode={actor.loss_agg_mode} has no effect: {_ACTOR}.policy_loss.loss_mode="
            f"{actor.policy_loss.loss_mode} is defined with seq-mean-token-mean"
        )
    if actor.use_kl_loss and actor.kl_loss_type in ("k1", "kl"):
        yield (
            f"{_ACTOR}.kl_loss_type={actor.kl_loss_type}: in the loss its gradient is 0 on average, whatever the KL "
            "is; low_var_kl (k3), or k1+ for its value with a gradient that counts"
        )
    algorithm, buffer = cfg.algorithm, cfg.reward.overlong_buffer.len
    if algorithm.adv_estimator == "gpg" and buffer and algorithm.adv_params.get("valid") != "mixed_groups":
        yield (
            f"reward.overlong_buffer.len={buffer}: a failure that is punished for its length has a reward other than "
            "0, and algorithm.adv_estimator=gpg counts it among the rewarded (as verl does); "
            "algorithm.adv_params.valid=mixed_groups counts as the paper does, whatever the rewards are"
        )
    in_loss, in_reward = actor.kl_loss_coef if actor.use_kl_loss else 0.0, cfg.algorithm.kl_ctrl.kl_coef
    if actor.use_kl_loss and not in_loss and not cfg.algorithm.use_kl_in_reward:
        yield f"{_ACTOR}.kl_loss_coef=0.0: {_ACTOR}.use_kl_loss=true keeps a reference whose KL weighs nothing"
    if cfg.algorithm.use_kl_in_reward and not in_reward and cfg.algorithm.kl_ctrl.type == "fixed" and not in_loss:
        yield (
            "algorithm.kl_ctrl.kl_coef=0.0: algorithm.use_kl_in_reward=true keeps a reference whose KL weighs nothing"
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
    if truncated:
        effect = "" if rollout.calculate_log_probs is False else ", and mismatch/* will not be near zero"
        yield (
            f"{' and '.join(truncated)}: the sampler draws from a truncated distribution and the trainer scores with "
            f"the full one, so ratios and gradients are not those of what was sampled{effect}; {_ROLLOUT}.top_p=1.0 "
            f"and {_ROLLOUT}.top_k=-1 sample from all tokens"
        )
    val = rollout.val_kwargs
    if cfg.data.val_files is not None and val.greedy and val.temperature == 0 and val.n == 1:
        yield (
            f"{_ROLLOUT}.val_kwargs.greedy=true measures the same as {_ROLLOUT}.val_kwargs.temperature=0.0 once more; "
            f"set {_ROLLOUT}.val_kwargs.temperature=1.0 for both, or greedy=false"
        )
    if cfg.data.val_files is not None and val.temperature == 0 and val.n > 1:
        yield f"{_ROLLOUT}.val_kwargs.n={val.n}: greedy validation (temperature=0) draws the same response each time"
    if cfg.trainer.device == "cpu" and rollout.kv_cache_gb is None:
        yield f"{_ROLLOUT}.kv_cache_gb=null: on a CPU the KV cache gets 1 GiB"


def _idle_replicas(cfg: Config) -> Iterator[str]:
    replicas, batch = len(replica_devices(cfg)), cfg.data.train_batch_size
    if batch < replicas:
        yield (
            f"data.train_batch_size={batch}: fewer prompts than the {replicas} replicas of {_ROLLOUT}.device_mapping / "
            f"{_ROLLOUT}.tensor_model_parallel_size, so {replicas - batch} will idle"
        )


def _awake(cfg: Config) -> Iterator[str]:
    rollout, actor = cfg.actor_rollout_ref.rollout, cfg.actor_rollout_ref.actor
    if cfg.trainer.device == "cpu" or rollout.kv_cache_gb is not None or rollout.device_mapping != actor.device_mapping:
        return
    if not rollout.free_cache_engine or rollout.sleep_level == 0:
        why = "free_cache_engine=false" if not rollout.free_cache_engine else "sleep_level=0"
        yield (
            f"{_ROLLOUT}.{why}: on GPUs vLLM keeps {_ROLLOUT}.gpu_memory_utilization={rollout.gpu_memory_utilization} "
            "of the memory while the models train beside it"
        )


def _offload(cfg: Config) -> Iterator[str]:
    roles = training_roles(cfg)
    asked = [f"{role.engine_key}.{key}=true" for role in roles for key, value in role.offloads.items() if value is True]
    if cfg.trainer.device == "cpu" and asked:
        yield f"{', '.join(asked)}: on a CPU this copies from host memory to host memory, and saves none"


def _schedule(cfg: Config) -> Iterator[str]:
    """Warm-ups that are not what both of their keys say, or that the run does not outlast."""
    for role in training_roles(cfg):
        if isinstance(role.config, RefConfig):
            continue
        optim, key = role.config.optim, f"{role.key}.optim"
        if optim.lr == 0:
            yield f"{key}.lr=0.0: nothing is learned, the weights stay as they are"
        if optim.lr_warmup_steps >= 0 and optim.lr_warmup_steps_ratio > 0:
            yield (
                f"{key}.lr_warmup_steps_ratio={optim.lr_warmup_steps_ratio} has no effect: "
                f"{key}.lr_warmup_steps={optim.lr_warmup_steps}, not -1"
            )
        steps = cfg.trainer.total_training_steps
        per_step = cfg.data.train_batch_size // role.config.ppo_mini_batch_size * role.config.ppo_epochs
        if steps is not None and optim.lr_warmup_steps >= steps * per_step:
            yield (
                f"{key}.lr_warmup_steps={optim.lr_warmup_steps}: the run ends in its warm-up, after "
                f"trainer.total_training_steps={steps} x {per_step} updates; {key}.lr is never reached"
            )


def _run(cfg: Config) -> Iterator[str]:
    trainer = cfg.trainer
    if trainer.resume_from_path is not None and trainer.resume_mode != "resume_path":
        yield (
            f"trainer.resume_from_path={trainer.resume_from_path} has no effect: "
            f"trainer.resume_mode={trainer.resume_mode}, not resume_path"
        )
    if cfg.data.val_files is None:
        unused = {
            "data.val_batch_size": cfg.data.val_batch_size,
            "trainer.log_val_generations": trainer.log_val_generations,
        }
        for key, value in unused.items():
            if value:
                yield f"{key}={value} has no effect: data.val_files=null, so there is no validation"
