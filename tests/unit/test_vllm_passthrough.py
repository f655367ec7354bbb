"""engine_kwargs.vllm: names, values and nested fields of the installed vLLM's own arguments, and what is ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_vllm_arguments import CPU, NEW, SPEC, plan

from workers.rollout.vllm import passthrough
from workers.rollout.vllm.capabilities import Capabilities, of_installed
from workers.rollout.vllm.installed import Sources
from workers.rollout.vllm.kinds import Kinds

ROLLOUT = "actor_rollout_ref.rollout"
KEY = f"{ROLLOUT}.engine_kwargs.vllm"
FILES = {
    "engine/arg_utils.py": """
from typing import Any, Literal, Optional, TypeAlias
import torch
from vllm.config import CacheConfig, CompilationConfig, Level, LoadFormats, SpeculativeConfig, Backend

Policy: TypeAlias = Literal["fcfs", "priority"]

class EngineArgs:
    enable_x: bool = False
    block_size: Optional[int] = None
    loose: int = None
    share: float = 0.5
    policy: Policy = "fcfs"
    load: str | LoadFormats = "auto"
    sizes: "list[int] | None" = None
    compilation_config: CompilationConfig = None
    speculative_config: dict[str, Any] | None = None
    attention_backend: Backend = None
    dtype_of: torch.dtype | str = None
    free: Any = None
    mm: dict[str, int] = None
    block_share: float = CacheConfig.block_share
    blocks: int = get_field(CacheConfig, "blocks")
    level: Level = 1
    cache_config: CacheConfig = None
""",
    "config/__init__.py": """
from vllm.config.compilation import CompilationConfig
from vllm.config.speculative import SpeculativeConfig
from enum import Enum
LoadFormats = Literal["auto", "dummy"]
class Backend(Enum):
    FLASH_ATTN = "some.where"
    TORCH_SDPA = ""
class Level(IntEnum):
    ZERO = 0
class Store(str, Enum):
    DISK = "disk"
class CacheConfig:
    block_size: int = Field(default=None, gt=0)
    block_share: float = Field(default=0.9, gt=0, le=1)
    blocks: int = Field(default=-1, ge=-1)
    store: Store = Store.DISK
""",
    "config/compilation.py": """
class PassConfig:
    fuse: bool = True
class CompilationConfig:
    mode: int | None = None
    pass_config: PassConfig = None
    inductor_compile_config: dict = None
""",
    "config/speculative.py": """
class SpeculativeConfig:
    method: str | None = None
    num_speculative_tokens: int = 0
""",
}


@pytest.fixture
def can(tmp_path: Path) -> Capabilities:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sources = Sources(tmp_path)
    return replace(NEW, engine_arguments=sources.fields("engine.arg_utils", "EngineArgs"), kinds=Kinds(sources))


def told(can: Capabilities, spec: Any = SPEC, **kwargs: Any) -> tuple[str, ...]:
    return plan(replace(spec, engine_kwargs=kwargs), can).problems


@pytest.mark.parametrize(
    "kwargs",
    [
        {"enable_x": True},
        {"block_size": 32},
        {"block_size": None},
        {"loose": None},
        {"share": 1},
        {"policy": "priority"},
        {"load": "anything, as it is text"},
        {"sizes": [1, 2]},
        {"compilation_config": {"mode": 3, "pass_config": {"fuse": False}, "inductor_compile_config": {"any": 1}}},
        {"compilation_config": 3},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        {"attention_backend": "flash_attn"},
        {"attention_backend": "auto"},
        {"attention_backend": None},
        {"level": 0},
        {"level": "zero"},
        {"block_share": 1},
        {"blocks": -1},
        {"cache_config": {"store": "disk", "blocks": 3}},
        {"cache_config": {"store": "DISK", "block_size": None}},
        {"dtype_of": 5},
        {"free": object()},
        {"mm": {"image": 1}},
    ],
)
def test_what_fits_is_passed_through(can: Capabilities, kwargs: dict[str, Any]) -> None:
    made = plan(replace(SPEC, engine_kwargs=kwargs), can)
    assert made.problems == ()
    assert {name: made.arguments[name] for name in kwargs} == kwargs


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"enable_x": 1}, "enable_x=1: for vLLM 0.32.0 must be true or false"),
        ({"enable_x": None}, "enable_x=null: for vLLM 0.32.0 must be true or false"),
        ({"block_size": "32"}, "block_size=32: for vLLM 0.32.0 must be a whole number or null"),
        ({"block_size": True}, "block_size=true: for vLLM 0.32.0 must be a whole number or null"),
        ({"block_size": 1.5}, "block_size=1.5: for vLLM 0.32.0 must be a whole number or null"),
        ({"policy": "prio"}, "policy=prio: for vLLM 0.32.0 must be one of fcfs, priority; did you mean priority?"),
        ({"block_size": -3}, "block_size=-3: for vLLM 0.32.0 must be greater than 0"),
        ({"block_share": 1.5}, "block_share=1.5: for vLLM 0.32.0 must be at most 1"),
        ({"blocks": -2}, "blocks=-2: for vLLM 0.32.0 must be at least -1"),
        ({"cache_config": {"blocks": -2}}, "cache_config.blocks=-2: for vLLM 0.32.0 must be at least -1"),
        (
            {"attention_backend": "flash_atn"},
            "attention_backend=flash_atn: for vLLM 0.32.0 must be one of FLASH_ATTN, TORCH_SDPA, null; "
            "did you mean FLASH_ATTN?",
        ),
        ({"attention_backend": 1}, "attention_backend=1: for vLLM 0.32.0 must be one of FLASH_ATTN, TORCH_SDPA, null"),
        ({"level": "one"}, "level=one: for vLLM 0.32.0 must be one of ZERO, a whole number"),
        ({"sizes": 3}, "sizes=3: for vLLM 0.32.0 must be a list or null"),
        (
            {"compilation_config": "O3"},
            "compilation_config=O3: for vLLM 0.32.0 must be a whole number or a dictionary or null",
        ),
        (
            {"compilation_config": {"moed": 3}},
            "compilation_config.moed=3: for vLLM 0.32.0 it has no such field; did you mean mode?",
        ),
        (
            {"compilation_config": {"pass_config": {"fuse": 2}}},
            "compilation_config.pass_config.fuse=2: for vLLM 0.32.0 must be true or false",
        ),
        (
            {"speculative_config": {"method": "ngram", "zzz": 2}},
            "speculative_config.zzz=2: for vLLM 0.32.0 it has no such field; take it out",
        ),
    ],
)
def test_what_does_not_fit_is_refused(can: Capabilities, kwargs: dict[str, Any], message: str) -> None:
    assert told(can, **kwargs) == (f"{KEY}.{message}",)


def test_a_name_near_one_of_an_older_version() -> None:
    assert told(NEW, swap_spaces=4) == (
        f"{KEY}.swap_spaces=4: vLLM 0.32.0 has no such argument; did you mean swap_space? vLLM 0.7.0 to 0.17.1 had it",
    )


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("tensor_parallel_size", 2, f"{ROLLOUT}.tensor_model_parallel_size"),
        ("model", "/m", "actor_rollout_ref.model.path"),
        ("dtype", "float16", f"{ROLLOUT}.dtype"),
        ("seed", 3, f"{ROLLOUT}.seed"),
        ("enable_sleep_mode", True, f"{ROLLOUT}.free_cache_engine"),
        ("gpu_memory_utilization", 0.9, f"{ROLLOUT}.gpu_memory_utilization"),
        ("hf_overrides", {"a": 1}, "actor_rollout_ref.model.override_config"),
        ("device_ids", [0], f"{ROLLOUT}.device_mapping"),
    ],
)
def test_what_has_a_key_of_its_own(name: str, value: Any, instead: str) -> None:
    (problem,) = told(NEW, **{name: value})
    assert problem == (f"{passthrough.setting(name, value)}: this argument has a key of its own; set {instead} instead")


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("worker_extension_cls", "a.B", "Tandem needs this argument as it sets it; take it out"),
        ("distributed_executor_backend", "ray", "Tandem needs this argument as it sets it; take it out"),
        ("pipeline_parallel_size", 2, f"set {ROLLOUT}.tensor_model_parallel_size, and more replicas by"),
        ("runner", "pooling", "replicas generate, nothing else; take it out"),
        ("override_generation_config", {"min_p": 0.1}, f"set {ROLLOUT}.temperature, top_p and top_k"),
        ("enable_lora", True, f"{ROLLOUT}.sleep_level=2 drops the weights below an adapter; take it out"),
        ("quantization", "fp8", f"the weight sync writes weights in {ROLLOUT}.dtype"),
    ],
)
def test_what_cannot_work_here(name: str, value: Any, why: str) -> None:
    can = replace(NEW, engine_arguments=NEW.engine_arguments | {name})
    (problem,) = told(can, **{name: value})
    assert problem.startswith(f"{passthrough.setting(name, value)}: ") and why in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [("pipeline_parallel_size", 1), ("enable_lora", False), ("quantization", None), ("runner", "auto")],
)
def test_what_changes_nothing_may_be_said(name: str, value: Any) -> None:
    assert told(replace(NEW, engine_arguments=NEW.engine_arguments | {name}), **{name: value}) == ()


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        (
            {"enforce_eager": True},
            {"cudagraph_capture_sizes": [1, 2]},
            f"{KEY}.cudagraph_capture_sizes: chooses among CUDA graphs, and {ROLLOUT}.enforce_eager=true turns them "
            f"off; set {ROLLOUT}.enforce_eager=false, or take it out",
        ),
        (
            {"enforce_eager": True},
            {"compilation_config": {"cudagraph_mode": "FULL"}},
            f"{KEY}.compilation_config.cudagraph_mode: chooses among CUDA graphs, and {ROLLOUT}.enforce_eager=true "
            f"turns them off; set {ROLLOUT}.enforce_eager=false, or take it out",
        ),
        (
            {"kv_cache_gb": 2.0},
            {"num_gpu_blocks_override": 100},
            f"{KEY}.num_gpu_blocks_override=100: sizes the KV cache, as {ROLLOUT}.kv_cache_gb=2.0 does; "
            "take out one of them",
        ),
        (
            {},
            {"max_num_scheduled_tokens": 100},
            f"{KEY}.max_num_scheduled_tokens=100: smaller than {ROLLOUT}.max_num_seqs=256, and every sequence takes "
            f"one token of an engine step; set {ROLLOUT}.max_num_seqs=100 or smaller",
        ),
        (
            {"sleep_level": 1},
            {"speculative_config": {"method": "eagle", "model": "/draft"}},
            f"{KEY}.speculative_config: the draft model's weights are not part of the weight sync, and "
            f"{ROLLOUT}.load_format=dummy leaves them random; set {ROLLOUT}.load_format=auto, or draft without a "
            f"model: {KEY}.speculative_config.method=ngram",
        ),
        (
            {"load_format": "auto"},
            {"speculative_config": {"method": "eagle", "model": "/draft"}},
            f"{KEY}.speculative_config: the draft model's weights are not part of the weight sync, and "
            f"{ROLLOUT}.sleep_level=2 drops them; set {ROLLOUT}.sleep_level=1, or draft without a model: "
            f"{KEY}.speculative_config.method=ngram",
        ),
    ],
)
def test_arguments_against_keys_of_ours(change: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    can = replace(NEW, engine_arguments=NEW.engine_arguments | set(kwargs))
    assert told(can, replace(SPEC, **change), **kwargs) == (message,)
    if change.get("enforce_eager"):
        assert told(can, replace(SPEC, enforce_eager=False), **kwargs) == ()


@pytest.mark.parametrize("speculative", [{"method": "ngram"}, {"model": "[ngram]"}])
def test_drafts_without_a_model_need_no_weights(speculative: dict[str, Any]) -> None:
    can = replace(NEW, engine_arguments=NEW.engine_arguments | {"speculative_config"})
    assert told(can, speculative_config=speculative) == ()


class TestInstalled:
    """Against the vLLM that is here, whichever it is."""

    def test_each_argument_is_looked_at(self) -> None:
        can = of_installed("cpu")
        assert can.kinds is not None
        looked_at = [name for name in can.engine_arguments if can.kinds.of(name) is not None]
        assert len(looked_at) > 0.8 * len(can.engine_arguments)

    def test_what_is_passed_and_what_is_not(self) -> None:
        can = of_installed("cpu")
        assert told(can, CPU, disable_log_stats=False, max_logprobs=3, block_size=32) == ()
        if can.version.release >= (0, 32):
            assert len(told(can, CPU, max_logprobs=-3, block_size=-32)) == 2
        told_at_once = told(can, CPU, disable_log_stat=False, max_logprobs="3", compilation_config={"custom_opps": []})
        assert told_at_once == (
            f"{KEY}.disable_log_stat=false: vLLM {can.version} has no such argument; did you mean disable_log_stats?",
            f"{KEY}.max_logprobs=3: for vLLM {can.version} must be a whole number",
            f"{KEY}.compilation_config.custom_opps=[]: for vLLM {can.version} it has no such field; "
            "did you mean custom_ops?",
        )

    def test_its_own_defaults_are_no_problem(self) -> None:
        """Literal defaults in its sources pass their own annotations: the reading of annotations holds."""
        import ast

        can = of_installed("cpu")
        assert can.kinds is not None
        found = can.kinds.sources.annotations("engine.arg_utils", "EngineArgs")
        plain = {n: d.value for n, (_, d, _) in found.items() if isinstance(d, ast.Constant)}
        assert len(plain) > 10
        for name, default in plain.items():
            kind = can.kinds.of(name)
            assert kind is None or list(kind.problems(default, name)) == []
