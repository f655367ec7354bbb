"""Checks of the rollout: its engine's limits, sleeping, tensor parallelism, sampling."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.batches import ROLLOUT, sequence_text
from trainer.config.mapping import count_devices
from trainer.config.model import local_fields, uncut
from trainer.config.schema import Config

ALMOST_ALL = 0.9
"""A share of a GPU's memory that leaves no room to train beside it."""


COLDEST = 0.01
"""Temperatures above 0 that are lower are raised to this by vLLM."""


def rollout_problems(cfg: Config) -> Iterator[str]:
    """What contradicts each other."""
    yield from _engine(cfg)
    yield from _sleep(cfg)
    yield from _awake(cfg)
    yield from _tensor_parallel(cfg)
    yield from _sampling(cfg)
    yield from _time_limits(cfg)


def _engine(cfg: Config) -> Iterator[str]:
    rollout, longest = cfg.actor_rollout_ref.rollout, cfg.max_sequence_length
    length = rollout.max_model_len or longest
    if length < longest:
        yield (
            f"{ROLLOUT}.max_model_len={length}: smaller than one sequence of {sequence_text(cfg)}; "
            f"set it to at least {longest}, or to null"
        )
    tokens = rollout.max_num_batched_tokens
    if not rollout.enable_chunked_prefill and tokens < length:
        yield (
            f"{ROLLOUT}.max_num_batched_tokens={tokens}: a prompt of {length} tokens does not fit into one engine "
            f"step; set it to at least {length}, or {ROLLOUT}.enable_chunked_prefill=true"
        )
    if tokens < rollout.max_num_seqs:
        yield (
            f"{ROLLOUT}.max_num_batched_tokens={tokens}: smaller than {ROLLOUT}.max_num_seqs={rollout.max_num_seqs}, "
            f"and every sequence takes one token of an engine step; set {ROLLOUT}.max_num_seqs={tokens} or smaller"
        )


def _sleep(cfg: Config) -> Iterator[str]:
    rollout = cfg.actor_rollout_ref.rollout
    level, key = rollout.sleep_level, f"{ROLLOUT}.sleep_level"
    if level in ("auto", 0):
        return
    if cfg.trainer.device == "cpu":
        yield f"{key}={level}: sleeping needs a GPU and trainer.device=cpu; set {key}=auto"
    elif not rollout.free_cache_engine:
        yield (
            f"{key}={level}: contradicts {ROLLOUT}.free_cache_engine=false, which keeps the engine awake; "
            f"set {key}=auto, or {ROLLOUT}.free_cache_engine=true"
        )


def _awake(cfg: Config) -> Iterator[str]:
    """An engine that never gives its memory back, and training on the same GPUs."""
    rollout, actor = cfg.actor_rollout_ref.rollout, cfg.actor_rollout_ref.actor
    asleep = rollout.free_cache_engine and rollout.sleep_level != 0
    share, apart = rollout.gpu_memory_utilization, rollout.device_mapping != actor.device_mapping
    if asleep or apart or cfg.trainer.device != "cuda" or rollout.kv_cache_gb is not None or share < ALMOST_ALL:
        return
    why = "free_cache_engine=false" if not rollout.free_cache_engine else "sleep_level=0"
    yield (
        f"{ROLLOUT}.gpu_memory_utilization={share}: {ROLLOUT}.{why} keeps vLLM awake, and what it leaves of the GPUs "
        f"is not enough to train in; set {ROLLOUT}.free_cache_engine=true and {ROLLOUT}.sleep_level=auto, or "
        f"{ROLLOUT}.gpu_memory_utilization=0.5 or smaller"
    )


def _tensor_parallel(cfg: Config) -> Iterator[str]:
    rollout, key = cfg.actor_rollout_ref.rollout, f"{ROLLOUT}.tensor_model_parallel_size"
    devices = count_devices(rollout.device_mapping, f"{ROLLOUT}.device_mapping", num_devices=cfg.num_devices)
    size = rollout.tensor_model_parallel_size
    if devices is not None and devices % size:
        yield (
            f"{key}={size}: does not divide the {devices} devices of the rollout; set it to a divisor of {devices}, "
            f"e.g. {_fitting(cfg, devices, size)}, or change {ROLLOUT}.device_mapping or trainer.n_gpus_per_node"
        )


def _fitting(cfg: Config, devices: int, size: int) -> int:
    """The divisor of the devices nearest to `size` that a model on this disk can be cut into, as far as is known."""
    fields = local_fields(cfg.actor_rollout_ref.model.path)
    fits = [n for n in range(1, devices + 1) if devices % n == 0 and uncut(fields, n) is None]
    return min(fits, key=lambda n: abs(n - size))


def _sampling(cfg: Config) -> Iterator[str]:
    rollout = cfg.actor_rollout_ref.rollout
    if 0 < rollout.temperature < COLDEST:
        yield (
            f"{ROLLOUT}.temperature={rollout.temperature}: vLLM samples at {COLDEST} instead, and the trainer would "
            f"divide its logits by {rollout.temperature}; set it to {COLDEST} or more, e.g. 1.0"
        )
    if rollout.temperature == 0:
        yield (
            f"{ROLLOUT}.temperature=0.0: greedy responses leave nothing to explore, and log-probs are divided by it; "
            f"set it above 0, e.g. 1.0 ({ROLLOUT}.val_kwargs.temperature may be 0)"
        )


def _time_limits(cfg: Config) -> Iterator[str]:
    rollout = cfg.actor_rollout_ref.rollout
    if rollout.hang_timeout_s >= rollout.timeout_s:
        yield (
            f"{ROLLOUT}.hang_timeout_s={rollout.hang_timeout_s}: a replica that hangs would be noticed no sooner than "
            f"{ROLLOUT}.timeout_s={rollout.timeout_s} ends the call; set {ROLLOUT}.timeout_s="
            f"{10 * rollout.hang_timeout_s:g}, or hang_timeout_s below it"
        )
