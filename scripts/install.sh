#!/usr/bin/env bash
# Installs Tandem and what it needs into a virtual environment; the second time takes less than a second.
#
#   bash scripts/install.sh          for running
#   bash scripts/install.sh dev      with the tools of scripts/test.sh
#
# TANDEM_VENV=path         the environment (default: .venv in the repository); a relative path counts from here
# TANDEM_DEVICE=cpu|cuda   which build of vLLM (default: cuda if nvidia-smi finds a GPU)
# PYTHON=python3.12        the interpreter (default: the newest supported one there is)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m "${TANDEM_VENV:-$root/.venv}")
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
    local candidate candidates=(python3.11 python3.12 python3.13 python3)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            command -v "$candidate"; return
        fi
    done
    fail "Python 3.11 to 3.13 is needed, and ${candidates[*]} is not that; install one, or name it: PYTHON=/path/to/python3.11"
}

check_machine() {
    [ "$(uname -s)" = Linux ] || fail "vLLM runs on Linux only; this is $(uname -s) (docker/Dockerfile.cpu works elsewhere)"
    local free_gb
    free_gb=$(df -Pk "$venv" | awk 'NR == 2 {print int($4 / 1048576)}')
    local needed_gb=6; [ "$device" = cuda ] && needed_gb=16
    [ "$free_gb" -ge "$needed_gb" ] || fail "$needed_gb GB are needed for $venv, $free_gb GB are free; make room, or set TANDEM_VENV to a path elsewhere"
    "$python" -c 'import venv, ensurepip' 2>/dev/null \
        || fail "$python cannot make virtual environments; install what it lacks (Debian, Ubuntu: apt install python3-venv)"
}

pip_install() { "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@" >>"$log" 2>&1; }

install_torch_cpu() {
    "$venv/bin/python" -c 'import torch, sys; sys.exit(torch.__version__ != "2.13.0+cpu")' 2>/dev/null && return
    # As pip is set up here; the ordinary index has CUDA builds only, and uv knows where PyTorch keeps the others.
    pip_install "torch==2.13.0+cpu" && return
    pip_install uv || return 1
    "$venv/bin/python" -m uv pip install -q --python "$venv/bin/python" --torch-backend cpu "torch==2.13.0" >>"$log" 2>&1
}

install_all() {
    "$python" -m venv "$venv" >>"$log" 2>&1 || return 1
    if [ "$device" = cpu ]; then say "  PyTorch, CPU build"; install_torch_cpu || return 1; fi
    say "  vLLM ($device build), Ray and the rest: a few minutes"
    (cd "$root" && pip_install -r "requirements/$device.txt") || return 1
    if [ "$extras" = dev ]; then
        say "  development tools"
        pip_install -r "$root/requirements/dev.txt" || return 1
    fi
    pip_install --no-deps --no-build-isolation -e "$root" || return 1
    say "  a look at whether it imports"
    "$venv/bin/python" -c 'import torch, ray, megatron.core, trainer, workers; from vllm import LLM' >>"$log" 2>&1
}

# The stamp covers what is to be installed, and where the repository lies: the environment points there.
is_installed() { [ -e "$stamp" ] && { [ "$extras" != dev ] || [ -e "$stamp-dev" ]; }; }

device=$(device)
case $device in cpu|cuda) ;; *) fail "TANDEM_DEVICE=$device: use cpu or cuda" ;; esac
inputs=$({ cat "$root"/requirements/*.txt "$root"/requirements/placeholders/*/pyproject.toml "$root/setup.py"
           printf '%s' "$root"; } | sha256sum | cut -c1-16)
stamp="$venv/.tandem-$device-$inputs"
if is_installed; then exit 0; fi

mkdir -p "$venv"
exec 9>"$venv/.lock"
flock -n 9 || { say "Another installation into $venv is under way; waiting for it"; flock 9; }
if is_installed; then exit 0; fi
python=$(find_python)
check_machine
log="$venv/install.log"
: >"$log"
say "Installing into $venv ($("$python" --version), $device)"
install_all || { tail -n 15 "$log" >&2; fail "installation failed; the whole output is in $log"; }
rm -f "$venv"/.tandem-*
touch "$stamp"
if [ "$extras" = dev ]; then touch "$stamp-dev"; fi
say "Installed in $((SECONDS - began)) s"
