"""From our settings to arguments of the installed vLLM: what it gets, what was chosen for it, what it lacks.

Pure: decided from the capabilities before anything starts, on the driver, and again in each replica. No vLLM import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from workers.determinism import ENVIRONMENT
from workers.rollout.spec import RolloutSpec, SamplingSpec
from workers.rollout.vllm.capabilities import OLDEST, Capabilities, first_with
from workers.rollout.vllm.passthrough import ROLLOUT, passed_through_problems

EXTENSION = "workers.rollout.vllm.extension.TandemWorkerExtension"
WORKER = "workers.rollout.vllm.worker.TandemWorker"


@dataclass(frozen=True)
class EnginePlan:
    """How one replica's engine is built.

    arguments: of `LLM`. environment: variables to set, None: to remove, before vLLM is imported.
    sleep_level: 0, 1 or 2. choices: (what, value, why), for people. notices: what was changed to fit.
    problems: what cannot work on this version, each with the remedy; nothing is started if there is one.
    """

    arguments: dict[str, Any]
    environment: dict[str, str | None]
    sleep_level: int
    choices: tuple[tuple[str, str, str], ...]
    notices: tuple[str, ...]
    problems: tuple[str, ...]


def plan_engine(spec: RolloutSpec, can: Capabilities, environ: Mapping[str, str], *, rank: int = 0) -> EnginePlan:
    """The engine of replica `rank` with these settings, on a vLLM with these capabilities."""
    fitted = [*_fit_cache(spec, can), *_fit_environment(spec, can, environ), *_fit_determinism(spec, can)]
    arguments = _arguments(spec, can, rank)
    variables = _environment(spec, can, environ)
    for fit in fitted:
        arguments |= fit.arguments
        variables |= fit.environment
    told = [fit.text for fit in fitted if fit.text]
    notices, problems = (told, []) if spec.auto_adapt else ([], told)
    problems += [*_impossible(spec, can), *passed_through_problems(spec, can, level=sleep_level(spec))]
    problems += _undoes_determinism(spec, can)
    return EnginePlan(
        arguments=arguments | dict(spec.engine_kwargs),
        environment=variables,
        sleep_level=sleep_level(spec),
        choices=tuple(_choices(spec, can)),
        notices=tuple(notices),
        problems=tuple(problems),
    )


def fit_sampling(
    spec: SamplingSpec, can: Capabilities, *, auto_adapt: bool
) -> tuple[SamplingSpec, str | None, str | None]:
    """Sampling this version can do: (settings, notice, problem).

    Before 0.10.2, V1 reports log-probs from ahead of temperature, top-k and top-p, so they are not those of the
    distribution that was sampled; comparing with them, or learning from them, would be silently wrong.
    """
    plain = spec.temperature in (0.0, 1.0) and spec.top_p == 1.0 and spec.top_k <= 0
    if spec.logprobs == "none" or plain or (can.sampled_logprobs and can.processed_logprobs):
        return spec, None, None
    needed = first_with("processed_logprobs_are_sampled")
    why = (
        f"vLLM {can.version} reports log-probs from before temperature and truncation, and with "
        f"{ROLLOUT}.temperature={spec.temperature}, top_p={spec.top_p}, top_k={spec.top_k} they are not the sampler's; "
        f"vLLM {needed} and later have them"
    )
    if spec.logprobs == "monitor" and auto_adapt:
        return replace(spec, logprobs="none"), f"{why}. The sampler is not asked, and mismatch/* is not measured", None
    return spec, None, f"{why}. Set {ROLLOUT}.calculate_log_probs=false, or temperature=1, or install vLLM {needed}"


def sleep_level(spec: RolloutSpec) -> int:
    """0: stays awake, 1: weights move to host memory, 2: weights are dropped and come back with the next sync."""
    if spec.device == "cpu" or not spec.free_cache_engine:
        return 0
    return 2 if spec.sleep_level == "auto" else spec.sleep_level


@dataclass(frozen=True)
class _Fit:
    """One adaptation. text: where it changes what was asked for; without auto_adapt that is refused."""

    text: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str | None] = field(default_factory=dict)


def _arguments(spec: RolloutSpec, can: Capabilities, rank: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": spec.model_path,
        "tokenizer": spec.tokenizer_path,
        "skip_tokenizer_init": True,
        "trust_remote_code": spec.trust_remote_code,
        "hf_overrides": dict(spec.override_config),
        "tensor_parallel_size": spec.tensor_parallel_size,
        "distributed_executor_backend": "mp" if spec.tensor_parallel_size > 1 else "uni",
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "max_num_batched_tokens": max(spec.max_num_batched_tokens, spec.max_model_len),
        "enforce_eager": spec.enforce_eager or spec.device == "cpu",
        "enable_prefix_caching": spec.enable_prefix_caching,
        "enable_chunked_prefill": spec.enable_chunked_prefill,
        "load_format": spec.load_format,
        "seed": spec.seed + rank,
        "disable_log_stats": True,
    }
    if can.worker_extension:
        arguments["worker_extension_cls"] = EXTENSION
    else:
        arguments["worker_cls"] = WORKER
    if can.own_sampling_defaults:
        arguments["generation_config"] = "vllm"  # sampling defaults come from us, not from the checkpoint
    if "logprobs_mode" in can.engine_arguments:
        arguments["logprobs_mode"] = "processed_logprobs"
    if spec.device == "cuda":
        arguments["gpu_memory_utilization"] = spec.gpu_memory_utilization
        arguments["enable_sleep_mode"] = sleep_level(spec) > 0
    return arguments


def _environment(spec: RolloutSpec, can: Capabilities, environ: Mapping[str, str]) -> dict[str, str | None]:
    variables: dict[str, str | None] = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the replica's own process
        "VLLM_USE_V1": None,  # each version's default is the engine that works
    }
    defaults = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # its warnings speak of what is done here on purpose
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if spec.device == "cuda":
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec.devices))
    else:
        variables["OMP_NUM_THREADS"] = str(spec.threads)  # more threads than cores spin against each other
        defaults["TORCHDYNAMO_DISABLE"] = "1"  # compiling a log-prob helper costs 3 to 14 s
        defaults["VLLM_CPU_OMP_THREADS_BIND"] = can.cpu_unbound
        if can.cpu_wants_preload:  # for speed; it looks at the words alone
            variables["LD_PRELOAD"] = ":".join(filter(None, [environ.get("LD_PRELOAD"), "libtcmalloc", "libiomp"]))
    return variables | {name: environ.get(name, value) for name, value in defaults.items()}


def _fit_cache(spec: RolloutSpec, can: Capabilities) -> Iterator[_Fit]:
    size = spec.kv_cache_gb
    if size is None:
        return
    if can.cpu_cache_bytes if spec.device == "cpu" else "kv_cache_memory_bytes" in can.engine_arguments:
        yield _Fit("", arguments={"kv_cache_memory_bytes": int(size * (1 << 30))})
    elif spec.device == "cpu":
        whole = math.ceil(size)
        text = f"{ROLLOUT}.kv_cache_gb={size}: vLLM {can.version} takes whole GiB on a CPU; {whole} is used"
        yield _Fit("" if whole == size else text, environment={"VLLM_CPU_KVCACHE_SPACE": str(whole)})


def _fit_environment(spec: RolloutSpec, can: Capabilities, environ: Mapping[str, str]) -> Iterator[_Fit]:
    """What variables of the user's mean on this version."""
    leftover = environ.get("VLLM_USE_V1")
    if leftover is not None and not spec.auto_adapt:  # else diagnose tells, which the program runs at its start
        yield _Fit(f"VLLM_USE_V1={leftover}: Tandem runs the default engine of vLLM {can.version}; unset VLLM_USE_V1")
    backend = environ.get("VLLM_ATTENTION_BACKEND")
    read_by_vllm = "VLLM_ATTENTION_BACKEND" in can.environment
    if backend and not read_by_vllm and can.attention_argument and "attention_backend" not in spec.engine_kwargs:
        text = f"VLLM_ATTENTION_BACKEND={backend}: vLLM {can.version} does not read it; passed on as attention_backend"
        yield _Fit(text, arguments={"attention_backend": backend})
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        expandable = "expandable_segments:true" in environ.get(name, "").lower().replace(" ", "")
        if expandable and sleep_level(spec) and not can.expandable_segments:
            text = (
                f"{name}={environ[name]} is not given to vLLM {can.version}: sleep mode does not work with "
                f"expandable segments before {first_with('expandable_segments_with_sleep')}"
            )
            yield _Fit(text, environment={name: None})


def _fit_determinism(spec: RolloutSpec, can: Capabilities) -> Iterator[_Fit]:
    """What vLLM decides by the clock, or by what is free at the moment.

    Batches need not be invariant: requests come in one order, so in every run the same ones are computed together.
    """
    if not spec.deterministic:
        return
    if can.schedules_by_time:
        yield _Fit("", arguments={"async_scheduling": False})
    if spec.device == "cpu":
        return
    yield _Fit("", environment=dict(ENVIRONMENT))
    if "VLLM_ALLREDUCE_USE_SYMM_MEM" in can.environment:
        yield _Fit("", environment={"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"})  # the switch adds up, as with NVLS
    if "enable_flashinfer_autotune" in can.engine_arguments:
        yield _Fit("", arguments={"enable_flashinfer_autotune": False})
    if can.combo_kernels:  # as vLLM has it, but for their timing
        combined = {"combo_kernels": True, "benchmark_combo_kernel": False}
        yield _Fit("", arguments={"compilation_config": {"inductor_compile_config": combined}})
    if spec.kv_cache_gb is None:
        yield _Fit(
            f"trainer.full_determinism=true: {ROLLOUT}.kv_cache_gb=null sizes the KV cache by what is free when vLLM "
            "starts, and where it runs short (rollout/preemptions above 0) its size decides what is computed together; "
            f"set {ROLLOUT}.kv_cache_gb"
        )


def _undoes_determinism(spec: RolloutSpec, can: Capabilities) -> Iterator[str]:
    """Pass-through arguments that would take the place of those which determinism needs, and are not the same."""
    needed = {name: value for fit in _fit_determinism(spec, can) for name, value in fit.arguments.items()}
    for name, value in spec.engine_kwargs.items():
        if name in needed and not _includes(value, needed[name]):
            yield (
                f"{ROLLOUT}.engine_kwargs.vllm.{name}={value}: with trainer.full_determinism=true another run may "
                f"compute other bits; take it out, or set {' and '.join(_leaves(name, needed[name]))}"
            )


def _includes(value: object, needed: object) -> bool:
    """Whether it is the same, or a mapping that has all of the other."""
    if isinstance(needed, Mapping):
        return isinstance(value, Mapping) and all(_includes(value.get(name), needed[name]) for name in needed)
    return value == needed


def _leaves(name: str, value: object) -> Iterator[str]:
    """Each value of nested mappings, as a user sets it."""
    if isinstance(value, Mapping):
        for inner, held in value.items():
            yield from _leaves(f"{name}.{inner}", held)
    else:
        yield f"{name}={json.dumps(value)}"


def _impossible(spec: RolloutSpec, can: Capabilities) -> Iterator[str]:
    """Settings of ours that this version has no way to honour."""
    if can.version < OLDEST:
        yield f"vLLM {can.version} is older than {OLDEST}, the first that Tandem adapts to; install a later one"
    if spec.kv_cache_gb is not None and spec.device == "cuda" and "kv_cache_memory_bytes" not in can.engine_arguments:
        yield (
            f"{ROLLOUT}.kv_cache_gb={spec.kv_cache_gb}: vLLM {can.version} sizes its cache by a share of the GPU only; "
            f"set {ROLLOUT}.kv_cache_gb=null and gpu_memory_utilization, or install vLLM 0.10.2 or later"
        )


def _choices(spec: RolloutSpec, can: Capabilities) -> Iterator[tuple[str, str, str]]:
    """For people: what this version runs with."""
    yield "engine", "V0" if can.v0_engine else "V1", f"vLLM {can.version}, in the replica's own process"
    if spec.device == "cpu" or spec.enforce_eager:
        reason = "there are none on a CPU" if spec.device == "cpu" else "enforce_eager=true"
        yield "CUDA graphs", "off", reason
    else:
        yield "CUDA graphs", "on", "vLLM's own choice of mode" if can.cudagraph_mode else "decoding only"
    backend = spec.engine_kwargs.get("attention_backend", "vLLM's own choice")
    yield "attention backend", str(backend), "by device and model" if backend == "vLLM's own choice" else "as asked"
    mode = "of what is sampled" if can.sampled_logprobs else "before temperature and truncation"
    yield "sampler log-probs", mode, "flat lists" if can.flat_logprobs else "an object per token"
    yield "sleep level", str(sleep_level(spec)), _sleep_reason(spec, can)
    yield "prefix cache", "on" if spec.enable_prefix_caching else "off", "emptied at every weight sync"
    if can.needs_patches:
        yield "run-time patches", "3", "parallel state, local rank, weight iterator: as 0.7.0 to 0.7.2 need them"


def _sleep_reason(spec: RolloutSpec, can: Capabilities) -> str:
    level = sleep_level(spec)
    if level == 0:
        return "a CPU has no memory to give back" if spec.device == "cpu" else "as asked"
    if level == 2 and not can.sleep_keeps_buffers:
        return "buffers that this version loses are saved and restored"
    return "weights come back with the sync" if level == 2 else "weights wait in host memory"
