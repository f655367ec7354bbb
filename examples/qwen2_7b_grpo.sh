#!/usr/bin/env bash
# GRPO on GSM8K with Qwen2-7B-Instruct, one node of 8 GPUs.
#
#   bash examples/qwen2_7b_grpo.sh                        trains
#   bash examples/qwen2_7b_grpo.sh trainer.dry_run=true   prints roles, devices and batch sizes and exits
#
# Data: GSM8K as parquet with the columns prompt (chat messages), data_source (openai/gsm8k) and
# reward_model.ground_truth; the built-in scorer compares the number behind the last "####".
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2-7B-Instruct}
DATA=${DATA:-$HOME/data/gsm8k}

exec python -m trainer.main \
    algorithm.adv_estimator=grpo \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/test.parquet" \
    data.train_batch_size=1024 \
    data.max_prompt_length=512 \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=true \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.use_kl_loss=true \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    actor_rollout_ref.rollout.n=5 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.enforce_eager=False \
    trainer.project_name=gsm8k \
    trainer.experiment_name=qwen2_7b_grpo \
    'trainer.logger=[console,wandb]' \
    trainer.n_gpus_per_node=8 \
    trainer.save_freq=20 \
    trainer.test_freq=5 \
    trainer.total_epochs=15 "$@"
