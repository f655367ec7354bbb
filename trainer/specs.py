"""From configuration to the plain settings workers are built from. Pure: nothing is started or read here."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.mapping import frees_cache
from trainer.config.roles import TrainingRole, training_roles
from trainer.config.schema import ActorConfig, Config, CriticConfig, OptimConfig
from trainer.data.order import steps_per_epoch
from trainer.engines import parallel_spec, shard_spec
from trainer.inputs import Inputs, absolute
from trainer.placement import Device, DeviceType
from workers.engines.base import EngineSpec, OptimizerSpec
from workers.rollout.spec import RolloutSpec, SamplingSpec


@dataclass(frozen=True, slots=True)
class Sizes:
    """What follows from the configuration. Steps are training steps, updates optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    actor_updates_per_step: int
    critic_updates_per_step: int


def sizes(cfg: Config, inputs: Inputs) -> Sizes:
    """Derived counts. Raises ValueError if the data have fewer prompts than a batch."""
    batch = cfg.data.train_batch_size
    per_epoch = steps_per_epoch(len(inputs.train), batch)
    actor, critic = cfg.actor_rollout_ref.actor, cfg.critic
    return Sizes(
        steps_per_epoch=per_epoch,
        total_steps=cfg.trainer.total_training_steps or per_epoch * cfg.trainer.total_epochs,
        actor_updates_per_step=batch // actor.ppo_mini_batch_size * actor.ppo_epochs,
        critic_updates_per_step=batch // critic.ppo_mini_batch_size * critic.ppo_epochs,
    )


def sampling_spec(cfg: Config, inputs: Inputs) -> SamplingSpec:
    """How training samples."""
    rollout = cfg.actor_rollout_ref.rollout
    asked = rollout.calculate_log_probs
    return SamplingSpec(
        n=rollout.n,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=cfg.data.max_response_length,
        ignore_eos=rollout.ignore_eos,
        stop_token_ids=() if rollout.ignore_eos else inputs.eos_ids,
        logprobs="monitor" if asked == "monitor" else "all" if asked else "none",
    )


def rollout_spec(cfg: Config, inputs: Inputs, kind: DeviceType, devices: list[Device], *, shared: bool) -> RolloutSpec:
    """One replica on its devices. shared: with training; else there is nobody to give memory back to."""
    rollout, model = cfg.actor_rollout_ref.rollout, cfg.actor_rollout_ref.model
    return RolloutSpec(
        model_path=inputs.model_path,
        tokenizer_path=inputs.tokenizer_path,
        trust_remote_code=model.trust_remote_code,
        override_config=inputs.override_config,
        device=kind,
        devices=tuple(d.local_index for d in devices),
        tensor_parallel_size=len(devices),
        dtype=rollout.dtype,
        max_model_len=rollout.max_model_len or cfg.max_sequence_length,
        max_num_seqs=rollout.max_num_seqs,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        enforce_eager=rollout.enforce_eager,
        enable_prefix_caching=rollout.enable_prefix_caching,
        enable_chunked_prefill=rollout.enable_chunked_prefill,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_gb=rollout.kv_cache_gb or (1.0 if kind == "cpu" else None),
        free_cache_engine=frees_cache(rollout, shared=shared),
        sleep_level=rollout.sleep_level,
        load_format=rollout.load_format,
        seed=rollout.seed,
        auto_adapt=rollout.auto_adapt,
        deterministic=cfg.trainer.full_determinism,
        threads=1,  # more than one spin against the training processes on the same cores
        engine_kwargs=rollout.engine_kwargs.vllm,
    )


def engine_specs(cfg: Config, inputs: Inputs, sizes: Sizes) -> dict[str, EngineSpec]:
    """The engine of each training role: the policy, the frozen reference, the value function."""
    return {role.name: _engine_spec(cfg, inputs, sizes, role) for role in training_roles(cfg)}


def _engine_spec(cfg: Config, inputs: Inputs, sizes: Sizes, role: TrainingRole) -> EngineSpec:
    """With what every role takes from actor_rollout_ref.model."""
    model, critic = cfg.actor_rollout_ref.model, cfg.critic
    path, checkpointing, optimizer = inputs.model_path, model.enable_gradient_checkpointing, None
    if isinstance(role.config, ActorConfig):
        steps = max(1, sizes.total_steps - cfg.trainer.critic_warmup)  # it waits for the critic
        optimizer = _optimizer(role.config.optim, steps * sizes.actor_updates_per_step)
    elif isinstance(role.config, CriticConfig):
        path, checkpointing = absolute(critic.model.path), critic.model.enable_gradient_checkpointing
        optimizer = _optimizer(role.config.optim, sizes.total_steps * sizes.critic_updates_per_step)
    return EngineSpec(
        strategy=role.strategy,
        parallel=parallel_spec(role),
        model_path=path,
        head="values" if role.name == "critic" else "logprobs",
        sharding=shard_spec(role),
        optimizer=optimizer,
        gradient_checkpointing=checkpointing if optimizer else False,
        share_prompt=model.share_prompt,
        compile=model.use_torch_compile,
        trust_remote_code=model.trust_remote_code,
        override_config=model.override_config,
    )


def _optimizer(optim: OptimConfig, total_updates: int) -> OptimizerSpec:
    warmup = optim.lr_warmup_steps
    return OptimizerSpec(
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        clip_grad=optim.clip_grad,
        lr_scheduler_type=optim.lr_scheduler_type,
        warmup_steps=int(optim.lr_warmup_steps_ratio * total_updates) if warmup < 0 else warmup,
        min_lr_ratio=optim.min_lr_ratio,
        total_steps=total_updates,
    )
