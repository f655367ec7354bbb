"""One vLLM engine in one Ray actor.

The engine runs in this process (`LLM` without vLLM's multiprocessing): for batches that are handed over whole, this is
the fastest and leanest way, and one import less. Tokens go in, tokens come out; text never does.
"""

from __future__ import annotations

import logging
import os
import resource
import time
import warnings
from collections.abc import Sequence
from typing import Any

from workers.protocol import RolloutBlock, SequenceMeta, Trajectory, split
from workers.rollout.spec import MONITOR_EVERY, GenerateRequest, GenerateStats, RolloutSpec, SamplingSpec, UpdateReport

EXTENSION = "workers.rollout.vllm.extension.TandemWorkerExtension"


class VllmReplica:
    """Generates, takes weights, gives memory back. All methods are called by the driver, one at a time."""

    def __init__(self, spec: RolloutSpec, rank: int) -> None:
        self._spec = spec
        self._rank = rank
        self._version = -1
        _environment(spec)
        from vllm import LLM

        self._llm = LLM(**_engine_arguments(spec, rank))

    def ping(self) -> int:
        """Returns once the engine is up; this replica's rank."""
        return self._rank

    def generate(self, request: GenerateRequest) -> tuple[tuple[SequenceMeta, GenerateStats], RolloutBlock]:
        """Samples responses. Returns (what the driver needs, the tokens); the second stays in the object store."""
        started = time.perf_counter()
        self._rpc("tandem_seed", request.seed + self._rank)
        prompts = [tuple(p.tolist()) for p in split(request.token_ids, request.lengths)]
        parameters = [_sampling(request.sampling, int(g)) for g in request.groups]
        outputs = self._llm.generate(_as_vllm_prompts(prompts), parameters, use_tqdm=False)
        trajectories = [
            self._trajectory(int(group), sample, prompt, completion)
            for group, prompt, output in zip(request.groups, prompts, outputs, strict=True)
            for sample, completion in enumerate(sorted(output.outputs, key=lambda c: c.index))
        ]
        block = RolloutBlock.collate(trajectories)
        stats = GenerateStats(time.perf_counter() - started, len(block.response_ids), self._peak_bytes())
        return (block.meta, stats), block

    def begin_update(self) -> None:
        """Gets ready for new weights."""
        self._rpc("tandem_begin_update")

    def load_bucket(self, messages: list[dict[str, object]]) -> None:
        """Loads one bucket of parameters from all training ranks."""
        self._rpc("tandem_load_bucket", messages)

    def finish_update(self, version: int) -> UpdateReport:
        """Checks the update, forgets cached prefixes and takes the new version number."""
        reports: list[dict[str, int]] = self._rpc("tandem_finish_update")
        self._llm.reset_prefix_cache()
        self._version = version
        return UpdateReport(reports[0]["parameters"], reports[0]["checksum"] if len(reports) == 1 else None)

    def sleep(self) -> None:
        """Gives device memory back, as far as `sleep_level` says."""
        if self._spec.sleep_level:
            self._llm.sleep(level=self._spec.sleep_level)

    def wake(self, tag: str) -> None:
        """Takes memory again for "weights" or "kv_cache"."""
        if self._spec.sleep_level:
            self._llm.wake_up(tags=[tag])

    def _trajectory(self, group: int, sample: int, prompt: tuple[int, ...], completion: Any) -> Trajectory:
        logprobs = None
        if completion.logprobs is not None:
            logprobs = tuple(
                step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
            )
        return Trajectory(
            group=group,
            sample=sample,
            prompt_ids=prompt,
            response_ids=tuple(completion.token_ids),
            finish_reason=completion.finish_reason,
            weight_version=self._version,
            logprobs=logprobs,
        )

    def _rpc(self, method: str, *args: object) -> Any:
        return self._llm.collective_rpc(method, args=args)

    def _peak_bytes(self) -> int:
        device = max(self._rpc("tandem_peak_bytes"))
        return device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _as_vllm_prompts(prompts: Sequence[tuple[int, ...]]) -> Any:
    """The one form of token prompt that every vLLM takes."""
    return [{"prompt_token_ids": list(p)} for p in prompts]


def _environment(spec: RolloutSpec) -> None:
    """What vLLM and its libraries read at import."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings speak of what is done here on purpose
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # no Triton on CPU is no news
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if spec.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec.devices))
    else:
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)  # more threads than cores spin against each other
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling a log-prob helper costs 3 to 14 s
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _engine_arguments(spec: RolloutSpec, rank: int) -> dict[str, Any]:
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
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "worker_extension_cls": EXTENSION,
        "disable_log_stats": True,
    }
    if spec.kv_cache_gb is not None:
        arguments["kv_cache_memory_bytes"] = int(spec.kv_cache_gb * (1 << 30))
    if spec.device == "cuda":
        arguments["gpu_memory_utilization"] = spec.gpu_memory_utilization
        arguments["enable_sleep_mode"] = spec.sleep_level > 0
    return arguments | dict(spec.engine_kwargs)


def _sampling(spec: SamplingSpec, group: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    wanted = spec.logprobs == "all" or (spec.logprobs == "monitor" and group % MONITOR_EVERY == 0)
    return SamplingParams(
        n=spec.n,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        max_tokens=spec.max_tokens,
        ignore_eos=spec.ignore_eos,
        stop_token_ids=list(spec.stop_token_ids),
        logprobs=0 if wanted else None,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
