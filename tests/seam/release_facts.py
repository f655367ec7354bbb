"""What the seam takes for granted about each vLLM release, and how a release's own sources show it.

The ranges are written down by hand; `shown_by` looks into the sources. Where both disagree, one of them is wrong. The
capabilities that the seam found are compared with the ranges too (test_contract.py).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass

from packaging.version import Version
from release_sources import Release, comes_before

ARGUMENTS = "engine/arg_utils.py"
LLM = "entrypoints/llm.py"
CPU_WORKER = "v1/worker/cpu_worker.py"
V1_WORKER, V0_WORKER = "v1/worker/gpu_worker.py", "worker/worker.py"
MOE = ("model_executor/layers/fused_moe/unquantized_fused_moe_method.py", "model_executor/layers/fused_moe/layer.py")


@dataclass(frozen=True)
class Fact:
    """One row. since, before: the releases it holds for. capability: the field of Capabilities that says the same."""

    name: str
    since: str
    before: str | None
    shown_by: Callable[[Release], bool]
    capability: str = ""

    def holds(self, version: Version) -> bool:
        """What the table says."""
        return Version(self.since) <= version and (self.before is None or version < Version(self.before))


def uses_v0(release: Release) -> bool:
    """Whether an engine with an extension of ours is the old one, on a GPU."""
    by_default = "os.getenv('VLLM_USE_V1', '0')" in release.text("envs.py").replace('"', "'")
    code = release.code("EngineArgs._is_v1_supported_oracle", ARGUMENTS)
    return by_default or "feature_name='--worker-extension-cls'" in code


def argument(name: str) -> Callable[[Release], bool]:
    """Whether EngineArgs has a field."""
    return lambda release: name in release.fields("EngineArgs", ARGUMENTS)


def sampling_field(name: str) -> Callable[[Release], bool]:
    """Whether SamplingParams has a field."""
    return lambda release: name in release.fields("SamplingParams", "sampling_params.py")


def _takes(method: str, parameter: str) -> Callable[[Release], bool]:
    return lambda release: parameter in (release.parameters(method, LLM) or ((), 0))[0]


def _has(path: str) -> Callable[[Release], bool]:
    return lambda release: bool(release.files(path))


def _refuses_collisions(release: Release) -> bool:
    names = ("WorkerWrapperBase.init_worker", "v1/worker/worker_base.py", "worker/worker_base.py")
    return "assert not hasattr(worker_class, attr)" in release.code(*names)


def _v0_samples_what_it_reports(release: Release) -> bool:
    code = release.code("Sampler.forward", "model_executor/layers/sampler.py")
    return comes_before(code, "logits.div_(sampling_tensors.temperatures", "_apply_top_k_top_p(") and comes_before(
        code, "_apply_top_k_top_p(", "torch.log_softmax("
    )


def _v1_samples_what_it_reports(release: Release) -> bool:
    sample = release.code("Sampler.sample", "v1/sample/sampler.py")
    native = release.code("TopKTopPSampler.forward_native", "v1/sample/ops/topk_topp_sampler.py")
    return (
        comes_before(sample, "self.apply_temperature(", "processed_logprobs = self.topk_topp_sampler(")
        and comes_before(native, "apply_top_k_top_p(", "logits.log_softmax(")
        and "logits_to_return" in native
    )


def _reported_logprobs_are_sampled(release: Release) -> bool:
    return _v0_samples_what_it_reports(release) if uses_v0(release) else _v1_samples_what_it_reports(release)


def _second_runner_does_too(release: Release) -> bool:
    """Model runner V2 has a sampler of its own."""
    path = "v1/worker/gpu/sample/sampler.py"
    if not release.files(path):
        return False
    text, call = re.sub(r"\s+", " ", release.text(path)), release.code("Sampler.__call__", path)
    chosen = r"== 'processed_logprobs'|in \('processed_logprobs', 'processed_logits'\)|in PROCESSED_LOGPROBS_MODES"
    scaled = re.search(r"apply_penalties_and_temperature\(|states\.apply_temperature\(|apply_temperature\(", text)
    return bool(scaled and re.search(chosen, call) and "processed_logits" in call)


def _keeps_buffers(release: Release) -> bool:
    """Saved by sleep, put back by wake_up, in every GPU worker there is."""
    workers = [path for path in (V1_WORKER, V0_WORKER) if release.files(path)]
    return all(
        "model.named_buffers()" in release.code("Worker.sleep", path)
        and "buffer.data.copy_(" in release.code("Worker.wake_up", path)
        for path in workers
    )


def _makes_experts_anew(release: Release) -> bool:
    code = release.code("UnquantizedFusedMoEMethod.process_weights_after_loading", *MOE)
    return "layer.w13_weight = torch.nn.Parameter(self._maybe_pad_weight(" in code


def _makes_trtllm_experts_anew(release: Release) -> bool:
    code = release.code("UnquantizedFusedMoEMethod.process_weights_after_loading", *MOE)
    code += release.code("UnquantizedFusedMoEMethod._setup_kernel", *MOE)
    return "layer.w13_weight = Parameter(w13_weights_shuffled" in code


def _resumes_at_once(release: Release) -> bool:
    code = release.code("EngineCore.wake_up", "v1/engine/core.py")
    return "self.resume_scheduler()" in code and "model_executor.is_sleeping" not in code


def _checks_world_size(release: Release) -> bool:
    code = release.code("initialize_model_parallel", "distributed/parallel_state.py")
    return "if world_size != tensor_model_parallel_size * pipeline_model_parallel_size:\n        raise" in code


def _launcher_takes_rank_for_local_rank(release: Release) -> bool:
    code = release.code("ExecutorWithExternalLauncher._init_executor", "executor/uniproc_executor.py")
    return "local_rank = rank" in code


def _iterator_empties_cache(release: Release) -> bool:
    code = release.code("pt_weights_iterator", "model_executor/model_loader/weight_utils.py")
    return "torch.cuda.empty_cache()" in code


def _bears_expandable_segments(release: Release) -> bool:
    code = release.text("device_allocator/cumem.py")
    return "expandable_was_enabled" in code and 'assert "expandable_segments:True" not in conf' not in code


def _refuses_expandable_segments(release: Release) -> bool:
    return 'assert "expandable_segments:True" not in conf' in release.text("device_allocator/cumem.py")


def _packs_linear_weights(release: Release) -> bool:
    return release.parameters("dispatch_cpu_unquantized_gemm", "model_executor/layers/utils.py") == (
        ["layer", "remove_weight"],
        2,
    )


def _aborts_whole_groups_v0(release: Release) -> bool:
    """V0: whether aborting a request of n > 1 ends its n parts."""
    return "seq_id_to_seq_group" in release.code("LLMEngine.abort_request", "engine/llm_engine.py")


def _refuses_sleep_on_cpu(release: Release) -> bool:
    text = "".join(release.text(path) for path in release.files("config.py") + release.files("config/*.py"))
    return "Sleep mode is not supported on current platform" in text


def _refuses_to_start_without_preload(release: Release) -> bool:
    code = release.code("CPUWorker.init_device", CPU_WORKER)
    return bool(re.search(r"raise RuntimeError\(f?'\{name\} is not found in LD_PRELOAD", code))


def _reads_cache_bytes(release: Release) -> bool:
    return "cache_config.kv_cache_memory_bytes" in release.text(CPU_WORKER)


def _knows_nobind(release: Release) -> bool:
    return "'nobind'" in "".join(
        ast.unparse(release.tree(path)) for path in (CPU_WORKER, "utils/ompmultiprocessing.py")
    )


def _compilation_field(name: str) -> Callable[[Release], bool]:
    paths = ("config/compilation.py", "config.py", "config/__init__.py")
    return lambda release: name in release.fields("CompilationConfig", *paths)


def _looks_whether_a_step_has_ended(release: Release) -> bool:
    return "batch_queue[-1][0].done()" in release.code("EngineCore.step_with_batch_queue", "v1/engine/core.py")


def _combines_kernels(release: Release) -> bool:
    path = "config/compilation.py"
    if not release.files(path):
        return False
    code = release.code("CompilationConfig.__post_init__", path)
    return "'combo_kernels' not in self.inductor_compile_config" in code and "['benchmark_combo_kernel']" in code


def _draws_seeds_with_numpy(release: Release) -> bool:
    """Model runner V2 draws the seed of a request from NumPy's generator."""
    paths = release.files("v1/worker/gpu/**/*states.py")
    return any("seed = np.random.randint(" in release.text(path) for path in paths)


def _knows_its_own_sampling_defaults(release: Release) -> bool:
    text = "".join(release.text(path) for path in release.files("config.py") + release.files("config/*.py"))
    return bool(re.search(r'generation_config in [({]"auto", "vllm"[)}]', text))


def _environment(name: str) -> Callable[[Release], bool]:
    return lambda release: f'"{name}":' in release.text("envs.py")


def _counts_what_others_hold(release: Release) -> bool:
    code = release.code("Worker.determine_available_memory", "v1/worker/gpu_worker.py")
    return "peak_memory += non_torch_allocations" in code


FACTS = (
    Fact("the worker takes an extension", "0.8.0", None, argument("worker_extension_cls"), "worker_extension"),
    Fact("an extension must not take a worker's name", "0.8.0", None, _refuses_collisions),
    Fact("V0 runs, with our extension on a GPU", "0.7.0", "0.8.2", uses_v0, "v0_engine"),
    Fact("V1 runs on a CPU", "0.9.1", None, _has(CPU_WORKER)),
    Fact("V0 is there", "0.7.0", "0.11.0", _has(V0_WORKER)),
    Fact("VLLM_USE_V1 is read", "0.7.0", "0.11.1", _environment("VLLM_USE_V1")),
    Fact("VLLM_ATTENTION_BACKEND is read", "0.7.0", "0.15.0", _environment("VLLM_ATTENTION_BACKEND")),
    Fact("log-probs can be asked for as processed", "0.10.0", None, argument("logprobs_mode")),
    Fact("V0 reports what it samples", "0.7.0", "0.11.0", _v0_samples_what_it_reports),
    Fact("V1 can report what it samples", "0.10.2", None, _v1_samples_what_it_reports),
    Fact("model runner V2 can report what it samples", "0.12.0", None, _second_runner_does_too),
    Fact("level-2 sleep keeps buffers", "0.8.5", None, _keeps_buffers, "sleep_keeps_buffers"),
    Fact("expert weights are made anew", "0.8.2", "0.8.5", _makes_experts_anew),
    Fact("expert weights are made anew for TRTLLM kernels", "0.16.0", "0.20.0", _makes_trtllm_experts_anew),
    Fact("a partial wake resumes the scheduler", "0.17.0", "0.24.0", _resumes_at_once, "wakes_scheduler_early"),
    Fact("memory wakes by tag", "0.8.3", None, _takes("LLM.wake_up", "tags"), "wake_tags"),
    Fact("sleep takes a mode", "0.17.0", None, _takes("LLM.sleep", "mode")),
    Fact("sleep mode is refused on a CPU", "0.8.5", None, _refuses_sleep_on_cpu),
    Fact("patch: world-size check", "0.7.0", "0.7.3", _checks_world_size, "needs_patches"),
    Fact("patch: local rank", "0.7.0", "0.7.3", _launcher_takes_rank_for_local_rank, "needs_patches"),
    Fact("patch: empty_cache", "0.7.0", "0.7.3", _iterator_empties_cache, "needs_patches"),
    Fact("sleep mode bears expandable segments", "0.20.1", None, _bears_expandable_segments, "expandable_segments"),
    Fact("sleep mode asserts against expandable segments", "0.8.0", "0.20.1", _refuses_expandable_segments),
    Fact("log-probs come in flat lists", "0.12.0", None, sampling_field("flat_logprobs"), "flat_logprobs"),
    Fact("layer by layer reload", "0.16.0", None, _has("model_executor/model_loader/reload"), "layerwise_reload"),
    Fact("CPU packs linear weights by a function", "0.10.2", None, _packs_linear_weights, "cpu_gemm_dispatch"),
    Fact("kinds of CUDA graphs are chosen", "0.10.1", None, _compilation_field("cudagraph_mode"), "cudagraph_mode"),
    Fact("the attention backend is an argument", "0.13.0", None, argument("attention_backend"), "attention_argument"),
    Fact("model runner V2 draws seeds with NumPy", "0.12.0", None, _draws_seeds_with_numpy),
    Fact("a step waits by chance", "0.10.2", "0.23.0", _looks_whether_a_step_has_ended, "schedules_by_time"),
    Fact("kernels are combined by timing them", "0.11.1", None, _combines_kernels, "combo_kernels"),
    Fact("FlashInfer's kernels are chosen by timing them", "0.16.0", None, argument("enable_flashinfer_autotune")),
    Fact("the cache has a size in bytes", "0.10.2", None, argument("kv_cache_memory_bytes")),
    Fact("others make the cache smaller", "0.7.0", "0.9.1", _counts_what_others_hold, "cache_counts_others"),
    Fact("a CPU's cache has a size in bytes", "0.20.0", None, _reads_cache_bytes, "cpu_cache_bytes"),
    Fact("a CPU needs LD_PRELOAD", "0.18.0", "0.19.0", _refuses_to_start_without_preload, "cpu_wants_preload"),
    Fact("unbound CPU threads are called nobind", "0.11.1", None, _knows_nobind),
    Fact(
        'generation_config="vllm" is no path', "0.8.0", None, _knows_its_own_sampling_defaults, "own_sampling_defaults"
    ),
    Fact("metrics can be read", "0.9.0", None, lambda r: r.parameters("LLM.get_metrics", LLM) == ([], 0)),
    Fact("V0 aborts n > 1", "0.8.0", "0.11.0", _aborts_whole_groups_v0),
)

COMBINED: dict[str, Callable[[Version], object]] = {
    "processed_logprobs": lambda version: version < Version("0.8.2") or version >= Version("0.10.0"),
    "cpu_unbound": lambda version: "nobind" if version >= Version("0.11.1") else "all",
    "sampled_logprobs": lambda version: version < Version("0.8.2") or version >= Version("0.10.2"),
}
"""Capabilities that follow from two rows, by the engine that runs, or are no yes or no."""
