"""Rows about data, rewards, the algorithm, the run and its cluster."""

from __future__ import annotations

from trainer.config.verl import decisions
from trainer.config.verl.rules import Kind, alias, decided, ignored, refused

_TEXT_ONLY = "prompts are text: images, videos and sounds are not read"
_OWN_CODE = "data is read from parquet and JSONL, in an order of our own"
_CONVERT = "write what it makes to such a file and name that in data.train_files"
_MODEL_REWARD = "rewards come from functions: there are no reward models yet"
_FUNCTION = "score with a function (reward.custom_reward_function.path), which may ask a server of yours"
_OF_MODEL_REWARD = "of reward models, which are not here"
_OF_DISTILLATION = "of distillation, which is not here"
_ASYNC = "of asynchronous training, which is not here"
_OLD_CORRECTION = "verl 0.6.0's spelling of rollout correction had other meanings of its values"
_CORRECT = "set algorithm.rollout_correction.rollout_is and rollout_is_threshold"
_DATA_PATH = "samples travel through Ray's object store"

RUN = (
    # data
    decided(
        "data.gen_batch_size",
        Kind.IGNORED,
        decisions.gen_batch,
        "with filter_groups what is missing decides; without it, another size than train_batch_size is refused",
    ),
    *ignored(
        "chat messages and token ids are always kept", "data.{return_raw_input_ids,return_raw_chat,return_full_prompt}"
    ),
    *ignored(
        "prompts are read and tokenised once, before the first step",
        "data.{dataloader_num_workers,filter_overlong_prompts_workers}",
    ),
    *ignored("the order of validation prompts changes nothing", "data.validation_shuffle"),
    *ignored(
        _TEXT_ONLY,
        "data.{image_key,video_key,audio_key,image_patch_size,return_multi_modal_inputs}",
        "data.mm_processor_kwargs.**",
    ),
    refused("data.{custom_cls.path,datagen.path,sampler.class_path}", _OWN_CODE, _CONVERT),
    *ignored(
        "of a class that is given by its path, which is not here",
        "data.{custom_cls.name,datagen.name,sampler.class_name}",
    ),
    # rewards
    refused(
        "reward.reward_manager.name",
        "each response is scored by itself, by one function",
        "set it to naive, and put what the manager does into reward.custom_reward_function.path",
        "naive",
        "dapo",
        "prime",
        "gdpo",
        "custom_reward_manager",
    ),
    refused(
        "reward.reward_manager.{source,module.path}",
        "there are no reward managers to plug in",
        "score with reward.custom_reward_function.path",
        "register",
    ),
    *ignored("of a reward manager that is given by its path", "reward.reward_manager.module.name"),
    decided(
        "reward.reward_kwargs.overlong_buffer_cfg.enable",
        Kind.ALIAS,
        decisions.overlong,
        "false: 0; true: len says it",
        "reward.overlong_buffer.len",
    ),
    alias("reward.reward_kwargs.overlong_buffer_cfg.len", "reward.overlong_buffer.len"),
    alias("reward.reward_kwargs.overlong_buffer_cfg.penalty_factor", "reward.overlong_buffer.penalty_factor"),
    *ignored("the punishment of length is always among the metrics", "reward.reward_kwargs.overlong_buffer_cfg.log"),
    decided(
        "reward.reward_kwargs.max_resp_len",
        Kind.IGNORED,
        decisions.same_length,
        "data.max_response_length says it; another value is refused",
    ),
    refused(
        "reward.custom_reward_function.reward_kwargs.**",
        "the function gets no arguments from the configuration",
        "give its parameters defaults in the file",
    ),
    refused("reward.reward_model.{enable,enable_resource_pool}", _MODEL_REWARD, _FUNCTION),
    *ignored(
        _OF_MODEL_REWARD,
        "reward.reward_model.{forward_max_token_len_per_gpu,launch_reward_fn_async,load_weight,max_length,"
        "micro_batch_size,micro_batch_size_per_gpu,model_path,n_gpus_per_node,nccl_timeout,nnodes,param_offload,"
        "reward_loop_class_name,reward_loop_module_path,reward_loop_source,strategy,ulysses_sequence_parallel_size,"
        "use_dynamic_bsz,use_reward_loop}",
        "reward.reward_model.{fsdp_config,megatron,model,profiler,rollout}.**",
    ),
    refused("reward.sandbox_fusion.url", "code is not run in a remote sandbox by the built-in scorers", _FUNCTION),
    *ignored("of the sandbox, which is not here", "reward.sandbox_fusion.{max_concurrent,memory_limit_mb}"),
    # algorithm
    decided(
        "algorithm.rollout_correction.loss_type",
        Kind.ALIAS,
        decisions.correction_loss,
        "with bypass_mode: reinforce is gpg; else without effect",
        "actor_rollout_ref.actor.policy_loss.loss_mode",
    ),
    refused(
        "algorithm.rollout_correction.rollout_rs_threshold_lower",
        "both bounds stand in one key",
        "set algorithm.rollout_correction.rollout_rs_threshold=LOWER_UPPER",
    ),
    refused(
        "algorithm.rollout_correction.rollout_token_veto_threshold",
        "there is no veto by one token",
        "set algorithm.rollout_correction.rollout_rs=seq_max_k2",
    ),
    refused(
        "algorithm.rollout_correction.use_policy_gradient",
        "that is a loss of its own",
        "set actor_rollout_ref.actor.policy_loss.loss_mode=gpg with algorithm.rollout_correction.bypass_mode=true",
    ),
    refused("algorithm.rollout_is", _OLD_CORRECTION, _CORRECT),
    *ignored("of algorithm.rollout_is", "algorithm.rollout_is_{level,mode,threshold,threshold_lower,veto_threshold}"),
    *ignored(
        "as many prompts are generated at once as are missing", "algorithm.filter_groups.max_inflight_gen_batches"
    ),
    refused("algorithm.use_pf_ppo", "there is no PF-PPO (in verl it fails)", "leave it false"),
    *ignored("of PF-PPO, which is not here", "algorithm.pf_ppo.**"),
    decided(
        "algorithm.gdpo_reward_keys",
        Kind.ALIAS,
        decisions.gdpo_parts,
        "each with weight 1",
        "algorithm.adv_params.weights",
    ),
    refused("distillation.enabled", "there is no distillation", "leave it false"),
    *ignored(
        _OF_DISTILLATION,
        "distillation.{n_gpus_per_node,nnodes,teacher_key}",
        "distillation.{distillation_loss,teacher_models}.**",
    ),
    # the run
    *ignored("batches are always balanced, by tokens and by the work they are", "trainer.balance_batch"),
    *ignored(
        "completions are in the run's report: trainer.log_completions_freq, trainer.log_val_generations",
        "trainer.{rollout_data_dir,validation_data_dir}",
    ),
    refused(
        "trainer.val_only",
        "a run trains",
        "set trainer.total_training_steps=1 with trainer.val_before_train=true for a validation of the untrained model",
    ),
    refused(
        "trainer.default_hdfs_dir",
        "nothing is copied to HDFS",
        "copy trainer.default_local_dir, or let it lie on a file system of yours",
    ),
    *ignored(
        "checkpoints stay where they are; trainer.max_actor_ckpt_to_keep says how many",
        "trainer.{del_local_ckpt_after_load,max_critic_ckpt_to_keep}",
    ),
    decided(
        "trainer.remove_previous_ckpt_in_save",
        Kind.ALIAS,
        decisions.keep_one,
        "true: 1",
        "trainer.max_actor_ckpt_to_keep",
    ),
    *ignored("every wait has a deadline: trainer.startup_timeout_s", "trainer.ray_wait_register_center_timeout"),
    *ignored("a run that is stopped saves a checkpoint by itself", "trainer.esi_redundant_time"),
    *ignored("there is one trainer", "trainer.{use_v1,use_legacy_worker_impl}", "trainer.v1.sync.**"),
    refused("trainer.v1.trainer_mode", "training and generation take turns", "set it to sync", "sync"),
    refused("trainer.v1.sampler.custom_sampler.path", _OWN_CODE, "take it out"),
    *ignored(
        _ASYNC,
        "trainer.v1.{colocate_async,separate_async}.**",
        "trainer.v1.sampler.{max_off_policy_threshold,max_off_policy_strategy,sync_refill_failed_groups}",
        "trainer.v1.sampler.custom_sampler.name",
        "trainer.v1.sampler.sampler_kwargs.**",
    ),
    *ignored(_DATA_PATH, "transfer_queue.**"),
    # the cluster
    *ignored("workers run in the Python that the program runs in", "ray_kwargs.ray_init.runtime_env.py_executable"),
    *ignored(_DATA_PATH, "ray_kwargs.ray_init.runtime_env.env_vars.TRANSFER_QUEUE_ENABLE"),
    refused(
        "ray_kwargs.ray_init.runtime_env.{working_dir,env_vars.*}",
        "workers see what the program sees",
        "export variables before the start, and start where the files are",
        rest=True,
    ),
    *ignored("GPUs are counted by trainer.n_gpus_per_node", "ray_kwargs.ray_init.num_gpus"),
    *ignored("Ray's dashboard can write one: ray timeline", "ray_kwargs.timeline_json_file"),
)
