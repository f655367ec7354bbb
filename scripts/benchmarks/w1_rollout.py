"""w1 --rollout-only: the generation of a step with replicas alone, with CUDA graphs and without, one after the other.

The program's own replicas and path of generation, with weights that vLLM makes up; a new engine for each of the two,
the one before being gone, and new prompts for every round.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from trainer.actors import start_replicas
from trainer.tracking.rollout import RolloutLog
from workers.rollout.pool import RolloutPool
from workers.rollout.spec import MONITOR_EVERY, SamplingSpec

from .measure import Result
from .rollout import generate_request
from .w1_model import random_prompts
from .w1_parts import bench
from .w1_work import Shape, overrides

ROUNDS = 2
WARMUP_TOKENS = 64
LogProbs = Literal["monitor", "all"]
LOGPROBS: dict[LogProbs, str] = {"monitor": f"1 in {MONITOR_EVERY}", "all": "all"}


def measure(shape: Shape, model: Path, options: Namespace, console: Console) -> Result:
    """Seconds and tokens per second of each engine, and what CUDA graphs bring.

    time_saved: the share of eager's seconds that graphs do not take. throughput_gained: by which share of eager's
    tokens per second graphs make more. None where there is but one engine.
    """
    if not torch.cuda.is_available():
        console.print("no GPU, so no CUDA graphs: eager only")
    kinds = ("eager",) if options.eager or not torch.cuda.is_available() else ("graphs", "eager")
    engines = {kind: _measure(shape, overrides(shape, model, options), options, kind) for kind in kinds}
    return {"engines": engines, "graphs_over_eager": {asked: speed_up(engines, asked) for asked in LOGPROBS}}


def speed_up(engines: Mapping[str, Result], asked: LogProbs) -> dict[str, float | None]:
    """time_saved and throughput_gained. engines: with graphs and eager, in this order, or one of them."""
    seconds = [engine["logprobs"][asked]["median"] for engine in engines.values() if asked in engine["logprobs"]]
    if len(seconds) < 2:
        return {"time_saved": None, "throughput_gained": None}
    graphs, eager = seconds
    return {"time_saved": 1 - graphs / eager, "throughput_gained": eager / graphs - 1}


def _measure(shape: Shape, settings: list[str], options: Namespace, kind: str) -> Result:
    """One engine, from its start until it is gone."""
    settings = [*settings, f"actor_rollout_ref.rollout.enforce_eager={kind == 'eager'}"]
    kinds: tuple[LogProbs, ...] = ("all",) if options.sampler_logprobs else tuple(LOGPROBS)
    with bench(f"w1-rollout-{kind}", settings) as prepared:
        log = RolloutLog(Path(prepared.cfg.trainer.default_local_dir))
        began = time.perf_counter()
        pool = start_replicas(prepared.cfg, prepared.inputs, prepared.cluster, log)
        try:
            pool.ready()
            startup_seconds = time.perf_counter() - began
            pool.update(lambda group: None)  # generates with the weights that it has
            load = Load(pool, shape, prepared.sampling)
            found = {asked: load.measure(asked, options.rounds or ROUNDS) for asked in kinds}
        finally:
            pool.close()
    return {"startup_seconds": startup_seconds, "logprobs": found}


class Load:
    """The generation of steps, through a pool of one replica. No two rounds have a prompt in common, which a cache of
    prefixes would answer."""

    def __init__(self, pool: RolloutPool, shape: Shape, sampling: SamplingSpec) -> None:
        self._pool = pool
        self._shape = shape
        self._sampling = sampling
        self._seeds = count()

    def measure(self, asked: LogProbs, rounds: int) -> Result:
        """Seconds of each round, after a short one, with the sampler's log-probs of `asked`."""
        sampling = replace(self._sampling, logprobs=asked)
        self._round(replace(sampling, max_tokens=min(WARMUP_TOKENS, sampling.max_tokens)))
        seconds = [self._round(sampling) for _ in range(rounds)]
        tokens = self._shape.num_responses * sampling.max_tokens
        return {"median": median(seconds), "rounds": seconds, "tokens_per_second": tokens / median(seconds)}

    def _round(self, sampling: SamplingSpec) -> float:
        prompts = random_prompts(self._shape, self._shape.prompts, next(self._seeds))
        request = generate_request(list(prompts), sampling)
        began = time.perf_counter()
        tokens = sum(int(chunk.meta.response_length.sum()) for chunk in self._pool.generate([request]))
        seconds = time.perf_counter() - began
        assert tokens == self._shape.num_responses * sampling.max_tokens, f"{tokens} tokens"
        return seconds


def table(result: Result) -> Table:
    """The result for people."""
    shown = Table(title=f"W1, {result['shape']}: generation alone", title_justify="left", box=None)
    for name in ("engine", "sampler log-probs", "seconds", "tokens per second", "start-up"):
        shown.add_column(name, justify="left" if name in ("engine", "sampler log-probs") else "right")
    for kind, engine in result["engines"].items():
        for asked, found in engine["logprobs"].items():
            rate, startup = f"{found['tokens_per_second']:,.0f}", f"{engine['startup_seconds']:.0f} s"
            shown.add_row(kind, LOGPROBS[asked], f"{found['median']:.2f}", rate, startup)
    for asked, over in result["graphs_over_eager"].items():
        if over["time_saved"] is not None:
            saved, gained = f"{over['time_saved']:.1%} saved", f"{over['throughput_gained']:.1%} more"
            shown.add_row("graphs over eager", LOGPROBS[asked], saved, gained, style="bold")
    return shown
