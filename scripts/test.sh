#!/usr/bin/env bash
# Everything CI checks: lint, types, unit tests, engine tests, end-to-end tests with the real parts.
#
#   bash scripts/test.sh                   all of it
#   bash scripts/test.sh tests/unit -x     arguments go to pytest
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash scripts/install.sh dev
bin=${TANDEM_VENV:-$root/.venv}/bin

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/python" scripts/make_addition_task.py
"$bin/python" -m pytest "$@"
