#!/usr/bin/env bash
# GRPO on GSM8K with Qwen2-7B-Instruct, one node of 8 GPUs, actor and reference on Megatron-core: tp 2 x pp 2 x dp 2.
#
#   bash examples/qwen2_7b_grpo_megatron.sh                        trains
#   bash examples/qwen2_7b_grpo_megatron.sh trainer.dry_run=true   prints roles, devices and batch sizes and exits
#
# The same training as qwen2_7b_grpo.sh, where the data are described; only what differs is here.
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/qwen2_7b_grpo.sh" \
    trainer.experiment_name=qwen2_7b_grpo_megatron \
    actor_rollout_ref.actor.strategy=megatron \
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2 \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2 "$@"
