"""From settings to the arguments of one version, and what is refused on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from packaging.version import Version

from workers.determinism import ENVIRONMENT
from workers.rollout.spec import RolloutSpec, SamplingSpec
from workers.rollout.vllm.arguments import EXTENSION, WORKER, EnginePlan, fit_sampling, plan_engine, sleep_level
from workers.rollout.vllm.capabilities import Capabilities

ROLLOUT = "actor_rollout_ref.rollout"
SPEC = RolloutSpec(
    model_path="/m",
    tokenizer_path="/t",
    trust_remote_code=False,
    override_config={"a": 1},
    device="cuda",
    devices=(2, 3),
    tensor_parallel_size=2,
    dtype="bfloat16",
    max_model_len=4096,
    max_num_seqs=256,
    max_num_batched_tokens=1024,
    enforce_eager=False,
    enable_prefix_caching=True,
    enable_chunked_prefill=True,
    gpu_memory_utilization=0.6,
    kv_cache_gb=None,
    free_cache_engine=True,
    sleep_level="auto",
    load_format="dummy",
    seed=5,
    threads=1,
)
CPU = replace(SPEC, device="cpu", devices=(), tensor_parallel_size=1, kv_cache_gb=1.5)
SAMPLING = SamplingSpec(
    n=1, temperature=0.7, top_p=1.0, top_k=-1, max_tokens=8, ignore_eos=False, stop_token_ids=(), logprobs="monitor"
)
NEW = Capabilities(
    version=Version("0.32.0"),
    engine_arguments=frozenset({"kv_cache_memory_bytes", "logprobs_mode", "attention_backend", "async_scheduling"}),
    sampling_fields=frozenset({"flat_logprobs"}),
    own_sampling_defaults=True,
    environment=frozenset(),
    v0_engine=False,
    processed_logprobs=True,
    sampled_logprobs=True,
    flat_logprobs=True,
    worker_extension=True,
    wake_tags=True,
    wakes_scheduler_early=False,
    sleep_keeps_buffers=True,
    layerwise_reload=True,
    cpu_gemm_dispatch=True,
    cpu_unbound="nobind",
    cpu_cache_bytes=True,
    cpu_wants_preload=False,
    cudagraph_mode=True,
    attention_argument=True,
    needs_patches=False,
    expandable_segments=True,
    schedules_by_time=False,
    combo_kernels=True,
)
OLD = replace(
    NEW,
    version=Version("0.9.2"),
    engine_arguments=frozenset(),
    environment=frozenset({"VLLM_ATTENTION_BACKEND"}),
    processed_logprobs=False,
    sampled_logprobs=False,
    flat_logprobs=False,
    attention_argument=False,
    expandable_segments=False,
    combo_kernels=False,
    cpu_unbound="all",
    cpu_cache_bytes=False,
)
SEVEN = replace(
    OLD,
    version=Version("0.7.2"),
    v0_engine=True,
    sampled_logprobs=True,
    processed_logprobs=True,
    own_sampling_defaults=False,
    worker_extension=False,
    wake_tags=False,
    sleep_keeps_buffers=False,
    needs_patches=True,
)


def plan(spec: RolloutSpec, can: Capabilities = NEW, **environ: str) -> EnginePlan:
    return plan_engine(spec, can, environ)


def test_a_gpu_replica() -> None:
    made = plan_engine(SPEC, NEW, {}, rank=3)
    assert (
        made.arguments
        | {
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "mp",
            "seed": 8,
            "enable_sleep_mode": True,
            "gpu_memory_utilization": 0.6,
            "worker_extension_cls": EXTENSION,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "enforce_eager": False,
            "max_num_batched_tokens": 4096,
        }
        == made.arguments
    )
    assert made.environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert made.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert (made.notices, made.problems) == ((), ())


def test_what_keeps_the_checkpoints_sampling_defaults_out_is_a_path_before_0_8() -> None:
    assert "generation_config" not in plan(SPEC, SEVEN).arguments


def test_a_version_before_the_first_is_refused() -> None:
    (problem,) = plan(SPEC, replace(SEVEN, version=Version("0.6.6"))).problems
    assert "0.6.6 is older than 0.7.0" in problem


def test_a_cpu_replica() -> None:
    made = plan(CPU)
    assert made.arguments["enforce_eager"] and made.arguments["kv_cache_memory_bytes"] == 3 << 29
    assert "enable_sleep_mode" not in made.arguments and "gpu_memory_utilization" not in made.arguments
    assert made.environment["OMP_NUM_THREADS"] == "1"
    assert made.environment["TORCHDYNAMO_DISABLE"] == "1"
    assert plan(CPU, TORCHDYNAMO_DISABLE="0").environment["TORCHDYNAMO_DISABLE"] == "0"


def test_a_cpu_build_that_wants_libraries_preloaded_sees_their_names() -> None:
    assert "LD_PRELOAD" not in plan(CPU, LD_PRELOAD="/x.so").environment
    wants = replace(NEW, cpu_wants_preload=True)
    assert plan(CPU, wants, LD_PRELOAD="/x.so").environment["LD_PRELOAD"] == "/x.so:libtcmalloc:libiomp"
    assert plan(CPU, wants).environment["LD_PRELOAD"] == "libtcmalloc:libiomp"
    assert "LD_PRELOAD" not in plan(SPEC, wants).environment


def test_threads_are_left_unbound_in_each_versions_word() -> None:
    assert plan(CPU).environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert plan(CPU, OLD).environment["VLLM_CPU_OMP_THREADS_BIND"] == "all"


def test_a_version_without_extensions_gets_a_worker_of_ours() -> None:
    arguments = plan(SPEC, SEVEN).arguments
    assert arguments["worker_cls"] == WORKER
    assert not {"worker_extension_cls", "logprobs_mode"} & set(arguments)


@pytest.mark.parametrize(
    ("change", "level"),
    [({}, 2), ({"sleep_level": 1}, 1), ({"free_cache_engine": False}, 0), ({"sleep_level": 0}, 0)],
)
def test_sleep_level(change: dict[str, Any], level: int) -> None:
    spec = replace(SPEC, **change)
    assert sleep_level(spec) == level
    assert plan(spec).arguments["enable_sleep_mode"] == (level > 0)
    assert sleep_level(replace(CPU, **change)) == 0


def test_cache_size_in_whole_gib_where_bytes_are_not_taken() -> None:
    made = plan(CPU, OLD)
    assert made.environment["VLLM_CPU_KVCACHE_SPACE"] == "2" and "kv_cache_memory_bytes" not in made.arguments
    assert made.notices == (f"{ROLLOUT}.kv_cache_gb=1.5: vLLM 0.9.2 takes whole GiB on a CPU; 2 is used",)
    assert plan(replace(CPU, kv_cache_gb=2.0), OLD).notices == ()


def test_without_auto_adapt_what_does_not_fit_is_refused() -> None:
    made = plan(replace(CPU, auto_adapt=False), OLD)
    assert made.notices == () and "whole GiB" in made.problems[0]
    assert plan(replace(CPU, auto_adapt=False)).problems == ()


def test_cache_size_on_a_gpu_before_it_could_be_given() -> None:
    (problem,) = plan(replace(SPEC, kv_cache_gb=4.0), OLD).problems
    assert f"{ROLLOUT}.kv_cache_gb=4.0" in problem and "0.10.2" in problem and "gpu_memory_utilization" in problem


@pytest.mark.parametrize("can", [SEVEN, OLD, NEW])
@pytest.mark.parametrize("value", ["0", "1"])
def test_leftover_choice_of_engine_is_removed(value: str, can: Capabilities) -> None:
    """diagnose tells; each version's default engine is the one that works."""
    assert plan(SPEC, can, VLLM_USE_V1=value).environment["VLLM_USE_V1"] is None
    assert "unset VLLM_USE_V1" in plan(replace(SPEC, auto_adapt=False), can, VLLM_USE_V1=value).problems[0]


def test_attention_variable_becomes_an_argument_where_it_is_not_read() -> None:
    made = plan(SPEC, VLLM_ATTENTION_BACKEND="FLASHINFER")
    assert made.arguments["attention_backend"] == "FLASHINFER" and "VLLM_ATTENTION_BACKEND" in made.notices[0]
    asked = plan(replace(SPEC, engine_kwargs={"attention_backend": "FLASH_ATTN"}), VLLM_ATTENTION_BACKEND="FLASHINFER")
    assert asked.arguments["attention_backend"] == "FLASH_ATTN"
    assert plan(SPEC, OLD, VLLM_ATTENTION_BACKEND="XFORMERS").notices == ()


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_and_sleep(name: str) -> None:
    value = "max_split_size_mb:64, expandable_segments: True"
    made = plan(SPEC, OLD, **{name: value})
    assert made.environment[name] is None and "0.20.1" in made.notices[0]
    assert name not in plan(SPEC, NEW, **{name: value}).environment
    assert name not in plan(replace(SPEC, free_cache_engine=False), OLD, **{name: value}).environment


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swap_space", "vLLM 0.32.0 has no such argument; vLLM 0.7.0 to 0.17.1 had it"),
        ("sleep_mode_backend", "vLLM 0.33.0 and later have it"),
        ("asinc_scheduling", "did you mean async_scheduling?"),
        ("zzzzz", "take it out"),
        ("max_num_seqs", f"set {ROLLOUT}.max_num_seqs instead"),
        ("kv_cache_memory_bytes", f"set {ROLLOUT}.kv_cache_gb instead"),
        ("hf_overrides", "set actor_rollout_ref.model.override_config instead"),
        ("logprobs_mode", "Tandem needs this argument as it sets it"),
    ],
)
def test_arguments_of_another_version_are_refused(name: str, message: str) -> None:
    (problem,) = plan(replace(SPEC, engine_kwargs={name: 1})).problems
    assert problem.startswith(f"{ROLLOUT}.engine_kwargs.vllm.{name}=1: ") and message in problem


def test_arguments_that_the_version_has_are_passed_through() -> None:
    made = plan(replace(SPEC, engine_kwargs={"async_scheduling": True}))
    assert made.problems == () and made.arguments["async_scheduling"] is True


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_is_left_to_the_clock(device: Any) -> None:
    spec = replace(SPEC if device == "cuda" else CPU, deterministic=True, kv_cache_gb=2.0)
    by_time = replace(NEW, schedules_by_time=True)
    assert plan(spec, by_time).arguments["async_scheduling"] is False
    assert "async_scheduling" not in plan(spec).arguments
    assert "async_scheduling" not in plan(replace(spec, deterministic=False), by_time).arguments


def test_a_gpu_decides_nothing_by_measuring() -> None:
    spec = replace(SPEC, deterministic=True, kv_cache_gb=2.0)
    arguments, variables = frozenset({"enable_flashinfer_autotune"}), frozenset({"VLLM_ALLREDUCE_USE_SYMM_MEM"})
    made = plan(spec, replace(NEW, engine_arguments=NEW.engine_arguments | arguments, environment=variables))
    assert made.arguments["enable_flashinfer_autotune"] is False
    compiled = made.arguments["compilation_config"]["inductor_compile_config"]
    assert compiled == {"combo_kernels": True, "benchmark_combo_kernel": False}
    assert made.environment | ENVIRONMENT | {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"} == made.environment
    assert (made.notices, made.problems) == ((), ())
    for other in (plan(replace(spec, kv_cache_gb=None), OLD), plan(replace(spec, deterministic=False))):
        assert not {"enable_flashinfer_autotune", "compilation_config"} & set(other.arguments)
    for other in (replace(spec, deterministic=False), replace(CPU, deterministic=True)):
        assert not set(ENVIRONMENT) & set(plan(other).environment)


COMBINED = {"inductor_compile_config": {"combo_kernels": True, "benchmark_combo_kernel": False}}


@pytest.mark.parametrize(
    ("kwargs", "remedy"),
    [
        ({"async_scheduling": True}, "or set async_scheduling=false"),
        ({"compilation_config": 3}, "compilation_config.inductor_compile_config.benchmark_combo_kernel=false"),
        ({"compilation_config": {"cudagraph_mode": "FULL"}}, "inductor_compile_config.combo_kernels=true and "),
        ({"async_scheduling": False, "compilation_config": {"cudagraph_mode": "FULL"} | COMBINED}, None),
    ],
)
def test_determinism_is_not_undone_by_what_is_passed_through(kwargs: dict[str, Any], remedy: str | None) -> None:
    can = replace(NEW, schedules_by_time=True, engine_arguments=NEW.engine_arguments | {"compilation_config"})
    spec = replace(SPEC, deterministic=True, kv_cache_gb=2.0, engine_kwargs=kwargs)
    assert plan(replace(spec, deterministic=False), can).problems == ()
    problems = plan(spec, can).problems
    assert len(problems) == (remedy is not None)
    for problem in problems:
        (name, value), *_ = kwargs.items()
        assert problem.startswith(f"{ROLLOUT}.engine_kwargs.vllm.{name}={value}: with trainer.full_determinism=true")
        assert remedy is not None and remedy in problem


def test_a_measured_cache_is_said_to_weaken_determinism() -> None:
    spec = replace(SPEC, deterministic=True)
    (notice,) = plan(spec).notices
    assert notice.startswith(f"trainer.full_determinism=true: {ROLLOUT}.kv_cache_gb=null")
    assert plan(replace(spec, auto_adapt=False)).problems == (notice,)


def test_several_problems_at_once() -> None:
    assert len(plan(replace(SPEC, kv_cache_gb=1.0, engine_kwargs={"a": 1, "seed": 2}), OLD).problems) == 3


@pytest.mark.parametrize(
    ("can", "change", "adapted"),
    [
        (NEW, {}, False),
        (SEVEN, {}, False),
        (OLD, {}, True),
        (OLD, {"temperature": 1.0}, False),
        (OLD, {"temperature": 1.0, "top_p": 0.9}, True),
        (OLD, {"temperature": 1.0, "top_k": 10}, True),
        (OLD, {"logprobs": "none"}, False),
        (replace(OLD, processed_logprobs=True, version=Version("0.10.0")), {}, True),
    ],
)
def test_log_probs_that_are_not_the_samplers(can: Capabilities, change: dict[str, Any], adapted: bool) -> None:
    asked = replace(SAMPLING, **change)
    sampling, notice, problem = fit_sampling(asked, can, auto_adapt=True)
    assert problem is None
    assert sampling == (replace(asked, logprobs="none") if adapted else asked)
    assert (notice is not None) == adapted
    assert (fit_sampling(asked, can, auto_adapt=False)[2] is not None) == adapted


def test_log_probs_that_were_asked_for_and_cannot_be_had_are_refused() -> None:
    _, notice, problem = fit_sampling(replace(SAMPLING, logprobs="all"), OLD, auto_adapt=True)
    assert notice is None and problem is not None
    assert "0.10.2" in problem and f"{ROLLOUT}.calculate_log_probs=false" in problem


def test_choices_name_what_runs() -> None:
    rows = {what: (value, why) for what, value, why in plan(SPEC, SEVEN).choices}
    assert rows["engine"][0] == "V0"
    assert rows["sleep level"] == ("2", "buffers that this version loses are saved and restored")
    assert rows["run-time patches"][0] == "3"
    assert "run-time patches" not in {what for what, _, _ in plan(SPEC).choices}
