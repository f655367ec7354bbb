"""Subcommand rollout: our whole path of generation against a bare loop around `LLM.generate`, in turn, on one engine.

Ours: driver, Ray, the replica, its step loop, conversion to blocks, and back. Bare: `LLM.generate` with the same
prompts and the same SamplingParams in the replica's process, its outputs thrown away. Both count generated tokens.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table
from subcommands import Command

from workers.protocol import IntArray
from workers.rollout.pool import PoolLimits, RolloutPool
from workers.rollout.spec import GenerateRequest, SamplingSpec
from workers.rollout.vllm.outputs import sampling_parameters, wants_logprobs
from workers.rollout.vllm.replica import CONCURRENCY_GROUPS, VllmReplica
from workers.rollout.vllm.selfcheck import tiny_spec, write_tiny_model

from . import floors, launch

LOGPROBS: tuple[Literal["none", "monitor", "all"], ...] = ("none", "monitor", "all")
WARMUP = 1


class BareReplica(VllmReplica):
    """A replica that can also be asked to generate the plain way."""

    def generate_bare(self, prompts: Sequence[IntArray], sampling: SamplingSpec) -> tuple[float, int]:
        """`LLM.generate` with these prompts; (seconds, tokens generated)."""
        without, with_logprobs = sampling_parameters(sampling, flat_logprobs=self._engine._can.flat_logprobs)
        parameters = [with_logprobs if wants_logprobs(sampling, group) else without for group in range(len(prompts))]
        asked: Any = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        began = time.perf_counter()
        outputs = self._engine._llm.generate(asked, parameters, use_tqdm=False)
        seconds = time.perf_counter() - began
        return seconds, sum(len(c.token_ids) for output in outputs for c in output.outputs)


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    launch.add_common_options(parser, out="rollout.json")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each, in turn (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a call (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="responses to each (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens of each response (default: %(default)s)")


def run(options: Namespace, console: Console) -> int:
    """Measure, write, show and check."""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    try:
        with tempfile.TemporaryDirectory() as directory:
            write_tiny_model(Path(directory))
            measured = _measure(Path(directory), device, options)
    finally:
        ray.shutdown()
    result = {
        "benchmark": "rollout",
        "command": f"python scripts/benchmark.py rollout --rounds {options.rounds} --prompts {options.prompts} "
        f"--samples {options.samples} --tokens {options.tokens}",
        "commit": launch.commit(),
        "machine": launch.machine(),
        "device": device,
        "load_before": os.getloadavg()[0],
        "logprobs": measured,
        "smallest_ratio": min(entry["ratio"] for entry in measured.values()),
    }
    lacking = floors.missed(result, floors.ROLLOUT)
    launch.write(options.out, result | {"missed": lacking})
    console.print(table(result))
    for line in lacking:
        console.print(f"[red]missed:[/red] {line}")
    return 1 if lacking and options.check else 0


def _measure(model: Path, device: Literal["cpu", "cuda"], options: Namespace) -> dict[str, dict[str, Any]]:
    spec = replace(tiny_spec(model, device), max_num_seqs=256, max_num_batched_tokens=8192)
    spec = replace(spec, max_model_len=16 + options.tokens, kv_cache_gb=1.0)

    actors: list[Any] = []

    def start(rank: int) -> Any:
        actors.append(ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(BareReplica).remote(spec, rank))
        return actors[-1]

    limits = PoolLimits(
        timeout_s=600, update_timeout_s=60, startup_timeout_s=300, hang_timeout_s=60, max_replacements=0
    )
    pool = RolloutPool(start, 1, limits=limits, observe=lambda reading: None)
    pool.ready()
    pool.update(lambda group: None)  # the weights are those of the checkpoint
    return {logprobs: _compare(pool, actors[0], logprobs, options) for logprobs in LOGPROBS}


def _compare(pool: RolloutPool, actor: Any, logprobs: Any, options: Namespace) -> dict[str, Any]:
    """Both ways in turn; the ratio is that of the fastest rounds, as whatever else the machine does only slows."""
    sampling = SamplingSpec(
        n=options.samples,
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
        max_tokens=options.tokens,
        ignore_eos=True,
        stop_token_ids=(),
        logprobs=logprobs,
    )
    ours, bare = [], []
    for round_number in range(WARMUP + options.rounds):
        prompts = _prompts(options.prompts, round_number)
        seconds, tokens = ray.get(actor.generate_bare.remote(prompts, sampling))
        bare.append(tokens / seconds)
        ours.append(_through_the_pool(pool, _prompts(options.prompts, -1 - round_number), sampling))
    ours, bare = ours[WARMUP:], bare[WARMUP:]
    return {
        "ours_tokens_per_second": max(ours),
        "bare_tokens_per_second": max(bare),
        "ratio": max(ours) / max(bare),
        "ratio_of_medians": statistics.median(ours) / statistics.median(bare),
        "ours": ours,
        "bare": bare,
    }


def _through_the_pool(pool: RolloutPool, prompts: Sequence[IntArray], sampling: SamplingSpec) -> float:
    began = time.perf_counter()
    blocks = [ray.get(chunk.block) for chunk in pool.generate([generate_request(prompts, sampling)])]
    return sum(len(block.response_ids) for block in blocks) / (time.perf_counter() - began)


def generate_request(prompts: Sequence[IntArray], sampling: SamplingSpec) -> GenerateRequest:
    """All prompts, for one replica."""
    return GenerateRequest(
        token_ids=np.concatenate(prompts),
        lengths=np.array([len(p) for p in prompts], dtype=np.int32),
        groups=np.arange(len(prompts), dtype=np.int32),
        sampling=sampling,
        seed=1,
    )


def _prompts(count: int, seed: int) -> list[IntArray]:
    """Different ones for every call, so that no cache of prefixes helps one of the two."""
    generator = np.random.default_rng(seed + 1000)
    return [generator.integers(2, 256, size=12, dtype=np.int32) for _ in range(count)]


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    shown = Table(title="Rollout: tokens per second, fastest round", title_justify="left", box=None)
    for name in ("sampler log-probs", "ours", "LLM.generate", "ratio"):
        shown.add_column(name, justify="left" if name == "sampler log-probs" else "right")
    for logprobs, entry in result["logprobs"].items():
        ours, bare = entry["ours_tokens_per_second"], entry["bare_tokens_per_second"]
        shown.add_row(logprobs, f"{ours:,.0f}", f"{bare:,.0f}", f"{entry['ratio']:.1%}")
    return shown


COMMAND = Command("rollout", "our path of generation against a bare LLM.generate", add_options, run)
