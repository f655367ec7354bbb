#!/usr/bin/env bash
# PPO with a critic (GAE) on GSM8K with Qwen2-7B-Instruct, one node of 8 GPUs.
#
#   bash examples/qwen2_7b_ppo.sh                        trains
#   bash examples/qwen2_7b_ppo.sh trainer.dry_run=true   prints roles, devices and batch sizes and exits
#
# Data as in qwen2_7b_grpo.sh.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2-7B-Instruct}
DATA=${DATA:-$HOME/data/gsm8k}

exec python -m trainer.main \
    algorithm.adv_estimator=gae \
    algorithm.use_kl_in_reward=true \
    algorithm.kl_ctrl.kl_coef=0.001 \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/test.parquet" \
    data.train_batch_size=1024 \
    data.max_prompt_length=512 \
    data.max_response_length=512 \
    data.filter_overlong_prompts=true \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.4 \
    critic.model.path="$MODEL" \
    critic.optim.lr=1e-5 \
    critic.ppo_max_token_len_per_gpu=32768 \
    trainer.project_name=gsm8k \
    trainer.experiment_name=qwen2_7b_ppo \
    'trainer.logger=[console,wandb]' \
    trainer.n_gpus_per_node=8 \
    trainer.save_freq=20 \
    trainer.test_freq=10 \
    trainer.total_epochs=15 "$@"
