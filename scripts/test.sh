#!/usr/bin/env bash
# Everything CI checks: lint, types, unit tests, engine tests, end-to-end tests with the real parts.
#
#   bash scripts/test.sh                   all of it
#   bash scripts/test.sh tests/unit -x     arguments go to pytest
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export TANDEM_VENV=${TANDEM_VENV:-$root/.venv}
TANDEM_VENV=$(realpath -m "$TANDEM_VENV")
cd "$root"
bash scripts/install.sh dev
python=$TANDEM_VENV/bin/python

"$python" scripts/make_addition_task.py &  # a minute or two of one core
task=$!
trap 'kill "$task" 2>/dev/null || true' EXIT
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
wait "$task"
trap - EXIT
"$python" -m pytest "$@"
