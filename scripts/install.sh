#!/usr/bin/env bash
# Installs Tandem and what it needs into a virtual environment; the second time takes less than a second.
#
#   bash scripts/install.sh          for running
#   bash scripts/install.sh dev      with the tools of scripts/test.sh
#
# TANDEM_VENV=path         the environment (default: .venv in the repository)
# TANDEM_DEVICE=cpu|cuda   which build of vLLM (default: cuda if nvidia-smi finds a GPU)
# PYTHON=python3.12        the interpreter (default: the newest supported one there is)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${TANDEM_VENV:-$root/.venv}
extras=${1:-}
began=$SECONDS

say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

device() {
    if [ -n "${TANDEM_DEVICE:-}" ]; then printf '%s' "$TANDEM_DEVICE"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then printf cuda
    else printf cpu; fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
            command -v "$candidate"; return
        fi
    done
    fail "Python 3.11 to 3.13 is needed and none was found; install one, or name it: PYTHON=/path/to/python3.11 $0"
}

check_machine() {
    [ "$(uname -s)" = Linux ] || fail "vLLM runs on Linux only; this is $(uname -s) (docker/Dockerfile.cpu works elsewhere)"
    local free_gb
    free_gb=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 {print int($4 / 1048576)}')
    local needed_gb=6; [ "$device" = cuda ] && needed_gb=16
    [ "$free_gb" -ge "$needed_gb" ] || fail "$needed_gb GB are needed below $(dirname "$venv"), $free_gb GB are free; make room or set TANDEM_VENV"
    "$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
}

install_torch_cpu() {
    "$venv/bin/python" -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")' 2>/dev/null && return
    # As pip is set up here; the ordinary index has CUDA builds only, and uv knows where PyTorch keeps the others.
    "$venv/bin/pip" install -q "torch==2.13.0+cpu" >>"$log" 2>&1 && return
    "$venv/bin/pip" install -q uv >>"$log" 2>&1
    "$venv/bin/uv" pip install -q --python "$venv/bin/python" --torch-backend cpu "torch==2.13.0" >>"$log" 2>&1
}

install_all() {
    "$python" -m venv "$venv"
    "$venv/bin/pip" install -q --upgrade pip >>"$log" 2>&1
    if [ "$device" = cpu ]; then say "  PyTorch, CPU build"; install_torch_cpu || return 1; fi
    say "  vLLM ($device build), Ray and the rest: a few minutes"
    (cd "$root" && "$venv/bin/pip" install -q -r "requirements/$device.txt" >>"$log" 2>&1) || return 1
    if [ "$extras" = dev ]; then
        say "  development tools"
        "$venv/bin/pip" install -q -r "$root/requirements/dev.txt" >>"$log" 2>&1 || return 1
    fi
    "$venv/bin/pip" install -q --no-deps --no-build-isolation -e "$root" >>"$log" 2>&1
}

device=$(device)
case $device in cpu|cuda) ;; *) fail "TANDEM_DEVICE=$device: use cpu or cuda" ;; esac
inputs=$(cat "$root"/requirements/*.txt "$root"/setup.py "$root"/requirements/placeholders/*/pyproject.toml | sha256sum | cut -c1-16)
stamp="$venv/.tandem-$device-$inputs"
if [ -e "$stamp" ] && { [ "$extras" != dev ] || [ -e "$stamp-dev" ]; }; then exit 0; fi

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9
python=$(find_python)
check_machine
log="$venv.log"
: >"$log"
say "Installing into $venv ($("$python" --version), $device)"
install_all || { tail -n 15 "$log" >&2; fail "installation failed; the whole output is in $log"; }
"$venv/bin/python" -c 'import torch, ray, vllm, trainer, workers' >>"$log" 2>&1 \
    || { tail -n 15 "$log" >&2; fail "the environment does not import; the whole output is in $log"; }
rm -f "$venv"/.tandem-*
touch "$stamp"
if [ "$extras" = dev ]; then touch "$stamp-dev"; fi
rm -f "$venv.lock" "$log"
say "Installed in $((SECONDS - began)) s"
