#!/usr/bin/env bash
# GRPO on GSM8K with Qwen2-7B-Instruct, one node of 8 GPUs: configs/recipe/qwen2_7b_grpo_fsdp.yaml.
#
#   bash examples/qwen2_7b_grpo.sh                                  trains
#   bash examples/qwen2_7b_grpo.sh trainer.dry_run=true             prints roles, devices and batch sizes and exits
#   bash examples/qwen2_7b_grpo.sh 'trainer.logger=[console,wandb]'  any key of its own
#
# The recipe says what the data look like; MODEL and DATA say where both lie.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2-7B-Instruct}
DATA=${DATA:-$HOME/data/gsm8k}

exec python -m trainer.main --config-name "${RECIPE:-qwen2_7b_grpo_fsdp}" \
    actor_rollout_ref.model.path="$MODEL" \
    data.train_files="$DATA/train.parquet" \
    data.val_files="$DATA/test.parquet" "$@"
