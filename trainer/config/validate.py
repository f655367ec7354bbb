"""Checks between keys: what the schema cannot see because it takes two keys, or a file, to be wrong.

`validate` runs on the driver before any actor starts. First the keys against each other, all problems in one error;
then what the keys point to (model, data, reward function), again all problems in one error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.config.algorithms import estimator_problems
from trainer.config.collecting import collecting_problems
from trainer.config.corrections import policy_loss_problems, rollout_correction_problems
from trainer.config.errors import UserError, raise_problems, show
from trainer.config.inputs import check_model_path, check_reward_function, find_data_files
from trainer.config.mapping import device_problems, role_devices
from trainer.config.megatron import megatron_problems
from trainer.config.notices import notices
from trainer.config.roles import training_roles
from trainer.config.schema import Config, DeviceMapping, RefConfig

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"


def validate(cfg: Config) -> list[str]:
    """Return notices about settings that are allowed but may surprise; raise ValueError listing what is wrong."""
    raise_problems([problem for check in _KEY_CHECKS for problem in check(cfg)])
    raise_problems(list(_input_problems(cfg)))
    return notices(cfg)


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
        devices = _count_devices(role.config.device_mapping, f"{role.key}.device_mapping", cfg.num_devices)
        size, ranks = role.config.ppo_mini_batch_size, (devices or 0) // role.ranks_per_model
        if size * n < ranks and (size, ranks) not in seen:
            seen.add((size, ranks))
            kind = "devices" if ranks == devices else "data-parallel ranks"
            yield (
                f"{role.key}.ppo_mini_batch_size={size}: {size * n} sequences ({ROLLOUT}.n={n}) for {ranks} {kind}, so "
                "some would have none; raise it, or use fewer devices (trainer.n_gpus_per_node, "
                f"{role.key}.device_mapping)"
            )


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
                f"{key}={budget}: smaller than one sequence of {_sequence(cfg)}; "
                f"set it to at least {cfg.max_sequence_length}"
            )


def _engine(cfg: Config) -> Iterator[str]:
    rollout, longest = cfg.actor_rollout_ref.rollout, cfg.max_sequence_length
    length = rollout.max_model_len or longest
    if length < longest:
        yield (
            f"{ROLLOUT}.max_model_len={length}: smaller than one sequence of {_sequence(cfg)}; "
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


def _megatron(cfg: Config) -> Iterator[str]:
    counts = [
        (role, _count_devices(role.config.device_mapping, f"{role.key}.device_mapping", cfg.num_devices))
        for role in training_roles(cfg)
    ]
    yield from megatron_problems([(role, count) for role, count in counts if count is not None])


def _tensor_parallel(cfg: Config) -> Iterator[str]:
    rollout, key = cfg.actor_rollout_ref.rollout, f"{ROLLOUT}.tensor_model_parallel_size"
    devices = _count_devices(rollout.device_mapping, f"{ROLLOUT}.device_mapping", cfg.num_devices)
    size = rollout.tensor_model_parallel_size
    if devices is not None and devices % size:
        yield (
            f"{key}={size}: does not divide the {devices} devices of the rollout; set it to a divisor of {devices}, or "
            f"change {ROLLOUT}.device_mapping or trainer.n_gpus_per_node"
        )


def _algorithm(cfg: Config) -> Iterator[str]:
    rollout = cfg.actor_rollout_ref.rollout
    if rollout.temperature == 0:
        yield (
            f"{ROLLOUT}.temperature=0.0: greedy responses leave nothing to explore, and log-probs are divided by it; "
            f"set it above 0, e.g. 1.0 ({ROLLOUT}.val_kwargs.temperature may be 0)"
        )
    control, responses = cfg.algorithm.kl_ctrl, cfg.data.train_batch_size * rollout.n
    if cfg.algorithm.use_kl_in_reward and control.type == "adaptive" and responses >= 5 * control.horizon:
        yield (  # it loses up to 0.2 * responses / horizon of itself in a step
            f"algorithm.kl_ctrl.horizon={control.horizon}: with the {responses} responses of a step (data."
            f"train_batch_size x {ROLLOUT}.n) one step could turn the coefficient's sign and reward the KL; set it "
            f"above {responses // 5}, e.g. to {responses}"
        )
    if cfg.trainer.critic_warmup and not cfg.use_critic:
        yield (
            f"trainer.critic_warmup={cfg.trainer.critic_warmup}: there is no critic to warm up; "
            "set trainer.critic_warmup=0, or critic.enable=true"
        )


def _run(cfg: Config) -> Iterator[str]:
    trainer = cfg.trainer
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path is None:
        yield (
            "trainer.resume_from_path=null: trainer.resume_mode=resume_path needs a checkpoint; "
            "set trainer.resume_from_path, or trainer.resume_mode=auto"
        )
    contents = cfg.actor_rollout_ref.actor.checkpoint.save_contents
    missing = [name for name in ("model", "optimizer", "extra") if name not in contents]
    if missing:
        yield (
            f"{ACTOR}.checkpoint.save_contents={show(contents)}: a run could not resume without "
            f"{' and '.join(missing)}; list model, optimizer and extra (and hf_model for a Hugging Face copy)"
        )
    if trainer.test_freq > 0 and cfg.data.val_files is None:
        yield (
            f"trainer.test_freq={trainer.test_freq}: there is nothing to validate on, data.val_files=null; "
            "set data.val_files, or trainer.test_freq=-1"
        )
    for tracker in ("wandb", "tensorboard"):
        if tracker in trainer.logger and importlib.util.find_spec(tracker) is None:
            yield (
                f"trainer.logger={show(trainer.logger)}: {tracker} is not installed; "
                f"pip install {tracker}, or take it out of the list"
            )


def _input_problems(cfg: Config) -> Iterator[str]:
    model, data, function = cfg.actor_rollout_ref.model, cfg.data, cfg.reward.custom_reward_function
    checks: list[Callable[[], object]] = [
        lambda: check_model_path(model.path, model.tokenizer_path),
        lambda: find_data_files(data.train_files, "data.train_files"),
        lambda: find_data_files(data.val_files or (), "data.val_files"),
        lambda: check_reward_function(function.path, function.name),
        lambda: _check_resume(cfg),
    ]
    if cfg.use_critic and cfg.critic.model.path != model.path:
        checks.append(lambda: check_model_path(cfg.critic.model.path, model.tokenizer_path, key="critic.model.path"))
    for check in checks:
        try:
            check()
        except ValueError as error:
            yield str(error)


def _check_resume(cfg: Config) -> None:
    path = cfg.trainer.resume_from_path
    if cfg.trainer.resume_mode == "resume_path" and path is not None and not Path(path).is_dir():
        raise UserError(
            f"trainer.resume_from_path={path}: no such directory; give a checkpoint, e.g. "
            f"{cfg.trainer.default_local_dir}/checkpoints/step_10"
        )


def _count_devices(mapping: DeviceMapping, key: str, num_devices: int) -> int | None:
    """Number of devices of a role; None where the mapping itself is wrong, which `device_problems` reports."""
    try:
        return len(role_devices(mapping, key, num_devices=num_devices))
    except UserError:
        return None


def _sequence(cfg: Config) -> str:
    return (
        f"{cfg.max_sequence_length} tokens (data.max_prompt_length={cfg.data.max_prompt_length} + "
        f"data.max_response_length={cfg.data.max_response_length})"
    )


_KEY_CHECKS = (
    _batch_sizes,
    _mini_batch_devices,
    _token_budgets,
    _engine,
    _sleep,
    device_problems,
    _megatron,
    _tensor_parallel,
    estimator_problems,
    policy_loss_problems,
    rollout_correction_problems,
    _algorithm,
    collecting_problems,
    _run,
)
