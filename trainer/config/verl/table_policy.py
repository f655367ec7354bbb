"""Rows about the policy's loss, the models and their adapters, and the reference."""

from __future__ import annotations

from trainer.config.verl import decisions
from trainer.config.verl.rules import Kind, alias, decided, ignored, refused

_ACTOR = "actor_rollout_ref.actor"
_MODEL = "actor_rollout_ref.model"
_MODELS = "{actor_rollout_ref.model,critic.model}"
_LORA = "there are no adapters: all weights are trained"
_NO_LORA = "train all weights (rank 0); enable_gradient_checkpointing and *_offload make room for them"
_OF_LORA = "of LoRA, which is not here"
_OF_MTP = "of multi-token prediction, which is not here"

POLICY = (
    # the engine
    alias(
        "{model_engine,actor_rollout_ref.actor.model_engine}",
        f"{_ACTOR}.strategy",
        "reference and critic follow the actor",
        {"dp": "fsdp"},
    ),
    # the loss
    *(
        decided(
            f"{_ACTOR}.{{{name},policy_loss.{name}}}",
            Kind.ALIAS,
            decisions.loss_param,
            f"with loss_mode={mode}, else without effect",
            f"{_ACTOR}.policy_loss.params.{name}",
        )
        for name, mode in decisions.LOSS_PARAMS.items()
    ),
    *ignored(
        "optimal_token_baseline computes it where it is needed",
        f"{_ACTOR}.{{calculate_sum_pi_squared,sum_pi_squared_checkpointing}}",
    ),
    *ignored(
        f"a prompt shared by several responses is computed once: {_MODEL}.share_prompt", f"{_ACTOR}.use_prefix_grouper"
    ),
    *ignored("verl does not use it either, and models are text models", f"{_ACTOR}.freeze_vision_tower"),
    decided(
        "critic.loss_scale_factor",
        Kind.IGNORED,
        decisions.critic_scale,
        f"{_ACTOR}.loss_scale_factor holds for the critic too; another value is refused",
    ),
    *ignored("a critic has no KL", "critic.kl_ctrl.**"),
    *ignored(f"{_ACTOR}.data_loader_seed holds for the critic too", "critic.data_loader_seed"),
    # models
    alias(f"{_MODEL}.custom_chat_template", "data.chat_template", "for training and validation"),
    alias("data.tokenizer", f"{_MODEL}.tokenizer_path", "one tokenizer serves all"),
    refused(
        f"{_MODELS}.hf_config_path", "the config is read where the weights are", f"put config.json into {_MODEL}.path"
    ),
    refused(
        f"{_MODELS}.external_lib",
        "no module is imported for its side effects",
        f"let the checkpoint bring its code, with {_MODEL}.trust_remote_code=true",
    ),
    refused(
        "actor_rollout_ref.ref.model.**",
        "the reference is the model that training starts from",
        f"take it out; {_MODEL}.path names it",
    ),
    refused(
        f"{_MODEL}.override_config.moe_config.freeze_moe_router", "routers are trained with the rest", "leave it false"
    ),
    refused(
        "critic.model.override_config.**",
        "fields of the config are changed for all models alike",
        f"set {_MODEL}.override_config",
    ),
    *ignored(
        f"{_MODEL} has it for every model: custom_chat_template, tokenizer_path, trust_remote_code",
        "critic.model.{tokenizer_path,custom_chat_template,trust_remote_code}",
        "data.trust_remote_code",
        "actor_rollout_ref.rollout.trust_remote_code",
    ),
    refused(f"{_MODELS}.lora_rank", _LORA, _NO_LORA),
    refused(f"{_MODELS}.lora.rank", _LORA, _NO_LORA),
    refused(f"{_MODELS}.lora_adapter_path", _LORA, "merge the adapter into the checkpoint and name that in model.path"),
    refused(f"{_MODELS}.lora.adapter_path", _LORA, "merge the adapter into the checkpoint and name that in model.path"),
    *ignored(
        _OF_LORA,
        f"{_MODELS}.{{lora_alpha,target_modules,exclude_modules}}",
        f"{_MODELS}.lora.{{type,merge,alpha,dropout,target_modules,exclude_modules,dropout_position,lora_A_init_method,"
        "lora_B_init_method,a2a_experimental,dtype,freeze_vision_model,freeze_vision_projection,freeze_language_model,"
        "fully_sharded_loras}",
        "actor_rollout_ref.rollout.layered_summon",
    ),
    refused(f"{_MODELS}.mtp.enable", "there is no multi-token prediction", "leave it false"),
    *ignored(
        _OF_MTP,
        f"{_MODELS}.mtp.{{enable_train,enable_rollout,detach_encoder,mtp_loss_scaling_factor,speculative_algorithm,"
        "speculative_num_steps,speculative_eagle_topk,speculative_num_draft_tokens,method,num_speculative_tokens}",
        "actor_rollout_ref.rollout.mtp.**",
    ),
    *ignored(
        "verl does not use it either; where roles run is their device_mapping",
        "actor_rollout_ref.hybrid_engine",
    ),
)
