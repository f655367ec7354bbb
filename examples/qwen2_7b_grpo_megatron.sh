#!/usr/bin/env bash
# GRPO on GSM8K with Qwen2-7B-Instruct, one node of 8 GPUs, actor and reference on Megatron-core (tp 2 x pp 2 x dp 2):
# configs/recipe/qwen2_7b_grpo_megatron.yaml.
#
#   bash examples/qwen2_7b_grpo_megatron.sh                        trains
#   bash examples/qwen2_7b_grpo_megatron.sh trainer.dry_run=true   prints roles, devices and batch sizes and exits
#
# MODEL and DATA as in qwen2_7b_grpo.sh.
set -euo pipefail

RECIPE=qwen2_7b_grpo_megatron exec bash "$(dirname "${BASH_SOURCE[0]}")/qwen2_7b_grpo.sh" "$@"
