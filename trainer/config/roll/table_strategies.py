"""The keys inside ROLL's `strategy_config`, which depend on the strategy: Megatron, FSDP2, vLLM."""

from __future__ import annotations

from trainer.config.roll.rules import Rules, computed, no_effect, refused
from workers.rollout.spec import ENGINE_NAMES

_FUSED = "kernels are chosen by what is installed"
_EXPERTS = "experts are computed in one grouped product, on tokens sent to them"
_RECOMPUTED = (
    "what is recomputed follows model_args.disable_gradient_checkpointing: auto takes as many layers as needed"
)
_OVERLAP = "the engine decides which communication overlaps with computation"
_CHECKPOINT = "checkpoints have one format, which any number of devices can read"
_SPLIT = "layers are divided evenly among the stages, the embedding and the head on the first and the last"
_DROP = "no token is dropped"
_FP8 = "training computes in bfloat16 or float32"

MEGATRON: Rules = {
    **{
        name: computed(f"`megatron.{name}` of the role")
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "expert_model_parallel_size",
        )
    },
    "sequence_parallel": computed("`actor_rollout_ref.actor.megatron.sequence_parallel`, from actor_train"),
    "context_parallel_size": refused("sequences are not cut over devices", "set it to 1", 1, None),
    "expert_tensor_parallel_size": refused("experts are not cut, they are divided", "set it to 1", 1, None),
    "pipeline_model_parallel_layout": refused(_SPLIT, "leave it out", None),
    "account_for_embedding_in_pipeline_split": refused(_SPLIT, "set it to false", False, None),
    "account_for_loss_in_pipeline_split": refused(_SPLIT, "set it to false", False, None),
    "recompute_granularity": no_effect(_RECOMPUTED, None),
    "recompute_method": no_effect(_RECOMPUTED, None),
    "recompute_modules": no_effect(_RECOMPUTED, None),
    "recompute_num_layers": no_effect(_RECOMPUTED, None),
    "moe_layer_recompute": no_effect(_RECOMPUTED, False),
    "bias_activation_fusion": no_effect(_FUSED),
    "apply_rope_fusion": no_effect(_FUSED),
    "cross_entropy_loss_fusion": no_effect("log-probs are computed in chunks, without the logits of all tokens"),
    "transformer_impl": no_effect(_FUSED),
    "cuda_graph_impl": no_effect(_FUSED, None),
    "cuda_graph_scope": no_effect(_FUSED),
    "moe_token_dispatcher_type": no_effect(_EXPERTS),
    "moe_grouped_gemm": no_effect(_EXPERTS),
    "moe_shared_expert_overlap": no_effect(_OVERLAP),
    "moe_router_dtype": no_effect(_EXPERTS, None),
    "moe_aux_loss_coeff": refused("no auxiliary loss is added", "leave it out", None, 0, 0.0),
    "moe_expert_capacity_factor": refused(_DROP, "leave it out", None),
    "moe_pad_expert_input_to_capacity": refused(_DROP, "leave it out", None, False),
    "moe_token_drop_policy": no_effect(_DROP, None),
    "moe_enable_routing_replay": refused("routing replay is not asked for by this key", "set it to false", False),
    "mtp_num_layers": refused("multi-token prediction is not trained", "set it to 0", 0, None),
    "overlap_p2p_comm": no_effect(_OVERLAP),
    "variable_seq_lengths": no_effect("micro-batches are packed, of any length"),
    "calculate_per_token_loss": no_effect("the loss is divided as loss_agg_mode says", False),
    "fp8": refused(_FP8, "leave it out", None),
    "fp8_recipe": refused(_FP8, "leave it out", None),
    "fp8_param": refused(_FP8, "set it to false", False),
    "additional_configs": no_effect(_FUSED, {}, None),
    "accumulate_allreduce_grads_in_fp32": no_effect("gradients are summed in float32"),
    "use_distributed_optimizer": no_effect("the optimizer's state is always divided among the ranks"),
    "distrib_optim_fully_reshardable": no_effect(_CHECKPOINT),
    "distrib_optim_fully_reshardable_mem_efficient": no_effect(_CHECKPOINT),
    "overlap_grad_reduce": no_effect(_OVERLAP),
    "delay_grad_reduce": no_effect(_OVERLAP),
    "overlap_param_gather": no_effect(_OVERLAP, False),
    "check_for_nan_in_loss_and_grad": no_effect("an update that is not finite is skipped, and reported"),
    "ddp_average_in_collective": no_effect("gradients are summed"),
    "ddp_bucket_size": no_effect(_OVERLAP, None),
    "optimizer": refused("AdamW trains", "set it to adam", "adam"),
    "optimizer_cpu_offload": computed("`megatron.optimizer_offload` of the role"),
    "optimizer_offload_fraction": no_effect("what does not fit is offloaded, and no more"),
    "save_hf_model": computed("`actor_rollout_ref.actor.checkpoint.save_contents`"),
    "save_merged_model": no_effect("there are no adapters to merge", False),
    "ckpt_format": no_effect(_CHECKPOINT),
    "ckpt_d2h_non_blocking": no_effect(_CHECKPOINT),
    "sequence_packing": no_effect("micro-batches are packed, of any length"),
    "compile_warmup": no_effect(_FUSED),
    # of Hugging Face's training arguments, which ROLL accepts here too
    "bf16": no_effect("model_args.dtype says it", True),
    "fp16": refused("training computes in bfloat16 or float32", "set it to false", False),
    "tf32": no_effect("torch's own setting holds", None),
    "lr_scheduler_kwargs": computed("min_lr: `optim.min_lr_ratio` of the role"),
    "apply_expert_patch": no_effect("ROLL 0.3 drops it"),
}
FSDP2: Rules = {
    "fsdp_size": no_effect("all of the role's devices divide the model; replicas of it are not kept"),
    "param_dtype": computed("`fsdp_config.dtype` of the role; wins over model_args.dtype"),
    "reduce_dtype": no_effect("gradients are summed in float32", "float32", "fp32"),
    "reshard_after_forward": computed("`fsdp_config.reshard_after_forward` of the role"),
    "offload_policy": computed("true: `fsdp_config.param_offload` and `fsdp_config.optimizer_offload`; false: auto"),
    "ep_size": refused(
        "FSDP does not divide experts among devices",
        "set it to 1, or use megatron_train with expert_model_parallel_size",
        1,
    ),
    "efsdp_size": no_effect("belongs to ep_size", 1),
    "moe_use_grouped_mm": no_effect(_EXPERTS),
    "wrap_policy": no_effect("every layer is wrapped, and the embedding and the head with the rest"),
    "apply_tiled_mlp": no_effect("log-probs are computed in chunks; a smaller token budget saves activations", False),
    "tiled_num_shards": no_effect("belongs to apply_tiled_mlp"),
    "use_batched_model_update": no_effect("weights are published in buckets, two in flight"),
    "reduce_scatter_during_grad_accumulation": no_effect("gradients are summed once per mini-batch or micro-batch"),
    "async_save_ckpt": no_effect(_CHECKPOINT),
    "save_only_model": no_effect("a checkpoint holds all that a run needs to resume", False),
    "model_type": no_effect("the checkpoint's own config says it", None),
    "apply_expert_patch": no_effect("ROLL 0.3 drops it"),
}
_ROLLOUT = "actor_rollout_ref.rollout"
SAME_NAMES = tuple(name for name in ENGINE_NAMES if name not in ("dtype", "load_format", "seed"))
"""Options of vLLM's that are rollout keys as they are; the other three come from elsewhere in ROLL's file."""
VLLM: Rules = {
    "tensor_parallel_size": computed(f"`{_ROLLOUT}.tensor_model_parallel_size`"),
    "load_format": computed(f"`{_ROLLOUT}.load_format`: dummy; auto, safetensors: auto"),
    "sleep_level": computed(f"`{_ROLLOUT}.sleep_level`, where devices are shared"),
    **{name: computed(f"`{_ROLLOUT}.{name}`") for name in SAME_NAMES},
    "dtype": computed(f"`{_ROLLOUT}.dtype`; ROLL overwrites it with model_args.dtype"),
    "pipeline_parallel_size": refused("a replica is cut by tensor parallelism alone", "set it to 1", 1),
    "data_parallel_size": refused(
        "device_mapping / tensor_parallel_size replicas run side by side anyway", "leave it out", 1
    ),
    "seed": no_effect("ROLL overwrites it with the top-level seed"),
    "model": no_effect("ROLL overwrites it with the role's model"),
    "trust_remote_code": no_effect("ROLL overwrites it; set actor_rollout_ref.model.trust_remote_code"),
    "enable_sleep_mode": no_effect("sleep_level says it"),
    "VLLM_USE_V1": no_effect("vLLM has one engine by now", 1, "1"),
    "enable_memory_saver": no_effect("an argument of SGLang's, not of vLLM's", False),
}
"""All other names are arguments of the installed vLLM's engine and go to `rollout.engine_kwargs.vllm`."""
