"""From configuration to a ready `Driver`: specs, worker groups, roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ray

from trainer.advantage import AdvantageComputer
from trainer.algorithms.kl import kl_controller
from trainer.algorithms.losses import policy_loss, value_loss
from trainer.batching import Limits
from trainer.config.schema import Config, CriticConfig, FsdpConfig, OptimConfig, RefFsdpConfig
from trainer.config.validate import role_devices
from trainer.data.order import PromptOrder, steps_per_epoch
from trainer.driver import Cadence, Driver, validation_sampling
from trainer.evaluation import Evaluation
from trainer.inputs import Inputs, absolute
from trainer.placement import Cluster, start
from trainer.roles import AbsentRole, Role, TrainRole, UpdateSettings
from trainer.sources import SyncSource
from trainer.state import TrainState
from trainer.tracking.phases import Phases
from workers.engines.base import EngineSpec, OptimizerSpec
from workers.group import WorkerGroup
from workers.reward.decoding import decoder_json
from workers.reward.function import RewardSpec
from workers.reward.worker import RewardWorker
from workers.rollout.spec import RolloutSpec, SamplingSpec
from workers.rollout.vllm.replica import VllmReplica
from workers.sync.sync import WeightSync
from workers.train_worker import TrainWorker

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What follows from the configuration. Steps are training steps, updates optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    actor_updates_per_step: int
    critic_updates_per_step: int


@dataclass(frozen=True, slots=True)
class Workers:
    """All actors of the run. train: per set of devices, one group."""

    replicas: WorkerGroup
    scorers: WorkerGroup
    train: dict[tuple[int, ...], WorkerGroup]


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


def start_workers(cfg: Config, inputs: Inputs, cluster: Cluster) -> Workers:
    """Starts every actor; returns at once, while they import what they need."""
    total = len(cluster.devices)
    timeout_s = cfg.trainer.step_timeout_s
    train: dict[tuple[int, ...], WorkerGroup] = {}
    for name, mapping in _train_roles(cfg).items():
        ranks = role_devices(mapping, f"{name}.device_mapping", num_devices=total)
        if ranks not in train:
            actors = [
                start(
                    TrainWorker,
                    cluster.devices[device],
                    rank,
                    len(ranks),
                    cluster.device_type,
                    cluster.devices[device].local_index,
                    cluster.threads(len(ranks)),
                    timeout_s,
                )
                for rank, device in enumerate(ranks)
            ]
            train[ranks] = WorkerGroup(f"train[{_ranges(ranks)}]", actors)
    return Workers(_start_replicas(cfg, inputs, cluster), _start_scorers(cfg, inputs), train)


def connect_ranks(workers: Workers, timeout_s: float) -> None:
    """The ranks of each training group meet."""
    for group in workers.train.values():
        host, port = ray.get(group.actors[0].rendezvous.remote(), timeout=timeout_s)
        group.broadcast(TrainWorker.connect, host, port).result(timeout_s)


def build(cfg: Config, inputs: Inputs, workers: Workers, sizes: Sizes, phases: Phases, num_devices: int) -> Driver:
    """Builds the engines and puts the driver together."""
    timeout_s = cfg.trainer.startup_timeout_s
    connect_ranks(workers, timeout_s)
    specs = _engine_specs(cfg, inputs, sizes)
    groups = {
        name: workers.train[role_devices(mapping, f"{name}.device_mapping", num_devices=num_devices)]
        for name, mapping in _train_roles(cfg).items()
    }
    for name, group in groups.items():
        group.broadcast(TrainWorker.build, name, specs[name]).result(timeout_s)
    workers.replicas.broadcast(VllmReplica.ping).result(timeout_s)
    workers.scorers.broadcast(RewardWorker.ping).result(timeout_s)
    rollout = cfg.actor_rollout_ref.rollout
    sync = WeightSync(groups["actor"], workers.replicas, "actor", cfg.trainer.step_timeout_s)
    sync.open(rollout.dtype, rollout.update_weights_bucket_megabytes << 20)
    sampling = sampling_spec(cfg, inputs)
    val = rollout.val_kwargs
    order = PromptOrder(len(inputs.train), seed=cfg.data.seed, shuffle=cfg.data.shuffle)
    return Driver(
        state=TrainState(order=order, kl=kl_controller(cfg.algorithm.kl_ctrl)),
        prompts=inputs.train.prompts,
        source=SyncSource(workers.replicas, workers.scorers, phases, timeout_s=rollout.timeout_s, seed=rollout.seed),
        actor=_role(cfg, "actor", groups, inputs),
        reference=_role(cfg, "ref", groups, inputs),
        critic=_role(cfg, "critic", groups, inputs),
        advantages=AdvantageComputer(cfg.algorithm),
        sync=sync,
        sampling=sampling,
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
            old_logprobs=sizes.actor_updates_per_step > 1 or cfg.algorithm.use_kl_in_reward,
            max_reward_error_rate=cfg.reward.max_error_rate,
            batch_size=cfg.data.train_batch_size,
        ),
        phases=phases,
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


def _train_roles(cfg: Config) -> dict[str, str | list[int] | None]:
    roles = {"actor": cfg.actor_rollout_ref.actor.device_mapping}
    if cfg.use_reference:
        roles["ref"] = cfg.actor_rollout_ref.ref.device_mapping
    if cfg.use_critic:
        roles["critic"] = cfg.critic.device_mapping
    return roles


def _start_replicas(cfg: Config, inputs: Inputs, cluster: Cluster) -> WorkerGroup:
    rollout, model = cfg.actor_rollout_ref.rollout, cfg.actor_rollout_ref.model
    ranks = role_devices(
        rollout.device_mapping, "actor_rollout_ref.rollout.device_mapping", num_devices=len(cluster.devices)
    )
    size = rollout.tensor_model_parallel_size
    cpu = cluster.device_type == "cpu"
    actors = []
    for replica, first in enumerate(range(0, len(ranks), size)):
        devices = [cluster.devices[r] for r in ranks[first : first + size]]
        spec = RolloutSpec(
            model_path=inputs.model_path,
            tokenizer_path=inputs.tokenizer_path,
            trust_remote_code=model.trust_remote_code,
            override_config=model.override_config,
            device=cluster.device_type,
            devices=tuple(d.local_index for d in devices),
            tensor_parallel_size=size,
            dtype=rollout.dtype,
            max_model_len=rollout.max_model_len or cfg.max_sequence_length,
            max_num_seqs=rollout.max_num_seqs,
            max_num_batched_tokens=rollout.max_num_batched_tokens,
            enforce_eager=rollout.enforce_eager,
            enable_prefix_caching=rollout.enable_prefix_caching,
            enable_chunked_prefill=rollout.enable_chunked_prefill,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            kv_cache_gb=rollout.kv_cache_gb or (1.0 if cpu else None),
            sleep_level=_sleep_level(cfg, cpu),
            load_format=rollout.load_format,
            seed=rollout.seed,
            threads=1,
            engine_kwargs=rollout.engine_kwargs.vllm,
        )
        actors.append(start(VllmReplica, devices[0], spec, replica))
    return WorkerGroup("rollout", actors)


def _start_scorers(cfg: Config, inputs: Inputs) -> WorkerGroup:
    function = cfg.reward.custom_reward_function
    spec = RewardSpec(function.path, function.name).resolved()
    actor = ray.remote(RewardWorker).options(num_cpus=0).remote(
        spec,
        inputs.tokenizer_path,
        cfg.reward.num_workers,
        cfg.reward.timeout_s,
        cfg.actor_rollout_ref.model.trust_remote_code,
        decoder_json(inputs.tokenizer),
    )
    return WorkerGroup("reward", [actor])


def _sleep_level(cfg: Config, cpu: bool) -> int:
    rollout = cfg.actor_rollout_ref.rollout
    if cpu or not rollout.free_cache_engine:
        return 0
    return 2 if rollout.sleep_level == "auto" else rollout.sleep_level


def _engine_specs(cfg: Config, inputs: Inputs, sizes: Sizes) -> dict[str, EngineSpec]:
    actor, critic = cfg.actor_rollout_ref.actor, cfg.critic
    model = cfg.actor_rollout_ref.model
    common = {
        "share_prompt": model.share_prompt,
        "trust_remote_code": model.trust_remote_code,
        "override_config": model.override_config,
        "seed": actor.data_loader_seed,
    }
    return {
        "actor": EngineSpec(
            model_path=inputs.model_path,
            head="logprobs",
            optimizer=_optimizer(actor.optim, sizes.total_steps * sizes.actor_updates_per_step),
            gradient_checkpointing=model.enable_gradient_checkpointing,
            **_fsdp(actor.fsdp_config),
            **common,
        ),
        "ref": EngineSpec(
            model_path=inputs.model_path,
            head="logprobs",
            optimizer=None,
            gradient_checkpointing=False,
            **_fsdp(cfg.actor_rollout_ref.ref.fsdp_config),
            **common,
        ),
        "critic": EngineSpec(
            model_path=absolute(critic.model.path),
            head="values",
            optimizer=_optimizer(critic.optim, sizes.total_steps * sizes.critic_updates_per_step),
            gradient_checkpointing=critic.model.enable_gradient_checkpointing,
            **_fsdp(critic.fsdp),
            **common,
        ),
    }


def _fsdp(fsdp: FsdpConfig | RefFsdpConfig) -> dict[str, object]:
    master = _DTYPES[fsdp.model_dtype] if isinstance(fsdp, FsdpConfig) else fsdp.dtype
    return {
        "dtype": fsdp.dtype,
        "master_dtype": master,
        "reshard_after_forward": fsdp.reshard_after_forward,
        "wrap_min_num_params": fsdp.wrap_min_num_params,
    }


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


def _role(cfg: Config, name: str, groups: dict[str, WorkerGroup], inputs: Inputs) -> Role:
    if name not in groups:
        return AbsentRole()
    actor, ref, critic = cfg.actor_rollout_ref.actor, cfg.actor_rollout_ref.ref, cfg.critic
    share = cfg.actor_rollout_ref.model.share_prompt
    limits, settings = {
        "actor": (
            Limits(actor.ppo_max_token_len_per_gpu, actor.ppo_micro_batch_size_per_gpu, share),
            _actor_settings(cfg),
        ),
        "ref": (
            Limits(
                ref.log_prob_max_token_len_per_gpu, None, share, "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"
            ),
            None,
        ),
        "critic": (
            Limits(
                critic.ppo_max_token_len_per_gpu,
                critic.ppo_micro_batch_size_per_gpu,
                share,
                "critic.ppo_max_token_len_per_gpu",
            ),
            _critic_settings(cfg, critic),
        ),
    }[name]
    return TrainRole(
        name,
        groups[name],
        limits=limits,
        temperature=cfg.actor_rollout_ref.rollout.temperature,
        hidden_size=inputs.hidden_size,
        timeout_s=cfg.trainer.step_timeout_s,
        settings=settings,
    )


def _actor_settings(cfg: Config) -> UpdateSettings:
    actor = cfg.actor_rollout_ref.actor
    loss = policy_loss(actor, cfg.data.max_response_length)
    return UpdateSettings(
        loss=loss,
        entropy=loss.needs_entropy,
        groups_per_minibatch=actor.ppo_mini_batch_size,
        epochs=actor.ppo_epochs,
        shuffle_seed=actor.data_loader_seed if actor.shuffle else None,
        length=loss.length,
        columns=("advantages", "old_logprobs", "ref_logprobs"),
    )


def _critic_settings(cfg: Config, critic: CriticConfig) -> UpdateSettings:
    loss = value_loss(critic, cfg.data.max_response_length)
    return UpdateSettings(
        loss=loss,
        entropy=False,
        groups_per_minibatch=critic.ppo_mini_batch_size,
        epochs=critic.ppo_epochs,
        shuffle_seed=cfg.actor_rollout_ref.actor.data_loader_seed if critic.shuffle else None,
        length=loss.length,
        columns=("values", "returns"),
    )


def _ranges(ranks: Sequence[int]) -> str:
    if len(ranks) > 1 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))

