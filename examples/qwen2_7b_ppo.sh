#!/usr/bin/env bash
# PPO with a critic (GAE) on GSM8K with Qwen2-7B-Instruct, one node of 8 GPUs: configs/recipe/qwen2_7b_ppo.yaml.
#
#   bash examples/qwen2_7b_ppo.sh                        trains
#   bash examples/qwen2_7b_ppo.sh trainer.dry_run=true   prints roles, devices and batch sizes and exits
#
# MODEL and DATA as in qwen2_7b_grpo.sh.
set -euo pipefail

RECIPE=qwen2_7b_ppo exec bash "$(dirname "${BASH_SOURCE[0]}")/qwen2_7b_grpo.sh" "$@"
