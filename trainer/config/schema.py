"""The typed configuration: one model per section of `configs/ppo_trainer.yaml`, key for key.

Defaults live in the YAML only; a model here says which values are possible. What a key means is the comment beside it
in the YAML; what keys must satisfy together is in `validate`. Every model is frozen and refuses unknown keys.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from trainer.algorithms import custom
from trainer.algorithms.estimators import catalog
from workers.settings import Auto


def _minus_one_or_positive(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("must be -1 or greater than 0")
    return value


def _one_or_many(value: object) -> object:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _rank_as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _estimator(value: str) -> str:
    if value not in catalog.ESTIMATORS and not custom.is_path(value):
        names = ", ".join(sorted(catalog.ESTIMATORS))
        raise ValueError(f"must be one of {names}, or your own function as {custom.FORMS}")
    return value


def _sleep_level(value: object) -> object:
    if isinstance(value, bool):  # equals 0 or 1, and so would pass
        raise ValueError("must be one of 'auto', 0, 1 or 2")
    return value


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
MinusOneOrPositive = Annotated[
    int, AfterValidator(_minus_one_or_positive), Field(description="-1, or whole number > 0")
]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, description="number from 0 to 1")]
Name = Annotated[str, Field(min_length=1)]
LocalPath = Annotated[str, Field(min_length=1, description="path"), AfterValidator(os.path.expanduser)]
Files = Annotated[
    tuple[LocalPath, ...], BeforeValidator(_one_or_many), Field(min_length=1, description="path, glob, or list of them")
]
DeviceMapping = Annotated[
    str | list[int] | None, BeforeValidator(_rank_as_text), Field(description="ranks: 0-7, 0,2,5-6 or [0,1], or null")
]
"""Global device ranks, read by `devices.parse_device_mapping`; None: every device."""

LossAggMode = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KlKind = Literal[
    "k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl", "k1+", "kl+", "abs+", "k2+", "mse+", "k3+", "low_var_kl+"
]
ComputeDtype = Literal["bfloat16", "float32"]
Strategy = Literal["fsdp", "megatron"]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversions (only int to float)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class DataConfig(Section):
    """`data`: the prompts, their columns and their lengths."""

    train_files: Files
    val_files: Files | None
    train_max_samples: MinusOneOrPositive
    val_max_samples: MinusOneOrPositive
    prompt_key: Name
    answer_key: Name | None
    reward_fn_key: Name
    max_prompt_length: Positive
    max_response_length: Positive
    train_batch_size: Positive
    val_batch_size: Positive | None
    shuffle: bool
    seed: NonNegative
    filter_overlong_prompts: bool
    truncation: Literal["error", "left", "right", "middle"]
    chat_template: LocalPath | None
    apply_chat_template_kwargs: dict[str, Any]


class ModelConfig(Section):
    """`actor_rollout_ref.model`: the checkpoint that actor, reference and rollout start from."""

    path: LocalPath
    tokenizer_path: LocalPath
    trust_remote_code: bool
    override_config: dict[str, Any]
    enable_gradient_checkpointing: Auto
    share_prompt: bool
    use_torch_compile: bool


class OptimConfig(Section):
    """`*.optim`: AdamW and its schedule; shared by actor and critic."""

    lr: NonNegativeFloat
    weight_decay: NonNegativeFloat
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(_as_tuple)
    ]
    eps: PositiveFloat
    clip_grad: PositiveFloat
    lr_scheduler_type: Literal["constant", "linear", "cosine"]
    lr_warmup_steps: Annotated[int, Field(ge=-1)]
    lr_warmup_steps_ratio: Share
    min_lr_ratio: Share


class TrainedFsdpConfig(Section):
    """`critic.fsdp`: precision, sharding and offloading of a trained model."""

    model_dtype: Literal["fp32", "bf16"]
    dtype: ComputeDtype
    reshard_after_forward: Auto
    param_offload: Auto
    optimizer_offload: Auto


class FsdpConfig(TrainedFsdpConfig):
    """`actor.fsdp_config`: the same, and what holds for every role."""

    wrap_min_num_params: NonNegative


class RefMegatronConfig(Section):
    """`ref.megatron`: how a model is cut into parts, its precision and its offloading."""

    tensor_model_parallel_size: Positive
    pipeline_model_parallel_size: Positive
    virtual_pipeline_model_parallel_size: Annotated[int, Field(ge=2)] | None
    expert_model_parallel_size: Positive
    dtype: ComputeDtype
    param_offload: Auto


class TrainedMegatronConfig(RefMegatronConfig):
    """`critic.megatron`: the same of a trained model."""

    optimizer_offload: Auto


class MegatronConfig(TrainedMegatronConfig):
    """`actor.megatron`: the same, and what holds for every role."""

    model_dtype: Literal["fp32", "bf16"]
    sequence_parallel: bool


class CheckpointConfig(Section):
    """`actor.checkpoint`: what a checkpoint holds."""

    save_contents: Annotated[
        tuple[Literal["model", "optimizer", "extra", "hf_model"], ...], BeforeValidator(_one_or_many)
    ]


class PolicyLossConfig(Section):
    """`actor.policy_loss`: which policy objective, by name or import path, and its parameters."""

    loss_mode: Name
    params: dict[str, Any]


class ActorConfig(Section):
    """`actor_rollout_ref.actor`: how the policy is trained."""

    strategy: Strategy
    device_mapping: DeviceMapping
    ppo_mini_batch_size: Positive
    ppo_max_token_len_per_gpu: Positive
    ppo_micro_batch_size_per_gpu: Positive | None
    ppo_epochs: Positive
    shuffle: bool
    data_loader_seed: NonNegative
    clip_ratio: NonNegativeFloat
    clip_ratio_low: Share
    clip_ratio_high: NonNegativeFloat
    clip_ratio_c: Annotated[float, Field(gt=1)]
    policy_loss: PolicyLossConfig
    loss_agg_mode: LossAggMode
    loss_scale_factor: PositiveFloat | None
    entropy_coeff: Annotated[float, Field(allow_inf_nan=False)]
    calculate_entropy: bool
    use_kl_loss: bool
    kl_loss_coef: NonNegativeFloat
    kl_loss_type: KlKind
    optim: OptimConfig
    fsdp_config: FsdpConfig
    megatron: MegatronConfig
    checkpoint: CheckpointConfig


class RefFsdpConfig(Section):
    """`actor_rollout_ref.ref.fsdp_config`: as the actor's, but nothing is trained, so no master weights."""

    dtype: ComputeDtype
    reshard_after_forward: bool
    param_offload: Auto


class RefConfig(Section):
    """`actor_rollout_ref.ref`: the frozen reference policy."""

    strategy: Strategy
    device_mapping: DeviceMapping
    log_prob_max_token_len_per_gpu: Positive
    fsdp_config: RefFsdpConfig
    megatron: RefMegatronConfig


class EngineKwargs(Section):
    """`rollout.engine_kwargs`: free-form arguments of the inference engine."""

    vllm: dict[str, Any]


class ValKwargs(Section):
    """`rollout.val_kwargs`: sampling during validation."""

    n: Positive
    temperature: NonNegativeFloat
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: MinusOneOrPositive
    greedy: bool


class RolloutConfig(Section):
    """`actor_rollout_ref.rollout`: sampling and the inference engine."""

    name: Literal["vllm"]
    device_mapping: DeviceMapping
    tensor_model_parallel_size: Positive
    n: Positive
    temperature: NonNegativeFloat
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: MinusOneOrPositive
    seed: NonNegative
    dtype: Literal["bfloat16", "float16", "float32"]
    max_model_len: Positive | None
    max_num_seqs: Positive
    max_num_batched_tokens: Positive
    enforce_eager: bool
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    ignore_eos: bool
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)]
    kv_cache_gb: PositiveFloat | None
    free_cache_engine: bool
    sleep_level: Annotated[Literal["auto", 0, 1, 2], BeforeValidator(_sleep_level)]
    load_format: Literal["dummy", "auto"]
    calculate_log_probs: Literal["monitor"] | bool
    update_weights_bucket_megabytes: Positive
    timeout_s: PositiveFloat
    hang_timeout_s: Annotated[float, Field(ge=2, allow_inf_nan=False)]
    max_replacements: NonNegative
    auto_adapt: bool
    engine_kwargs: EngineKwargs
    val_kwargs: ValKwargs


class ActorRolloutRefConfig(Section):
    """`actor_rollout_ref`: the policy in its three roles, and its checkpoint."""

    model: ModelConfig
    actor: ActorConfig
    ref: RefConfig
    rollout: RolloutConfig


class CriticModelConfig(Section):
    """`critic.model`: the checkpoint that the critic starts from."""

    path: LocalPath
    enable_gradient_checkpointing: Auto


class CriticConfig(Section):
    """`critic`: the value function of PPO."""

    enable: bool | None
    strategy: Strategy
    device_mapping: DeviceMapping
    model: CriticModelConfig
    ppo_mini_batch_size: Positive
    ppo_max_token_len_per_gpu: Positive
    ppo_micro_batch_size_per_gpu: Positive | None
    ppo_epochs: Positive
    shuffle: bool
    cliprange_value: PositiveFloat
    loss_agg_mode: LossAggMode
    optim: OptimConfig
    fsdp: TrainedFsdpConfig
    megatron: TrainedMegatronConfig


class CustomRewardFunctionConfig(Section):
    """`reward.custom_reward_function`: a function of the user's own."""

    path: LocalPath | None
    name: Name


class OverlongConfig(Section):
    """`reward.overlong_buffer`: DAPO's length penalty."""

    len: NonNegative
    penalty_factor: PositiveFloat


class RewardConfig(Section):
    """`reward`: how responses are scored."""

    num_workers: Positive
    timeout_s: PositiveFloat
    max_error_rate: Share
    custom_reward_function: CustomRewardFunctionConfig
    overlong_buffer: OverlongConfig


class KlCtrlConfig(Section):
    """`algorithm.kl_ctrl`: the coefficient of the KL in the reward."""

    type: Literal["fixed", "adaptive"]
    kl_coef: NonNegativeFloat
    horizon: Positive
    target_kl: PositiveFloat


class FilterGroupsConfig(Section):
    """`algorithm.filter_groups`: DAPO's dynamic sampling."""

    enable: bool
    metric: str | None
    max_num_gen_batches: Positive


class RolloutCorrectionConfig(Section):
    """`algorithm.rollout_correction`: weights and rejection for a sampler that differs from the trainer."""

    rollout_is: Literal["token", "sequence", "geometric"] | None
    rollout_is_threshold: float | str
    rollout_rs: Name | None
    rollout_rs_threshold: float | str | None
    bypass_mode: bool
    rollout_is_batch_normalize: bool


class AlgorithmConfig(Section):
    """`algorithm`: advantages and the KL in the reward."""

    adv_estimator: Annotated[str, AfterValidator(_estimator), Field(description="name, or module:function")]
    adv_params: dict[str, Any]
    gamma: Share
    lam: Share
    norm_adv_by_std_in_grpo: bool
    use_kl_in_reward: bool
    kl_penalty: KlKind
    kl_ctrl: KlCtrlConfig
    filter_groups: FilterGroupsConfig
    rollout_correction: RolloutCorrectionConfig


class TrainerConfig(Section):
    """`trainer`: the run, its length, its devices and what it writes."""

    project_name: Name
    experiment_name: Name
    default_local_dir: LocalPath
    logger: Annotated[tuple[Literal["console", "tensorboard", "wandb"], ...], BeforeValidator(_one_or_many)]
    total_epochs: Positive
    total_training_steps: Positive | None
    nnodes: Positive
    n_gpus_per_node: Positive
    device: Literal["auto", "cuda", "cpu"]
    val_before_train: bool
    test_freq: MinusOneOrPositive
    save_freq: Annotated[int, Field(ge=-1)]
    max_actor_ckpt_to_keep: Positive | None
    resume_mode: Literal["auto", "disable", "resume_path"]
    resume_from_path: LocalPath | None
    critic_warmup: NonNegative
    log_val_generations: NonNegative
    log_completions_freq: NonNegative
    startup_timeout_s: PositiveFloat
    step_timeout_s: PositiveFloat
    full_determinism: bool
    dry_run: bool


class RayInitConfig(Section):
    """`ray_kwargs.ray_init`: the Ray cluster to join or to start."""

    address: Name | None
    num_cpus: Positive | None


class RayKwargsConfig(Section):
    """`ray_kwargs`: Ray."""

    ray_init: RayInitConfig


class Config(Section):
    """The whole configuration, with the few facts that several places derive from it."""

    data: DataConfig
    actor_rollout_ref: ActorRolloutRefConfig
    critic: CriticConfig
    reward: RewardConfig
    algorithm: AlgorithmConfig
    trainer: TrainerConfig
    ray_kwargs: RayKwargsConfig

    @property
    def use_critic(self) -> bool:
        """Whether a critic is trained: as `critic.enable` says, else where the advantage estimator needs values."""
        if self.critic.enable is None:
            return "values" in catalog.needs(self.algorithm.adv_estimator)
        return self.critic.enable

    @property
    def use_reference(self) -> bool:
        """Whether a reference policy is needed: for the KL in the loss or in the reward."""
        return self.actor_rollout_ref.actor.use_kl_loss or self.algorithm.use_kl_in_reward

    @property
    def max_sequence_length(self) -> int:
        """Longest prompt plus longest response, in tokens."""
        return self.data.max_prompt_length + self.data.max_response_length

    @property
    def num_devices(self) -> int:
        """Devices of all nodes; global device ranks are below this."""
        return self.trainer.nnodes * self.trainer.n_gpus_per_node
