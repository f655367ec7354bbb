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

# Most of an end-to-end test is processes that start, one waiting for the other: two streams, then, alone, what measures
# time. They share the cores, so threads that wait must not spin: that makes an update several times slower.
export OMP_WAIT_POLICY=PASSIVE
nothing=5  # pytest's status if none was chosen
chosen() { "$python" -m pytest "$@" && nothing=0 || { status=$?; [ $status = 5 ] || exit $status; }; }
chosen -n 2 -m "not contract and not quiet" "$@"
chosen -m "quiet and not contract" "$@"
exit $nothing
