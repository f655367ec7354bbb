#!/usr/bin/env bash
# From nothing to a trained model: installs, makes the task, trains with GRPO, and shows the result.
#
#   bash scripts/quickstart.sh                                  the quick start
#   bash scripts/quickstart.sh trainer.total_training_steps=20  with overrides of the configuration
#
# A run that was stopped goes on where it was; a finished one is left as it is and a new one gets a directory of its own.
# TANDEM_RUN_DIR=path   where the run goes (default: runs/quickstart, then runs/quickstart-2, ...)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export TANDEM_VENV=${TANDEM_VENV:-$root/.venv}
TANDEM_VENV=$(realpath -m "$TANDEM_VENV")
cd "$root"
bash scripts/install.sh
python="$TANDEM_VENV/bin/python"

"$python" scripts/make_addition_task.py

run_dir=${TANDEM_RUN_DIR:-}
if [ -z "$run_dir" ]; then
    run_dir=runs/quickstart
    number=1
    while [ -e "$run_dir/finished" ]; do
        number=$((number + 1))
        run_dir=runs/quickstart-$number
    done
fi

arguments=(--config-name quickstart "trainer.default_local_dir='$run_dir'")
if command -v nvidia-smi >/dev/null && [ "${TANDEM_DEVICE:-}" != cpu ]; then
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
    if [ "$gpus" = 1 ]; then arguments+=(trainer.n_gpus_per_node=1); fi
elif [ "$(nproc)" = 1 ]; then
    arguments+=(trainer.n_gpus_per_node=1)
fi

"$python" -m trainer.main "${arguments[@]}" "$@"
touch "$run_dir/finished"

cat <<END
  Try next  cd $(printf %q "$root") && $(printf %q "$python") -m trainer.main --config-name quickstart algorithm.adv_estimator=gae trainer.experiment_name=quickstart-ppo
            (the same task by PPO with a critic)
END
