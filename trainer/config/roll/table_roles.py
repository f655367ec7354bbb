"""The keys inside ROLL's roles (`actor_train`, `actor_infer`, `reference`, `critic`, `validation`, `rewards.*`)."""

from __future__ import annotations

from trainer.config.roll.rules import Rule, Rules, computed, copied, no_effect, refused

_ACTOR, _ROLLOUT, _REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
_LORA = "every weight is trained; there are no adapters"
_TEXT = "for images, video or sound; models read text here"
_NOT_THIS_ROLE = "ROLL does not read it for this role"
_SET_BY_ROLL = "ROLL overwrites it"
_PACKED = "micro-batches are packed without padding, up to a token budget"
_JUDGE = "there are no reward models and no judges: a reward is a function"

_MODEL: Rules = {
    "model_name_or_path": computed("`actor_rollout_ref.model.path`; one model for actor, rollout and reference"),
    "dtype": no_effect(_NOT_THIS_ROLE),
    "disable_gradient_checkpointing": no_effect("nothing is trained in this role"),
    "gradient_checkpointing_use_reentrant": no_effect("recomputation has one implementation", None),
    "attn_implementation": no_effect("attention is packed, with the fastest kernel that is installed"),
    "flash_attn": no_effect("ROLL 0.3 drops it; attention is packed, with the fastest kernel that is installed"),
    "device_map": no_effect("engines place their weights themselves"),
    "model_type": no_effect("the checkpoint's own config says it", None),
    "num_labels": no_effect("a critic has one value per token", 1),
    "model_config_kwargs": no_effect("those of actor_train hold for every role", {}),
    "moe_aux_loss_coef": refused("no auxiliary loss of a mixture of experts is added", "leave it out", None, 0, 0.0),
    "freeze_module_prefix": refused("every weight is trained", "leave it out", None),
    "ulysses_size": refused("sequences are not cut over devices", "set it to 1", 1, None),
    "lora_target": refused(_LORA, "leave lora_target out to train every weight", None),
    "lora_rank": no_effect("belongs to lora_target"),
    "lora_alpha": no_effect("belongs to lora_target"),
    "lora_dropout": no_effect("belongs to lora_target"),
    "additional_target": no_effect("belongs to lora_target", None),
    "autocast_adapter_dtype": no_effect("belongs to lora_target"),
    "adapter_name_or_path": refused(_LORA, "merge the adapter into the checkpoint", None),
}
_TRAINING: Rules = dict.fromkeys(
    (
        "learning_rate",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "lr_scheduler_type",
        "warmup_steps",
        "warmup_ratio",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "save_hf_model",
    ),
    no_effect("nothing is trained in this role"),
) | {
    "num_train_epochs": no_effect("max_steps ends the run, in ROLL too"),
    "max_steps": no_effect(_SET_BY_ROLL),
    "output_dir": no_effect(_SET_BY_ROLL),
    "seed": no_effect("ROLL overwrites it with the top-level seed"),
    "data_seed": no_effect("the order of the prompts follows the top-level seed", None),
    "dataloader_num_workers": no_effect("prompts are tokenised once, before the first step"),
    "bf16": no_effect("ROLL sets it from model_args.dtype"),
    "fp16": no_effect("ROLL sets it from model_args.dtype", False),
    "tf32": no_effect("torch's own setting holds", None),
}
_DATA: Rules = (
    dict.fromkeys(
        ("file_name", "prompt", "messages", "tag", "domain_interleave_probs", "template"), no_effect(_NOT_THIS_ROLE)
    )
    | {
        "preprocessing_num_workers": no_effect("prompts are tokenised once, before the first step"),
        "eval_file_name": no_effect("ROLL's RLVR does not read it either; validation.data_args.file_name is", None),
        "dataset_type": refused(
            "data comes from parquet or JSON lines files", "name such files in file_name", "json", "default", None
        ),
        "id": no_effect("rows are numbered in the order of the files", "id", None),
        "response": no_effect("ROLL's rewards read the column ground_truth, and so does this (`data.answer_key`)"),
        "custom_data_kwargs_func": refused("columns are not made by a function", "make them in the files", None),
        "dataset_dir": no_effect("ROLL 0.3 drops it; paths in file_name start from where the program runs"),
        "interleave_probs": no_effect("ROLL 0.3 drops it"),
        "max_samples": no_effect("ROLL 0.3 drops it; set data.train_max_samples"),
    }
    | dict.fromkeys(
        (
            "image_max_pixels",
            "image_min_pixels",
            "video_max_pixels",
            "video_min_pixels",
            "video_total_pixels",
            "video_fps",
            "video_max_frames",
            "video_resize_chunk_frames",
        ),
        no_effect(_TEXT),
    )
    | dict.fromkeys(("image_folder", "video_folder", "audio_folder"), refused(_TEXT, "leave it out", None))
)
_SAMPLED: Rules = {
    "do_sample": refused("for greedy responses set temperature to 0", "set it to true", True, None),
    "temperature": no_effect(_NOT_THIS_ROLE),
    "top_p": no_effect(_NOT_THIS_ROLE),
    "top_k": no_effect(_NOT_THIS_ROLE),
    "num_return_sequences": no_effect(_NOT_THIS_ROLE),
    "num_beams": refused("responses are sampled, not searched for", "set it to 1", 1, None),
    "repetition_penalty": refused(
        "log-probs would not be those of the policy", "set it to 1.0 and punish repetition in the reward", 1, 1.0, None
    ),
    "length_penalty": no_effect("belongs to beam search", 1, 1.0, None),
    "max_new_tokens": no_effect("ROLL overwrites it: response_length counts"),
    "max_length": no_effect("ROLL overwrites it: response_length counts"),
    "stop_strings": refused("responses end with the end-of-sequence token or at full length", "leave it out", None),
    "include_stop_str_in_output": no_effect("belongs to stop_strings", None),
    "logprobs": no_effect("the sampler's log-probs are asked for where they are needed", 0, 1, None),
}
_COMMON: Rules = {
    "name": no_effect("roles have names"),
    "worker_cls": refused("workers of one's own are not there", "leave it out", None),
    "pg_variant": no_effect("only ROLL's ActorPGWorker in actor_train reads it", None),
    "world_size": no_effect("ROLL counts it from device_mapping", None),
    "num_gpus_per_worker": no_effect("counted from the parallel sizes, as ROLL does"),
    "model_update_frequency": refused("weights are published after every update", "set it to 1", 1),
    "infer_batch_size": no_effect(_NOT_THIS_ROLE),
    "backend_timeout": no_effect("waits have the deadlines of rpc_timeout"),
    "system_envs.*": no_effect(
        "workers inherit the environment: set it in the shell, NAME=value python -m trainer.main"
    ),
    "topr_positive_weight": refused("the weights of TOPR are 1", "set it to 1.0", 1, 1.0),
    "topr_negative_weight": refused("the weights of TOPR are 1", "set it to 1.0", 1, 1.0),
    "max_concurrency": no_effect("workers answer as many calls as they get"),
    "offload_nccl": no_effect("ROLL forces it to false; NCCL's buffers stay", False),
    "logits_in_fp32": no_effect("log-probs are computed in float32, in chunks"),
    "router_replay.mode": refused("routing replay is not asked for by this key", "set it to disable", "disable"),
    "apply_loss_scale": no_effect(
        "losses are divided by counts of the whole mini-batch, which is what it asks for", True
    ),
    "mtp_training_mode": refused("multi-token prediction is not trained", "set it to disabled", "disabled", None),
    "opd_kl_coef": no_effect("belongs to distillation", None),
    "tag_included": no_effect("belongs to rewards", []),
    "use_remove_padding": no_effect(f"ROLL 0.3 drops it; {_PACKED}"),
    "use_dynamic_batching_in_train": no_effect("nothing is trained in this role"),
    "max_tokens_per_microbatch_in_train": no_effect("nothing is trained in this role"),
    "sequence_length_round_in_train": no_effect("nothing is padded"),
    "use_dynamic_batching_in_infer": no_effect(_PACKED),
    "max_tokens_per_microbatch_in_infer": no_effect(_PACKED),
    "sequence_length_round_in_infer": no_effect("nothing is padded"),
    "use_sequence_packing": no_effect(_PACKED),
    "sequence_packing_args.algorithm": no_effect("micro-batches are balanced by their work"),
    "sequence_packing_args.max_packed_sequence_length_forward": no_effect(_PACKED),
    "sequence_packing_args.max_packed_sequence_length_train": no_effect(_PACKED),
    "sequence_packing_args.min_num_micro_batches_forward": no_effect(_PACKED),
    "sequence_packing_args.min_num_micro_batches_train": no_effect(_PACKED),
    "device_mapping": no_effect(_NOT_THIS_ROLE),
    "strategy_args.strategy_name": no_effect(_NOT_THIS_ROLE),
    "strategy_args.strategy_config": no_effect(_NOT_THIS_ROLE),
    **{f"model_args.{name}": rule for name, rule in _MODEL.items()},
    **{f"training_args.{name}": rule for name, rule in _TRAINING.items()},
    **{f"data_args.{name}": rule for name, rule in _DATA.items()},
    **{f"generating_args.{name}": rule for name, rule in _SAMPLED.items()},
}


def _trained(role: str) -> Rules:
    """What is translated for a role that is trained. role: our section."""
    optim, update = f"{role}.optim", f"`{role}.ppo_mini_batch_size`"
    return {
        "device_mapping": computed(f"`{role}.device_mapping`, `trainer.nnodes`, `trainer.n_gpus_per_node`"),
        "strategy_args.strategy_name": computed(f"`{role}.strategy`: megatron, or fsdp for fsdp2 and deepspeed"),
        "strategy_args.strategy_config": computed("the tables of the strategies below"),
        "training_args.learning_rate": copied(f"{optim}.lr"),
        "training_args.weight_decay": copied(f"{optim}.weight_decay"),
        "training_args.adam_beta1": computed(f"`{optim}.betas`"),
        "training_args.adam_beta2": computed(f"`{optim}.betas`"),
        "training_args.lr_scheduler_type": computed(f"`{optim}.lr_scheduler_type`: constant, linear, cosine"),
        "training_args.warmup_steps": computed(f"`{optim}.lr_warmup_steps`"),
        "training_args.warmup_ratio": copied(f"{optim}.lr_warmup_steps_ratio"),
        "training_args.per_device_train_batch_size": computed(
            f"{update} = this x gradient_accumulation_steps x data-parallel size / n; "
            f"`{role}.ppo_max_token_len_per_gpu` = this x sequence length"
        ),
        "training_args.gradient_accumulation_steps": computed(f"{update}, see per_device_train_batch_size"),
        "use_dynamic_batching_in_train": computed(f"`{role}.ppo_max_token_len_per_gpu`"),
        "max_tokens_per_microbatch_in_train": computed(f"`{role}.ppo_max_token_len_per_gpu`, with dynamic batching"),
        "use_sequence_packing": computed(f"`{role}.ppo_max_token_len_per_gpu`"),
        "sequence_packing_args.max_packed_sequence_length_train": computed(
            f"`{role}.ppo_max_token_len_per_gpu`, with sequence packing"
        ),
        "infer_batch_size": no_effect(f"log-probs and values go in micro-batches of {role}.ppo_max_token_len_per_gpu"),
    }


_ACTOR_TRAIN: Rules = {
    **_trained(_ACTOR),
    "worker_cls": computed(
        f"`{_ACTOR}.policy_loss.loss_mode`: ROLL's ActorWorker, or its ActorPGWorker with pg_variant"
    ),
    "pg_variant": computed(f"`{_ACTOR}.policy_loss.loss_mode`, with ActorPGWorker: ppo, vanilla, topr, cispo"),
    "model_args.dtype": computed(f"`{_ACTOR}.fsdp_config.dtype`, `{_ACTOR}.megatron.dtype`: bf16, fp32"),
    "model_args.disable_gradient_checkpointing": computed(
        "`actor_rollout_ref.model.enable_gradient_checkpointing`: true: false; false: auto, as much as memory asks for"
    ),
    "model_args.model_config_kwargs": copied("actor_rollout_ref.model.override_config"),
    "training_args.save_hf_model": computed(f"`{_ACTOR}.checkpoint.save_contents`"),
    "data_args.file_name": computed("`data.train_files`"),
    "data_args.messages": computed("`data.prompt_key`"),
    "data_args.prompt": computed("`data.prompt_key`"),
    "data_args.tag": copied("data.reward_fn_key"),
    "data_args.template": computed("`data.apply_chat_template_kwargs`; native, qwen2_5, qwen3: the tokenizer's own"),
    "data_args.domain_interleave_probs": no_effect(
        "a domain has the share of the rows that it has in the files: repeat or leave out rows there"
    ),
}
_CRITIC: Rules = {
    **_trained("critic"),
    "model_args.model_name_or_path": computed("`critic.model.path`"),
    "model_args.dtype": computed("`critic.fsdp.dtype`, `critic.megatron.dtype`: bf16, fp32"),
    "model_args.disable_gradient_checkpointing": computed(
        "`critic.model.enable_gradient_checkpointing`, as for actor_train"
    ),
}
_ACTOR_INFER: Rules = {
    "device_mapping": computed(f"`{_ROLLOUT}.device_mapping`; `{_ROLLOUT}.free_cache_engine` where devices are shared"),
    "strategy_args.strategy_name": refused("vLLM generates", "set it to vllm, and use vLLM's names below it", "vllm"),
    "strategy_args.strategy_config": computed(f"vLLM's table below; else `{_ROLLOUT}.engine_kwargs.vllm.*`"),
    "infer_batch_size": no_effect(
        "ROLL ignores it on vLLM, which batches by itself: set max_num_seqs in strategy_config"
    ),
    "model_args.dtype": computed(f"`{_ROLLOUT}.dtype`"),
    "generating_args.temperature": copied(
        f"{_ROLLOUT}.temperature", "the trainer divides its logits by it, unlike ROLL"
    ),
    "generating_args.top_p": copied(f"{_ROLLOUT}.top_p"),
    "generating_args.top_k": computed(f"`{_ROLLOUT}.top_k`; 0: -1"),
    "generating_args.num_return_sequences": no_effect("ROLL overwrites it: num_return_sequences_in_group counts"),
}
_REFERENCE: Rules = {
    "device_mapping": computed(f"`{_REF}.device_mapping`"),
    "strategy_args.strategy_name": computed(f"`{_REF}.strategy`: megatron, or fsdp for fsdp2, hf and deepspeed"),
    "strategy_args.strategy_config": computed("the tables of the strategies below"),
    "model_args.dtype": computed(f"`{_REF}.fsdp_config.dtype`, `{_REF}.megatron.dtype`: bf16, fp32"),
    "infer_batch_size": computed(f"`{_REF}.log_prob_max_token_len_per_gpu` = this x sequence length"),
    "use_dynamic_batching_in_infer": computed(f"`{_REF}.log_prob_max_token_len_per_gpu`"),
    "max_tokens_per_microbatch_in_infer": computed(f"`{_REF}.log_prob_max_token_len_per_gpu`, with dynamic batching"),
    "use_sequence_packing": computed(f"`{_REF}.log_prob_max_token_len_per_gpu`"),
    "sequence_packing_args.max_packed_sequence_length_forward": computed(
        f"`{_REF}.log_prob_max_token_len_per_gpu`, with sequence packing"
    ),
}
_VALIDATION: Rules = {
    "data_args.file_name": computed("`data.val_files`"),
    "generating_args.temperature": copied(f"{_ROLLOUT}.val_kwargs.temperature"),
    "generating_args.top_p": copied(f"{_ROLLOUT}.val_kwargs.top_p"),
    "generating_args.top_k": computed(f"`{_ROLLOUT}.val_kwargs.top_k`; 0: -1"),
    "generating_args.num_return_sequences": copied(f"{_ROLLOUT}.val_kwargs.n"),
    "eval_steps": no_effect("ROLL 0.3 drops it; the top-level eval_steps counts"),
}
_REWARDS: Rules = {
    "worker_cls": computed("refused without `reward.custom_reward_function.path`: see Rewards"),
    "tag_included": computed("which data sources are the domain's: see Rewards"),
    "world_size": computed("`reward.num_workers`: the largest of the domains"),
    "query_filter_config.type": computed("`algorithm.filter_groups.enable`: see Rewards"),
    "query_filter_config.filter_args": computed("`algorithm.filter_groups.enable`: see Rewards"),
    "response_filter_config": no_effect("ROLL keeps every response, whatever it says", None),
    "response_length_penalty_coef": refused(
        "the penalty is part of ROLL's reward worker",
        "set it to 0.0, and reward.overlong_buffer.len or your reward function to what you want",
        0,
        0.0,
    ),
    "infer_batch_size": no_effect("responses are scored one by one, as they come"),
    "device_mapping": no_effect(_JUDGE),
    "strategy_args.strategy_name": no_effect(_JUDGE),
    "strategy_args.strategy_config": no_effect(_JUDGE),
    "model_args.model_name_or_path": no_effect(
        "a reward function gets text; it brings its own tokenizer if it needs one"
    ),
    "reward_type": no_effect("your reward function says how it scores"),
    "format_pattern": no_effect("ROLL computes it and leaves it out of the reward", None),
    "use_local": no_effect("there is no code sandbox"),
    "code_url": no_effect("there is no code sandbox", None),
    **dict.fromkeys(
        ("judge_prompt", "judge_model_type", "judge_model_name", "judge_api_url", "judge_api_key"), no_effect(_JUDGE)
    ),
    "reward_manager_config": no_effect(_JUDGE, []),
}


def _role(special: Rules) -> dict[str, Rule]:
    return {**_COMMON, **special}


ROLES: dict[str, Rules] = {
    "actor_train": _role(_ACTOR_TRAIN),
    "actor_infer": _role(_ACTOR_INFER),
    "reference": _role(_REFERENCE),
    "critic": _role(_CRITIC),
    "validation": _role(_VALIDATION),
    "rewards": _role(_REWARDS),
    "reward_model": dict.fromkeys(_COMMON, no_effect(_JUDGE)),
}
"""Role -> key below it -> its rule. Those of `rewards` stand below the name of a domain."""

SAID_ONCE: Rules = {name: rule for name, rule in _COMMON.items()}
"""The rules of most roles; `ROLES` differs from them in few places."""
