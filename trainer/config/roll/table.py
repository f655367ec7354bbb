"""ROLL's top-level keys (its RLVR configuration): what becomes of each. Roles are in `table_roles`."""

from __future__ import annotations

from trainer.config.roll.rules import Rules, compared, computed, copied, no_effect, refused

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_ESTIMATOR = "`algorithm.adv_estimator`, `algorithm.adv_params`"
_DEAD = "ROLL's RLVR pipeline does not read it either"
_DISTILL = "distillation from a teacher is not there"
_OWN_LOSS = f"the loss has no such part; write it as a function of your own ({_ACTOR}.policy_loss.loss_mode)"
_AT_ONCE = "all prompts of a step go to the engines at once"

TOP: Rules = {
    # the run
    "exp_name": copied("trainer.experiment_name"),
    "seed": computed(
        f"`data.seed`, `{_ROLLOUT}.seed`, and `{_ACTOR}.data_loader_seed` where a step is more than one update"
    ),
    "output_dir": computed("`trainer.default_local_dir` = output_dir/exp_name, unless checkpoint_config has a folder"),
    "checkpoint_config.output_dir": computed(
        "`trainer.default_local_dir`; without ROLL's time stamp, so a run resumes"
    ),
    "checkpoint_config.type": no_effect("checkpoints go to trainer.default_local_dir", "file_system", None),
    "checkpoint_config.async_upload": no_effect("checkpoints are written where they stay", None),
    "checkpoint_config.keep_local_file": no_effect("checkpoints are written where they stay", None),
    "base_dir": no_effect(_DEAD),
    "logging_dir": no_effect("the console is the log; metrics.jsonl and the report lie in trainer.default_local_dir"),
    "logging_steps": no_effect("every step is logged", 1),
    "track_with": computed("`trainer.logger`: tensorboard and wandb beside the console; stdout: the console alone"),
    "tracker_kwargs.project": copied("trainer.project_name"),
    "tracker_kwargs.log_dir": no_effect("the tracker writes into trainer.default_local_dir"),
    "tracker_kwargs.*": no_effect("the tracker has no such setting; wandb reads WANDB_* from the environment"),
    "max_steps": copied("trainer.total_training_steps"),
    "save_steps": copied("trainer.save_freq"),
    "eval_steps": computed("`trainer.test_freq`, where there is a `validation`"),
    "max_ckpt_to_keep": computed("`trainer.max_actor_ckpt_to_keep`; 0: null, all"),
    "resume_from_checkpoint": computed(
        "`trainer.resume_mode`: false: disable, true: auto, a path: resume_path and `trainer.resume_from_path`"
    ),
    "rpc_timeout": computed(f"`{_ROLLOUT}.timeout_s`, `trainer.step_timeout_s`"),
    "num_gpus_per_node": computed("`trainer.n_gpus_per_node`, `trainer.nnodes`, together with the device_mapping"),
    "num_nodes": compared("counted from the device_mapping, as ROLL does"),
    "system_envs.*": no_effect(
        "workers inherit the environment: set it in the shell, NAME=value python -m trainer.main"
    ),
    "model_update_buffer_size_mb": copied(f"{_ROLLOUT}.update_weights_bucket_megabytes"),
    "model_download_type": no_effect("models come from a directory or the Hugging Face hub", None, "HUGGINGFACE_HUB"),
    "local_rank": no_effect(_DEAD, -1),
    "rollout_dump_dir": no_effect("rollouts are not dumped; trainer.log_val_generations keeps completions", None),
    "save_logging_board_dir": no_effect("metrics.jsonl holds every metric", None),
    "profiler_timeline": no_effect("phases are timed in every step (time/*)", False),
    "profiler_memory": no_effect("memory is read in every phase (memory/*)", False),
    "report_length_and_rewards": no_effect("lengths and rewards are in the metrics of every step", False),
    "length_profiler_dir": no_effect(_DEAD),
    "profiler_output_dir": no_effect("there is no profiler to write there"),
    "otlp_output_dir": no_effect("there is no OTLP collector"),
    "is_offload_states": no_effect("param_offload and optimizer_offload are auto: what fits stays on the GPU"),
    "is_offload_optimizer_states_in_train_step": no_effect("optimizer_offload is auto: what fits stays on the GPU"),
    "rollout_mock.enable": refused("rollouts cannot be dumped or replayed", "set it to false", False),
    "rollout_mock.mode": no_effect("belongs to rollout_mock.enable"),
    "rollout_mock.dump_dir": no_effect("belongs to rollout_mock.enable"),
    "transfer_backend": no_effect(
        "weights travel by CUDA IPC, shared memory, or Ray from node to node, as the placement asks", None
    ),
    # lengths and batches
    "rollout_batch_size": copied("data.train_batch_size", "prompts in both"),
    "val_batch_size": no_effect("ROLL's RLVR validates on all prompts at once, and so does this"),
    "num_return_sequences_in_group": copied(f"{_ROLLOUT}.n"),
    "prompt_length": copied("data.max_prompt_length", "longer prompts are dropped (`data.filter_overlong_prompts`)"),
    "response_length": computed("`data.max_response_length`"),
    "sequence_length": computed(
        "`data.max_response_length` = sequence_length - prompt_length; wins over response_length"
    ),
    "val_prompt_length": refused("validation has the lengths of training", "leave it out", None),
    "val_sequence_length": refused("validation has the lengths of training", "leave it out", None),
    "ppo_epochs": computed(
        f"`{_ACTOR}.ppo_epochs`; the critic passes once over a batch (`critic.ppo_epochs`), as in ROLL"
    ),
    # scheduling of requests
    "generate_opt_level": no_effect(_AT_ONCE, 1),
    "is_num_return_sequences_expand": no_effect("each response is a request; the prefix cache computes a prompt once"),
    "max_running_requests": no_effect(f"{_AT_ONCE}; strategy_config.max_num_seqs limits what one decodes together"),
    "is_use_additional_prompts": refused(
        "more prompts than a step needs are not started ahead",
        "set it to false; a query_filter_config brings DAPO's dynamic sampling",
        False,
    ),
    "max_additional_running_prompts": no_effect("belongs to is_use_additional_prompts"),
    "user_defined_rollout_loop_cls": refused(
        "a rollout loop of one's own is not there",
        "leave it out",
        "roll.distributed.scheduler.user_defined_rollout_loop.UserDefinedRolloutLoop",
    ),
    "router_args": no_effect("the prompts of a step are divided among the replicas", None),
    "async_generation_ratio": refused("generation ahead of training is not there yet", "set it to 0", 0, 0.0),
    # models
    "pretrain": copied("actor_rollout_ref.model.path"),
    "reward_pretrain": computed("`critic.model.path`, where critic.model_args names none"),
    # PPO
    "adv_estimator": computed(f"{_ESTIMATOR}: gae, reinforce, grpo"),
    "gamma": computed(f"`algorithm.gamma`, or in {_ESTIMATOR}"),
    "lambd": computed(f"`algorithm.lam`, or in {_ESTIMATOR}"),
    "norm_mean_type": computed(f"{_ESTIMATOR}: batch, group; running is refused"),
    "norm_std_type": computed(f"{_ESTIMATOR}: batch, group; running is refused"),
    "reward_clip": computed(_ESTIMATOR),
    "whiten_rewards": computed(_ESTIMATOR),
    "whiten_advantages": computed(_ESTIMATOR),
    "advantage_clip": computed(_ESTIMATOR),
    "max_len_mask": computed(f"{_ESTIMATOR}: responses of full length have advantage 0"),
    "difficulty_mask": computed(f"{_ESTIMATOR}: groups outside the two thresholds have advantage 0"),
    "difficulty_low_threshold": computed(f"{_ESTIMATOR}, with difficulty_mask"),
    "difficulty_high_threshold": computed(f"{_ESTIMATOR}, with difficulty_mask"),
    "error_max_len_clip": computed(f"{_ESTIMATOR}: of responses over the threshold those with reward 1 are kept"),
    "error_max_len_threshold": computed(f"{_ESTIMATOR}, with error_max_len_clip"),
    "pg_clip": computed(
        f"`{_ACTOR}.clip_ratio`, `{_ACTOR}.clip_ratio_low`, `{_ACTOR}.clip_ratio_high`, `{_ACTOR}.clip_ratio_c`"
    ),
    "use_pg_clip_range": computed("takes pg_clip_low and pg_clip_high in place of pg_clip"),
    "pg_clip_low": computed(f"`{_ACTOR}.clip_ratio_low`, with use_pg_clip_range"),
    "pg_clip_high": computed(f"`{_ACTOR}.clip_ratio_high`, with use_pg_clip_range"),
    "dual_clip_loss": computed(f"`{_ACTOR}.clip_ratio_c` = 1 + 2 pg_clip; false: 1e9, which never binds"),
    "importance_sampling": computed(f"`{_ACTOR}.policy_loss.loss_mode`: token: ppo, seq: gspo"),
    "loss_agg_mode": computed(f"`{_ACTOR}.loss_agg_mode`, `{_ACTOR}.loss_scale_factor`"),
    "entropy_loss_coef": copied(f"{_ACTOR}.entropy_coeff"),
    "use_kl_loss": copied(f"{_ACTOR}.use_kl_loss", "k3, as ROLL has it"),
    "kl_loss_coef": copied(f"{_ACTOR}.kl_loss_coef"),
    "add_token_level_kl": copied("algorithm.use_kl_in_reward"),
    "kl_penalty": computed("`algorithm.kl_penalty`; full is refused"),
    "init_kl_coef": copied("algorithm.kl_ctrl.kl_coef"),
    "target_kl": computed("`algorithm.kl_ctrl.type`=adaptive, `algorithm.kl_ctrl.target_kl`; null: fixed"),
    "kl_horizon": copied("algorithm.kl_ctrl.horizon"),
    "max_grad_norm": computed(f"`{_ACTOR}.optim.clip_grad`, `critic.optim.clip_grad`"),
    "value_clip": computed("`critic.cliprange_value`; null: 1e9, which never binds"),
    "critic_warmup": computed("`trainer.critic_warmup`, with a critic"),
    "l2": no_effect(_DEAD, 0, 0.0),
    "use_reward_scaling": no_effect(_DEAD, False),
    "use_reward_norm": no_effect(_DEAD, False),
    "add_len_reward": no_effect(_DEAD, False),
    "enable_reference": no_effect("the reference is there when a KL needs it"),
    "enable_old_logprobs_recompute": no_effect("old log-probs are computed exactly where the loss needs them"),
    "force_disable_old_logprobs_recompute": refused(
        "with several updates per batch the ratio needs log-probs from before the first", "set it to false", False
    ),
    "train_infer_correction.is_weight.enabled": computed("`algorithm.rollout_correction.rollout_is`"),
    "train_infer_correction.is_weight.weight_type": computed(
        "`algorithm.rollout_correction.rollout_is`; segment is refused"
    ),
    "train_infer_correction.is_weight.upper_bound": computed("`algorithm.rollout_correction.rollout_is_threshold`"),
    "train_infer_correction.is_weight.detach": refused("weights have no gradient here", "set it to true", True),
    "train_infer_correction.filters": computed(
        "`algorithm.rollout_correction.rollout_rs` and its threshold: token, geometric, sequence by ratio"
    ),
    # RLVR
    "global_template": computed("`data.apply_chat_template_kwargs`; wins over actor_train.data_args.template"),
    "tag_to_template": refused("all rows have one chat template", "leave it out", {}, None),
    "dataset_filter.source": no_effect(_DEAD, None),
    "dataset_filter.min_difficulty": no_effect(_DEAD, None),
    "dataset_filter.max_difficulty": no_effect(_DEAD, None),
    "dataset_filter.num_samples": no_effect(_DEAD, 0),
    "difficulty_loss_weight": refused("sequences have no weight of their own in the loss", "set it to false", False),
    "length_loss_weight": refused("sequences have no weight of their own in the loss", "set it to false", False),
    "rl_loss_coef": refused(_OWN_LOSS, "set it to 1.0 and scale actor_train.training_args.learning_rate", 1, 1.0),
    "postive_loss_coef": no_effect(_DEAD, 0, 0.0),
    "use_topr_neg_loss_coef": no_effect(_DEAD, 0, 0.0),
    "use_policy_loss_type": no_effect(_DEAD, "PPO"),
    "use_topr_loss": no_effect(_DEAD, False),
    "val_greedy": no_effect(_DEAD, False),
    "val_n_sample": no_effect(_DEAD, 1),
    "mask_type": no_effect(_DEAD, "loss"),
    "balance_length": no_effect(_DEAD, False),
    "minibatch_data_iter_num": no_effect(_DEAD, 1),
    # roles that are not here
    "reward": no_effect("RLVR's rewards are in `rewards`", None),
    "teacher": refused(_DISTILL, "leave it out", None, {}),
    "student_train": refused(_DISTILL, "write it as actor_train", None, {}),
    "student_infer": refused(_DISTILL, "write it as actor_infer", None, {}),
    "is_pure_opd": refused(_DISTILL, "set it to false", False),
    "use_opd": refused(_DISTILL, "set it to false", False),
    "pure_opd_pipeline_type": no_effect("belongs to is_pure_opd", "rlvr"),
}
"""ROLL's key -> its rule. A last part `*` stands for any name."""

NOT_IN_ROLL: Rules = {
    name: no_effect("ROLL 0.3 has no such key and drops it; delete it")
    for name in (
        "reward_norm",
        "reward_shift",
        "reward_scale",
        "generate_redundancy_num",
        "reward_filter_mean_threshold",
    )
}
"""Left over in ROLL's own examples from earlier releases."""
