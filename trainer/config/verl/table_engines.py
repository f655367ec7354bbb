"""Rows about the training engines, alike for actor, reference and critic: sharding, kernels, optimizer, checkpoints."""

from __future__ import annotations

from trainer.config.verl import decisions
from trainer.config.verl.rules import Kind, Rule, alias, decided, ignored, refused

_TRAINED = "{actor_rollout_ref.actor,critic}"
_ROLE = "{actor_rollout_ref.actor,actor_rollout_ref.ref,critic}"
_FSDP = "{actor_rollout_ref.actor.fsdp_config,actor_rollout_ref.ref.fsdp_config,critic.fsdp}"
_MEGATRON = "{actor_rollout_ref.actor,actor_rollout_ref.ref,critic}.megatron"
_OPTIM = "{actor_rollout_ref.actor,critic}.optim"
_QAT = "{actor_rollout_ref.actor.fsdp_config,actor_rollout_ref.ref.fsdp_config,critic.fsdp,actor_rollout_ref.actor,"
_QAT += "actor_rollout_ref.actor.megatron,actor_rollout_ref.ref.megatron,critic.megatron}.qat"

_FSDP2 = "this is FSDP2, which shards over all devices of a role and prefetches by itself"
_WHOLE = (
    "a sequence stays whole on a device and other devices take other sequences: same result, more memory for long ones"
)
_CHUNKED = "log-probs and entropy are always computed in chunks, and only for response tokens"
_PACKED = "sequences are always packed, without padding"
_PLANNED = "micro-batches are planned by tokens, the same for old, new and reference log-probs"
_LAYOUT = "how weights and states lie in memory follows from the parallel sizes; results are the same"
_CONVERTER = "weights are read from the Hugging Face checkpoint at model.path, by a converter of our own"
_SEEDED = "the seeds of a run are data.seed, actor.data_loader_seed and rollout.seed"
_AUTO = (
    "recomputation and what leaves the GPU are decided by memory; enable_gradient_checkpointing and *_offload steer it"
)
_KERNELS = "the engines bring their own kernels and fusions"
_OF_MUON = "of the Muon optimizer; the optimizer is AdamW"
_OF_QAT = "of quantisation-aware training, which is not here"
_ADAM = "optimizer state is kept as model_dtype says"
_ONE_CHECKPOINT = (
    "one checkpoint holds all roles and is complete; actor.checkpoint.save_contents adds a Hugging Face copy"
)
_NAMED = "names a class of verl's"

_SPEED_FIELDS = (
    "account_for_embedding_in_pipeline_split,account_for_loss_in_pipeline_split,apply_dsa_kernel_fusion,"
    "apply_rope_fusion,attention_backend,batch_p2p_comm,bias_activation_fusion,bias_dropout_fusion,"
    "cross_entropy_loss_fusion,deallocate_pipeline_outputs,gradient_accumulation_fusion,masked_softmax_fusion,"
    "moe_enable_deepep,moe_grouped_gemm,moe_permute_fusion,moe_router_dtype,moe_shared_expert_overlap,"
    "moe_token_dispatcher_type,num_layers_in_first_pipeline_stage,num_layers_in_last_pipeline_stage,overlap_p2p_comm,"
    "persist_layer_norm,pipeline_model_parallel_layout,recompute_method,recompute_modules,recompute_num_layers,"
    "use_fused_mhc,variable_seq_lengths"
)

ENGINES = (
    Rule("**._target_", Kind.IGNORED, _NAMED, rest=True),
    # FSDP
    alias(
        "actor_rollout_ref.actor.fsdp_config.wrap_policy.min_num_params",
        "actor_rollout_ref.actor.fsdp_config.wrap_min_num_params",
    ),
    *ignored(
        "actor.fsdp_config.wrap_min_num_params holds for every role",
        "{actor_rollout_ref.ref.fsdp_config,critic.fsdp}.wrap_policy.min_num_params",
    ),
    *ignored(_FSDP2, f"{_FSDP}.{{fsdp_size,forward_prefetch,use_orig_params,forward_only,strategy}}"),
    *ignored(_FSDP2, f"{_FSDP}.turbo_config.**", f"{_FSDP}.wrap_policy.transformer_layer_cls_to_wrap"),
    *ignored("gradients are freed by each update: there are none to offload", f"{_FSDP}.grad_offload"),
    *ignored("gradients are freed by each update: there are none to offload", f"{_MEGATRON}.grad_offload"),
    decided(
        f"{_FSDP}.offload_policy",
        Kind.ALIAS,
        decisions.offload_policy,
        "true: that, for weights and optimizer state",
        "param_offload and optimizer_offload of the same section",
    ),
    decided(
        "{actor_rollout_ref.actor.fsdp_config,actor_rollout_ref.ref.fsdp_config,critic.fsdp,"
        "actor_rollout_ref.rollout}.full_determinism",
        Kind.ALIAS,
        decisions.determinism,
        "true: of the whole run",
        "trainer.full_determinism",
    ),
    alias(
        f"{_FSDP}.mixed_precision.param_dtype",
        "{section}.dtype",
        values={"bf16": "bfloat16", "fp32": "float32"},
    ),
    *ignored("gradients are always summed in float32", f"{_FSDP}.mixed_precision.{{reduce_dtype,buffer_dtype}}"),
    *ignored(
        "nothing of the reference is trained: it has its weights in `dtype` and no optimizer",
        "actor_rollout_ref.ref.fsdp_config.{model_dtype,optimizer_offload}",
        "actor_rollout_ref.ref.megatron.optimizer_offload",
    ),
    # what both engines have
    *ignored(_WHOLE, f"{_FSDP}.ulysses_sequence_parallel_size", f"{_ROLE}.ulysses_sequence_parallel_size"),
    *ignored(_WHOLE, f"{_MEGATRON}.{{context_parallel_size,dynamic_context_parallel,max_seqlen_per_dp_cp_rank}}"),
    *ignored(
        _CHUNKED,
        *(
            f"{section}.{{entropy_from_logits_with_chunking,entropy_from_logits_chunk_size,entropy_checkpointing}}"
            for section in (_FSDP, _MEGATRON, _ROLE)
        ),
    ),
    *ignored(
        _PACKED,
        f"{_FSDP}.{{pad_to_length,pad_to_length_bucket}}",
        f"{_ROLE}.{{pad_to_length,use_remove_padding}}",
        f"{_MEGATRON}.{{pad_to_length,pad_to_length_bucket,use_remove_padding,pad_bshd_to_minibatch_max}}",
    ),
    decided(
        "{actor_rollout_ref.actor,actor_rollout_ref.actor.fsdp_config}.use_torch_compile",
        Kind.ALIAS,
        decisions.torch_compile,
        "false: off for every role",
        "actor_rollout_ref.model.use_torch_compile",
    ),
    *ignored(
        "actor_rollout_ref.model.use_torch_compile holds for every role",
        "{actor_rollout_ref.ref,actor_rollout_ref.ref.fsdp_config,critic.fsdp,critic}.use_torch_compile",
    ),
    *ignored(_SEEDED, f"{_FSDP}.seed", f"{_MEGATRON}.seed"),
    refused(f"{_QAT}.enable", "there is no quantisation-aware training", "leave it false"),
    *ignored(
        _OF_QAT,
        f"{_QAT}.{{mode,group_size,ignore_patterns,activation_observer,quantization_config_path}}",
    ),
    refused(
        "{actor_rollout_ref.actor,actor_rollout_ref.ref,actor_rollout_ref.actor.megatron,"
        "actor_rollout_ref.ref.megatron,critic.megatron}.router_replay.mode",
        "routing replay is not here yet (docs/routing_replay.md)",
        "set it to disabled",
        "disabled",
    ),
    *ignored(
        "of routing replay, which is off",
        "{actor_rollout_ref.actor,actor_rollout_ref.ref,actor_rollout_ref.actor.megatron,"
        "actor_rollout_ref.ref.megatron,critic.megatron}.router_replay.{record_file,replay_file}",
    ),
    *ignored("weights are always loaded", f"{_ROLE}.load_weight"),
    *ignored(
        "of an engine that is not here: strategy is fsdp or megatron",
        "{actor_rollout_ref.actor,actor_rollout_ref.ref,critic}.{veomni,torchtitan,automodel}.**",
    ),
    # Megatron
    *ignored(
        _LAYOUT,
        f"{_MEGATRON}.{{expert_tensor_parallel_size,use_distributed_optimizer,use_megatron_fsdp,forward_only,"
        "num_layers_per_virtual_pipeline_stage}",
        f"{_MEGATRON}.override_ddp_config.**",
    ),
    *ignored(
        "actor_rollout_ref.actor.megatron.sequence_parallel holds for every role",
        "{actor_rollout_ref.ref,critic}.megatron.sequence_parallel",
    ),
    *ignored(
        _CONVERTER,
        f"{_MEGATRON}.{{use_mbridge,vanilla_mbridge,use_dist_checkpointing,dist_checkpointing_path,"
        "dist_checkpointing_prefix}",
    ),
    *ignored(
        "checkpoints are sharded, and load on any number of devices",
        f"{_MEGATRON}.{{dist_ckpt_optim_fully_reshardable,distrib_optim_fully_reshardable_mem_efficient}}",
    ),
    decided(
        f"{_MEGATRON}.override_transformer_config.recompute_granularity",
        Kind.ALIAS,
        decisions.recompute,
        "full: true; else it is decided by memory",
        "enable_gradient_checkpointing of the role's model",
    ),
    *ignored(_KERNELS, f"{_MEGATRON}.override_transformer_config.{{{_SPEED_FIELDS}}}"),
    *ignored("these values ask for nothing", f"{_MEGATRON}.override_transformer_config"),
    refused(
        f"{_MEGATRON}.override_transformer_config.*",
        "would change the model or its loss behind the configuration's back",
        "take it out; fields of the Hugging Face config go below actor_rollout_ref.model.override_config",
        "none",
        rest=True,
    ),
    refused(
        f"{_MEGATRON}.override_mcore_model_config.**",
        "arguments of Megatron's model class are the converter's",
        "take it out; fields of the Hugging Face config go below actor_rollout_ref.model.override_config",
    ),
    # optimizer
    refused(
        f"{_OPTIM}.optimizer",
        "the optimizer is AdamW",
        "set it to AdamW",
        "AdamW",
        "adamw",
        "adam",
        "Adam",
    ),
    *ignored("the optimizer is AdamW", f"{_OPTIM}.optimizer_impl"),
    *ignored(_OF_MUON, f"{_OPTIM}.{{muon_{',muon_'.join(decisions.MUON)},use_layer_wise_distributed_optimizer}}"),
    *ignored("steps are counted here", f"{_OPTIM}.{{total_training_steps,zero_indexed_step}}"),
    alias("{actor_rollout_ref.actor,critic}.optim.{warmup_style,lr_decay_style}", "{section}.optim.lr_scheduler_type"),
    alias("{actor_rollout_ref.actor,critic}.optim.min_lr_factor", "{section}.optim.min_lr_ratio"),
    decided(f"{_OPTIM}.min_lr", Kind.ALIAS, decisions.min_lr, "divided by lr", "optim.min_lr_ratio"),
    decided(
        f"{_OPTIM}.{{lr_decay_steps,num_cycles}}",
        Kind.REFUSED,
        decisions.cosine_shape,
        "the cosine takes half a period over all steps (with a constant rate these keys have no effect)",
    ),
    refused(f"{_OPTIM}.lr_warmup_init", "the warm-up begins at 0", "leave it 0"),
    refused(f"{_OPTIM}.weight_decay_incr_style", "the weight decay is constant", "set it to constant", "constant"),
    *ignored("of the schedule WSD, which is not here", f"{_OPTIM}.{{lr_wsd_decay_style,lr_wsd_decay_steps}}"),
    *ignored(
        "the schedule always goes on where the checkpoint left it", f"{_OPTIM}.use_checkpoint_opt_param_scheduler"
    ),
    *ignored(
        _ADAM,
        f"{_OPTIM}.{{use_precision_aware_optimizer,main_grads_dtype,exp_avg_dtype,exp_avg_sq_dtype}}",
        f"{_OPTIM}.override_optimizer_config.use_precision_aware_optimizer",
    ),
    decided(
        f"{_OPTIM}.override_optimizer_config.optimizer_cpu_offload",
        Kind.ALIAS,
        decisions.optimizer_offload,
        "true: always",
        "optimizer_offload of the role's engine",
    ),
    *ignored(
        "what is offloaded goes as a whole, overlapped",
        f"{_OPTIM}.override_optimizer_config.{{optimizer_offload_fraction,offload_fraction,overlap_cpu_optimizer_d2h_h2d}}",
    ),
    *ignored("these values ask for nothing", f"{_OPTIM}.override_optimizer_config"),
    decided(
        f"{_OPTIM}.override_optimizer_config.{{lr,weight_decay,betas,eps}}",
        Kind.ALIAS,
        decisions.optimizer_field,
        "",
        "the same key below optim",
    ),
    # training of a role
    decided(
        f"{_TRAINED}.ppo_micro_batch_size",
        Kind.ALIAS,
        decisions.micro_batch,
        "divided by the data-parallel devices",
        "ppo_micro_batch_size_per_gpu of the same section",
    ),
    decided(
        f"{_TRAINED}.use_dynamic_bsz",
        Kind.IGNORED,
        decisions.dynamic_batches,
        "micro-batches are planned by tokens; true: only by them, with ppo_micro_batch_size_per_gpu=null",
    ),
    decided(
        f"{_TRAINED}.grad_clip",
        Kind.ALIAS,
        decisions.grad_clip,
        "verl reads it up to 0.7 only, but 1.0 says nothing; an optim.clip_grad of your own wins",
        "optim.clip_grad of the same section",
    ),
    *ignored("responses are counted here", f"{_ROLE}.rollout_n"),
    *ignored(_ONE_CHECKPOINT, "critic.checkpoint.{contents,save_contents}"),
    decided(
        f"{_TRAINED}.checkpoint.load_contents",
        Kind.IGNORED,
        decisions.load_contents,
        "a checkpoint is always loaded as a whole; refused where part of it is left out",
    ),
    *ignored(
        _ONE_CHECKPOINT, f"{_TRAINED}.checkpoint.{{async_save,strict}}", f"{_TRAINED}.checkpoint.mbridge_config.**"
    ),
    *ignored(
        "profilers of verl's are not here; metrics, phases and memory of every step are in metrics.jsonl",
        "{actor_rollout_ref.actor,actor_rollout_ref.ref,actor_rollout_ref.rollout,critic,actor_rollout_ref}"
        ".{profiler,profile}.**",
        "global_profiler.**",
        "trainer.{profile_steps,controller_nsight_options,worker_nsight_options,npu_profile}.**",
    ),
    *ignored(
        _PLANNED, "actor_rollout_ref.{ref,rollout}.log_prob_{micro_batch_size,micro_batch_size_per_gpu,use_dynamic_bsz}"
    ),
    *ignored(_PLANNED, "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu"),
    *ignored(_PLANNED, "critic.forward_{micro_batch_size,micro_batch_size_per_gpu,max_token_len_per_gpu}"),
    *ignored("every wait has a deadline: trainer.step_timeout_s", "{actor_rollout_ref,critic}.nccl_timeout"),
    # models
    *ignored(
        _KERNELS,
        *(
            f"{{actor_rollout_ref.model,critic.model}}.{name}"
            for name in (
                "{use_liger,use_fused_kernels}",
                "fused_kernel_options.**",
                "tiled_mlp.**",
            )
        ),
    ),
    *ignored(_KERNELS, f"{_ROLE}.use_fused_kernels"),
    *ignored(_PACKED, "{actor_rollout_ref.model,critic.model}.use_remove_padding"),
    *ignored(
        _AUTO,
        "{actor_rollout_ref.model,critic.model}.{enable_activation_offload,enable_activation_offloading}",
        "{actor_rollout_ref.model,critic.model}.gradient_checkpointing_kwargs.**",
    ),
    *ignored("precision is said by dtype and model_dtype of each engine", "actor_rollout_ref.model.torch_dtype"),
    *ignored("files are read where they lie", "{actor_rollout_ref.model,critic.model,data}.use_shm"),
)
