"""What the installed vLLM can do: the one table of differences between its versions.

A capability is read from the version's own fields and signatures, so a release that changed nothing needs no entry.
`_SINCE` and `_BETWEEN` hold the few cases where the meaning changed under an unchanged signature: there, and only
there, versions are compared. tests/seam/test_contract.py holds every entry against the sources of every minor release.
Standard library and `packaging` only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

from workers.rollout.vllm import installed
from workers.rollout.vllm.installed import Sources
from workers.rollout.vllm.kinds import Kinds

try:
    from packaging.version import Version
except ImportError:  # diagnose runs where nothing is installed
    if not TYPE_CHECKING:
        from pip._vendor.packaging.version import Version

OLDEST, NEWEST = Version("0.7.0"), Version("0.33.0")
"""The releases whose sources were read; later ones work by capability, with a notice."""

_SINCE = {
    "v1_engine": "0.8.0",  # before: V0 is the default, and V1 has no RPC
    "v1_engine_on_cpu": "0.9.1",
    "generation_config_vllm": "0.8.0",  # before: "vllm" would be the name of a directory
    "processed_logprobs_are_sampled": "0.10.2",  # before: taken ahead of temperature, top-k and top-p
    "sleep_keeps_buffers": "0.8.5",  # before: level 2 loses them (rotary tables)
    "expandable_segments_with_sleep": "0.20.1",
    "launcher_free_of_patches": "0.7.3",
}
_BETWEEN = {
    "extension_falls_back_to_v0": ("0.8.0", "0.8.2"),
    "scheduler_wakes_with_weights": ("0.17.0", "0.24.0"),
}

Device = Literal["cpu", "cuda"]

_CPU_WORKER, _CPU_THREADS = "v1.worker.cpu_worker", "utils.ompmultiprocessing"


@dataclass(frozen=True)
class Capabilities:
    """What one version of vLLM offers.

    version: as installed. engine_arguments, sampling_fields: names that `LLM` and `SamplingParams` take.
    own_sampling_defaults: generation_config="vllm" keeps the checkpoint's sampling defaults out; earlier versions take
    them only if asked to. environment: variables it reads. v0_engine: the default engine is the one before V1.
    processed_logprobs: log-probs can be asked for as processed; sampled_logprobs: and then are those of the
    distribution that was sampled, temperature and truncation applied. flat_logprobs: lists instead of an object per
    token. worker_extension: methods can be mixed into its worker; else a worker class of ours is needed.
    wake_tags: weights and KV cache can wake apart. wakes_scheduler_early: waking the weights alone lets requests run.
    sleep_keeps_buffers: level 2 restores what is not a parameter.
    layerwise_reload: weights that were laid out anew can be loaded.
    cpu_gemm_dispatch: the CPU build packs linear weights, by a function that can be replaced. cpu_unbound: its word for
    threads that are not bound to cores. cpu_cache_bytes: it takes the cache's size in bytes, not in GiB only.
    cpu_wants_preload: it does not start unless LD_PRELOAD names an allocator and an OpenMP library.
    cudagraph_mode: kinds of CUDA graphs can be chosen. attention_argument: the attention backend is an argument.
    needs_patches: the three patches that 0.7 asks for. expandable_segments: sleep mode bears that allocator setting.
    schedules_by_time: with asynchronous scheduling, what is computed together hangs on whether a step has ended yet.
    combo_kernels: it lets inductor combine kernels where that measures faster.
    cache_counts_others: what other processes hold of a GPU when it starts makes its KV cache that much smaller.
    kinds: what values its engine arguments take; None: not looked at.
    """

    version: Version
    engine_arguments: frozenset[str]
    sampling_fields: frozenset[str]
    own_sampling_defaults: bool
    environment: frozenset[str]
    v0_engine: bool
    processed_logprobs: bool
    sampled_logprobs: bool
    flat_logprobs: bool
    worker_extension: bool
    wake_tags: bool
    wakes_scheduler_early: bool
    sleep_keeps_buffers: bool
    layerwise_reload: bool
    cpu_gemm_dispatch: bool
    cpu_unbound: str
    cpu_cache_bytes: bool
    cpu_wants_preload: bool
    cudagraph_mode: bool
    attention_argument: bool
    needs_patches: bool
    expandable_segments: bool
    schedules_by_time: bool
    combo_kernels: bool
    cache_counts_others: bool = False
    kinds: Kinds | None = field(default=None, compare=False, repr=False)

    @property
    def known(self) -> bool:
        """Whether this release, or one between the oldest and the newest whose sources were read."""
        return self.version >= OLDEST and self.version.release[:2] <= NEWEST.release[:2]


@cache
def of_installed(device: Device) -> Capabilities:
    """The installed version's, on this kind of device. Raises ValueError if there is none, or it cannot be read."""
    found = installed.find()
    if found is None:
        raise ValueError("vLLM is not installed here; bash scripts/install.sh, or python scripts/diagnose.py")
    return look_up(found.sources, Version(found.version), device)


def look_up(sources: Sources, version: Version, device: Device = "cuda") -> Capabilities:
    """The capabilities of a version with these sources, on this kind of device.

    Raises ValueError if they are not those of a vLLM.
    """
    arguments = sources.fields("engine.arg_utils", "EngineArgs")
    sampling = sources.fields("sampling_params", "SamplingParams")
    if not arguments or not sampling:
        raise ValueError(f"vLLM {version}: EngineArgs or SamplingParams is missing; the installation is not whole")
    v1 = _since("v1_engine_on_cpu" if device == "cpu" else "v1_engine", version)
    v0 = not v1 or _between("extension_falls_back_to_v0", version)
    return Capabilities(
        version=version,
        engine_arguments=arguments,
        sampling_fields=sampling,
        own_sampling_defaults=_since("generation_config_vllm", version),
        environment=sources.variables("envs"),
        v0_engine=v0,
        processed_logprobs=v0 or "logprobs_mode" in arguments,
        sampled_logprobs=v0 or _since("processed_logprobs_are_sampled", version),
        flat_logprobs="flat_logprobs" in sampling,
        worker_extension="worker_extension_cls" in arguments,
        wake_tags="tags" in (sources.parameters("entrypoints.llm", "LLM.wake_up") or ()),
        wakes_scheduler_early=_between("scheduler_wakes_with_weights", version),
        sleep_keeps_buffers=_since("sleep_keeps_buffers", version),
        layerwise_reload=sources.has_module("model_executor.model_loader.reload"),
        cpu_gemm_dispatch="dispatch_cpu_unquantized_gemm" in sources.names("model_executor.layers.utils"),
        cpu_unbound="nobind" if any("nobind" in sources.text(m) for m in (_CPU_WORKER, _CPU_THREADS)) else "all",
        cpu_cache_bytes="kv_cache_memory_bytes" in sources.text(_CPU_WORKER),
        cpu_wants_preload='raise RuntimeError(\n                    f"{name} is not found in LD_PRELOAD'
        in sources.text(_CPU_WORKER),
        cudagraph_mode="cudagraph_mode" in _compilation_fields(sources),
        attention_argument="attention_backend" in arguments,
        needs_patches=not _since("launcher_free_of_patches", version),
        expandable_segments=_since("expandable_segments_with_sleep", version),
        schedules_by_time="batch_queue[-1][0].done()" in sources.text("v1.engine.core"),
        combo_kernels='inductor_compile_config["combo_kernels"]' in sources.text("config.compilation"),
        cache_counts_others="total_allocated_bytes - torch_allocated_bytes" in sources.text("v1.worker.gpu_worker"),
        kinds=Kinds(sources),
    )


def first_with(capability: str) -> str:
    """The version in which a capability of `_SINCE` began, for messages."""
    return _SINCE[capability]


def _compilation_fields(sources: Sources) -> frozenset[str]:
    return sources.fields("config.compilation", "CompilationConfig") | sources.fields("config", "CompilationConfig")


def _since(what: str, version: Version) -> bool:
    return version >= Version(_SINCE[what])


def _between(what: str, version: Version) -> bool:
    first, end = _BETWEEN[what]
    return Version(first) <= version < Version(end)
