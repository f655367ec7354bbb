"""Checks of sizes that have to fit each other: prompts, mini- and micro-batches, token budgets."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.mapping import count_devices
from trainer.config.roles import TrainingRole, training_roles
from trainer.config.schema import Config, RefConfig

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


def batch_problems(cfg: Config) -> Iterator[str]:
    """What contradicts each other."""
    yield from _samples(cfg)
    yield from _batch_sizes(cfg)
    yield from _mini_batch_devices(cfg)
    yield from _micro_batches(cfg)
    yield from _token_budgets(cfg)


def micro_batch_notices(cfg: Config) -> Iterator[str]:
    """Limits that no micro-batch will reach."""
    for role, size, per_mini_batch in _limits(cfg):
        ranks = _data_parallel_ranks(cfg, role)
        share = -(-per_mini_batch // ranks) if ranks else size
        if share < size <= per_mini_batch:
            yield (
                f"{role.key}.ppo_micro_batch_size_per_gpu={size} has no effect: each of {ranks} ranks gets {share} of "
                f"the {per_mini_batch} sequences of a mini-batch"
            )


def sequence_text(cfg: Config) -> str:
    """The length of the longest sequence, and the keys it comes from."""
    return (
        f"{cfg.max_sequence_length} tokens (data.max_prompt_length={cfg.data.max_prompt_length} + "
        f"data.max_response_length={cfg.data.max_response_length})"
    )


def _samples(cfg: Config) -> Iterator[str]:
    kept, batch = cfg.data.train_max_samples, cfg.data.train_batch_size
    if 0 < kept < batch:
        yield (
            f"data.train_max_samples={kept}: fewer rows than the data.train_batch_size={batch} prompts of one step; "
            f"set data.train_max_samples={batch} or larger, or data.train_batch_size={kept} or smaller"
        )


def _batch_sizes(cfg: Config) -> Iterator[str]:
    batch = cfg.data.train_batch_size
    key = f"{ACTOR}.ppo_mini_batch_size"
    size = cfg.actor_rollout_ref.actor.ppo_mini_batch_size
    yield from _mini_batch(key, size, batch)
    critic_size = cfg.critic.ppo_mini_batch_size
    if cfg.use_critic and critic_size != size:
        yield from _mini_batch("critic.ppo_mini_batch_size", critic_size, batch)


def _mini_batch(key: str, size: int, batch: int) -> Iterator[str]:
    if size > batch:
        yield (
            f"{key}={size}: larger than data.train_batch_size={batch}, so no update could be made; "
            f"set {key}={batch} or smaller"
        )
    elif batch % size:
        divisors = [number for number in range(1, batch + 1) if batch % number == 0]
        nearest = min(divisors, key=lambda number: abs(number - size))
        yield (
            f"data.train_batch_size={batch}: not divisible by {key}={size}; "
            f"set {key}={nearest} or data.train_batch_size={(batch // size + 1) * size}"
        )


def _mini_batch_devices(cfg: Config) -> Iterator[str]:
    """Every data-parallel rank needs at least one sequence of each mini-batch."""
    n, seen = cfg.actor_rollout_ref.rollout.n, set()
    for role in training_roles(cfg):
        if isinstance(role.config, RefConfig):
            continue
        devices = count_devices(role.config.device_mapping, f"{role.key}.device_mapping", num_devices=cfg.num_devices)
        size, ranks = role.config.ppo_mini_batch_size, (devices or 0) // role.ranks_per_model
        if size * n < ranks and (size, ranks) not in seen:
            seen.add((size, ranks))
            kind = "devices" if ranks == devices else "data-parallel ranks"
            yield (
                f"{role.key}.ppo_mini_batch_size={size}: {size * n} sequences ({ROLLOUT}.n={n}) for {ranks} {kind}, so "
                f"some would have none; {_enough_prompts(cfg, role.key, -(-ranks // n))}"
            )


def _enough_prompts(cfg: Config, key: str, least: int) -> str:
    """What to set so that a mini-batch has at least so many prompts."""
    batch, fewer = cfg.data.train_batch_size, f"use fewer devices (trainer.n_gpus_per_node, {key}.device_mapping)"
    fits = next((size for size in range(least, batch + 1) if batch % size == 0), None)
    if fits is None:
        return f"set data.train_batch_size={least} with {key}.ppo_mini_batch_size={least}, or {fewer}"
    return f"set it to {fits}, or {fewer}"


def _micro_batches(cfg: Config) -> Iterator[str]:
    seen = set()
    for role, size, per_mini_batch in _limits(cfg):
        if size > per_mini_batch and (size, per_mini_batch) not in seen:
            seen.add((size, per_mini_batch))
            ranks = _data_parallel_ranks(cfg, role) or 1
            yield (
                f"{role.key}.ppo_micro_batch_size_per_gpu={size}: larger than the mini-batch of {per_mini_batch} "
                f"sequences ({role.key}.ppo_mini_batch_size={per_mini_batch // cfg.actor_rollout_ref.rollout.n} x "
                f"{ROLLOUT}.n={cfg.actor_rollout_ref.rollout.n}); set it to {-(-per_mini_batch // ranks)} or smaller, "
                "or to null"
            )


def _limits(cfg: Config) -> Iterator[tuple[TrainingRole, int, int]]:
    """(role, sequences in one of its micro-batches at most, sequences in a mini-batch) where there is such a limit."""
    for role in training_roles(cfg):
        if not isinstance(role.config, RefConfig) and role.config.ppo_micro_batch_size_per_gpu is not None:
            per_mini_batch = role.config.ppo_mini_batch_size * cfg.actor_rollout_ref.rollout.n
            yield role, role.config.ppo_micro_batch_size_per_gpu, per_mini_batch


def _data_parallel_ranks(cfg: Config, role: TrainingRole) -> int:
    """Ranks that get different sequences; 0 where the mapping is wrong."""
    devices = count_devices(role.config.device_mapping, f"{role.key}.device_mapping", num_devices=cfg.num_devices)
    return (devices or 0) // role.ranks_per_model


def _token_budgets(cfg: Config) -> Iterator[str]:
    actor, ref, critic = cfg.actor_rollout_ref.actor, cfg.actor_rollout_ref.ref, cfg.critic
    budgets = {f"{ACTOR}.ppo_max_token_len_per_gpu": actor.ppo_max_token_len_per_gpu}
    if cfg.use_reference and ref.log_prob_max_token_len_per_gpu != actor.ppo_max_token_len_per_gpu:
        budgets["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"] = ref.log_prob_max_token_len_per_gpu
    if cfg.use_critic:
        budgets["critic.ppo_max_token_len_per_gpu"] = critic.ppo_max_token_len_per_gpu
    for key, budget in budgets.items():
        if budget < cfg.max_sequence_length:
            yield (
                f"{key}={budget}: smaller than one sequence of {sequence_text(cfg)}; "
                f"set it to at least {cfg.max_sequence_length}"
            )
