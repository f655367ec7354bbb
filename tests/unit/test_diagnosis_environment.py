"""Environment variables: each trap alone, on the versions and machines where it is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from diagnosis_world import capabilities, laptop, server

from trainer.diagnosis.check_environment import variables
from trainer.diagnosis.facts import Facts, Torch
from trainer.diagnosis.items import BROKEN, OK, WARNING


def check(facts: Facts, **environ: str) -> tuple[str, str, str]:
    """Verdict, reason and what to type, of the one item there must be."""
    (item,) = variables(dataclasses.replace(facts, environ=environ))
    return item.verdict, item.reason, item.told()


def with_version(facts: Facts, version: str, tmp_path: Path, *read: str) -> Facts:
    can = capabilities(version, tmp_path / "v", *read)
    return dataclasses.replace(facts, vllm=dataclasses.replace(facts.vllm, version=version, capabilities=can))


@pytest.mark.parametrize(
    ("version", "value", "read", "verdict", "words"),
    [
        ("0.32.0", "0", False, WARNING, "left over"),
        ("0.32.0", "1", False, WARNING, "left over"),
        ("0.11.0", "0", True, WARNING, "V1 engine"),
        ("0.11.0", "1", True, OK, ""),
        ("0.8.5", "0", True, WARNING, "V1 engine"),
        ("0.7.3", "1", True, WARNING, "V0 engine"),
        ("0.7.3", "0", True, OK, ""),
    ],
)
def test_engine_choice(version: str, value: str, read: bool, verdict: str, words: str, tmp_path: Path) -> None:
    facts = with_version(server(tmp_path), version, tmp_path, *(["VLLM_USE_V1"] if read else ["VLLM_LOGGING_LEVEL"]))
    found, reason, typed = check(facts, VLLM_USE_V1=value)
    assert found == verdict and words in reason
    assert typed == ("unset VLLM_USE_V1" if verdict == WARNING else "")


def test_attention_variable_that_no_longer_exists(tmp_path: Path) -> None:
    verdict, reason, typed = check(laptop(tmp_path), VLLM_ATTENTION_BACKEND="FLASH_ATTN")
    assert verdict == WARNING and "no longer exists" in reason
    assert "engine_kwargs.vllm.attention_backend=FLASH_ATTN" in typed and "unset VLLM_ATTENTION_BACKEND" in typed


def test_attention_variable_that_is_read(tmp_path: Path) -> None:
    facts = with_version(server(tmp_path), "0.14.0", tmp_path, "VLLM_ATTENTION_BACKEND")
    assert check(facts, VLLM_ATTENTION_BACKEND="FLASH_ATTN")[0] == OK


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(("version", "verdict"), [("0.19.0", WARNING), ("0.20.1", OK)])
def test_expandable_segments(name: str, version: str, verdict: str, tmp_path: Path) -> None:
    found, _, typed = check(server(tmp_path, version), **{name: "max_split_size_mb:64,expandable_segments:True"})
    assert found == verdict and ("unset " + name in typed) == (verdict == WARNING)


def test_expandable_segments_are_no_matter_on_a_cpu(tmp_path: Path) -> None:
    facts = with_version(laptop(tmp_path), "0.19.0", tmp_path, "VLLM_LOGGING_LEVEL")
    assert check(facts, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")[0] == OK


def test_allocator_said_twice(tmp_path: Path) -> None:
    found = check(server(tmp_path), PYTORCH_CUDA_ALLOC_CONF="a:1", PYTORCH_ALLOC_CONF="a:2")
    assert found[0] == WARNING and found[2].endswith("unset PYTORCH_CUDA_ALLOC_CONF")


def test_unknown_variables_of_vllm(tmp_path: Path) -> None:
    verdict, reason, typed = check(laptop(tmp_path), VLLM_LOGING_LEVEL="INFO", VLLM_CPU_KVCACHE_SPACE="1")
    assert verdict == WARNING and "did you mean VLLM_LOGGING_LEVEL?" in reason and typed == "unset VLLM_LOGING_LEVEL"


def test_multiprocessing_is_overridden(tmp_path: Path) -> None:
    assert check(laptop(tmp_path), VLLM_ENABLE_V1_MULTIPROCESSING="1")[0] == WARNING


@pytest.mark.parametrize(
    ("value", "words"), [("", "hides all GPUs"), ("-1", "hides all GPUs"), ("0,7", "GPUs 0, 1 only"), ("1,1", "twice")]
)
def test_visible_devices(value: str, words: str, tmp_path: Path) -> None:
    verdict, reason, _ = check(server(tmp_path), CUDA_VISIBLE_DEVICES=value)
    assert verdict == BROKEN and words in reason


@pytest.mark.parametrize("value", ["0", "1,0", "GPU-7c1d"])
def test_visible_devices_that_are_there(value: str, tmp_path: Path) -> None:
    assert check(server(tmp_path), CUDA_VISIBLE_DEVICES=value)[0] == OK


def test_a_run_on_cpu_may_hide_the_gpus(tmp_path: Path) -> None:
    assert check(server(tmp_path, device="cpu"), CUDA_VISIBLE_DEVICES="")[0] == OK


def test_contradictory_devices(tmp_path: Path) -> None:
    both = {"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}
    assert check(laptop(tmp_path), **both)[0] == WARNING
    rocm = laptop(tmp_path / "r", torch=Torch("2.13.0+rocm7", hip="7.0"))
    assert check(rocm, **both)[0] == BROKEN
    assert "HIP_VISIBLE_DEVICES" in check(rocm, ROCR_VISIBLE_DEVICES="0")[2]


@pytest.mark.parametrize(("value", "verdict"), [("64", OK), ("65", WARNING), ("many", WARNING), ("4,2", OK)])
def test_threads(value: str, verdict: str, tmp_path: Path) -> None:
    assert check(laptop(tmp_path), OMP_NUM_THREADS=value)[0] == verdict


@pytest.mark.parametrize("name", ["NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "CUDA_LAUNCH_BLOCKING", "TORCHDYNAMO_DISABLE"])
def test_what_makes_gpus_slow(name: str, tmp_path: Path) -> None:
    assert check(server(tmp_path), **{name: "1"})[0] == WARNING
    assert check(server(tmp_path / "off"), **{name: "0"})[0] == OK
    assert check(laptop(tmp_path), **{name: "1"})[0] == OK


def test_renamed_variables(tmp_path: Path) -> None:
    found = check(server(tmp_path), NCCL_ASYNC_ERROR_HANDLING="1")
    assert found[2] == "unset NCCL_ASYNC_ERROR_HANDLING; export TORCH_NCCL_ASYNC_ERROR_HANDLING=1"


@pytest.mark.parametrize(("value", "verdict"), [("eth", OK), ("ib0", BROKEN), ("^docker", OK), ("=eth0", OK)])
def test_network_interface(value: str, verdict: str, tmp_path: Path) -> None:
    assert check(server(tmp_path), NCCL_SOCKET_IFNAME=value)[0] == verdict


def test_ray_variables(tmp_path: Path) -> None:
    assert check(server(tmp_path), RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES="1")[0] == WARNING
    assert "107" in check(laptop(tmp_path), RAY_TMPDIR="/scratch/" + "x" * 60)[1]
