"""One vLLM engine in one Ray actor. Tokens go in, tokens come out; text never does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

import ray

from workers.protocol import RolloutBlock, SequenceMeta, split
from workers.rollout.spec import GenerateRequest, GenerateStats, ReplicaStatus, RolloutSpec, UpdateReport
from workers.rollout.vllm.arguments import plan_engine
from workers.rollout.vllm.capabilities import of_installed
from workers.rollout.vllm.engine import Engine
from workers.rollout.vllm.outputs import to_block
from workers.shortage import OutOfMemory, out_of_memory_explained, peak_resident_bytes

CONCURRENCY_GROUPS = {"control": 1}
"""Ray's threads besides the one that generates and takes weights."""


class VllmReplica:
    """Generates, takes weights, gives memory back: one such call at a time; those marked "control" at any time."""

    def __init__(self, spec: RolloutSpec, rank: int) -> None:
        self._rank = rank
        self._device = spec.device
        self._version = -1
        self._unstarted: OutOfMemory | None = None
        can = of_installed(spec.device)
        try:
            with self._explained("start"):
                self._engine = Engine(plan_engine(spec, can, os.environ, rank=rank), can)
        except OutOfMemory as error:
            self._unstarted = error  # of what is raised here, Ray passes on the words alone

    def ping(self) -> int:
        """Returns once the engine is up; this replica's rank. Raises OutOfMemory if there was no memory for it."""
        if self._unstarted is not None:
            raise self._unstarted
        return self._rank

    def generate(self, request: GenerateRequest) -> Iterator[RolloutBlock | SequenceMeta | GenerateStats]:
        """Samples responses; streams them as they finish: a block, what the driver needs of it, and so on; statistics
        at the end. A block holds all responses of its prompts."""
        started = time.perf_counter()
        tokens = 0
        with self._explained("generate"):
            self._engine.rpc("tandem_begin_call")
            self._engine.rpc("tandem_seed", request.seed + self._rank)
            prompts = split(request.token_ids, request.lengths)
            for finished in self._engine.generate(prompts, request.groups.tolist(), request.sampling):
                block = to_block(finished, self._version)
                tokens += len(block.response_ids)
                yield block
                yield block.meta
        yield GenerateStats(time.perf_counter() - started, tokens, *self._peaks())

    def begin_update(self) -> None:
        """Gets ready for new weights."""
        with self._explained("begin_update"):
            self._engine.rpc("tandem_begin_update")

    def load_bucket(self, messages: list[dict[str, object]]) -> None:
        """Loads one bucket of parameters from all training ranks."""
        with self._explained("load_bucket"):
            self._engine.rpc("tandem_load_bucket", messages)

    def finish_update(self, version: int) -> UpdateReport:
        """Checks the update, forgets cached prefixes and takes the new version number."""
        with self._explained("finish_update"):
            reports: list[dict[str, int]] = self._engine.rpc("tandem_finish_update")
            self._engine.forget_prefixes()
        self._version = version
        return UpdateReport(reports[0]["parameters"], reports[0]["checksum"] if len(reports) == 1 else None)

    def sleep(self, keep_weights: bool = False) -> dict[str, int]:
        """Gives device memory back, as far as the plan's sleep level says; returns how much will be taken again by
        waking "weights" and "kv_cache", in bytes of one device. keep_weights: in host memory, for no sync follows."""
        return self._engine.sleep(1 if keep_weights and self._engine.sleep_level else None)

    def wake(self, tag: str) -> int:
        """Takes memory again for "weights" or "kv_cache"; returns the bytes then in use on the device, by everyone."""
        with self._explained("wake"):
            self._engine.rpc("tandem_begin_call")
            self._engine.wake(tag)
        return self._peaks()[1]

    @ray.method(concurrency_group="control")
    def status(self) -> ReplicaStatus:
        """What the engine is doing."""
        return self._engine.status()

    @ray.method(concurrency_group="control")
    def pause(self) -> None:
        """Holds the generate call under way."""
        self._engine.pause()

    @ray.method(concurrency_group="control")
    def resume(self) -> None:
        """Lets it go on."""
        self._engine.resume()

    @ray.method(concurrency_group="control")
    def abort(self) -> None:
        """Ends it; what has finished is given out."""
        self._engine.abort()

    def _peaks(self) -> tuple[int, int]:
        """Bytes since the last tandem_begin_call: this replica's own, and those of everyone on its device."""
        own, everyone = (max(column) for column in zip(*self._engine.rpc("tandem_peaks"), strict=True))
        process = peak_resident_bytes()
        return own or process, everyone or process

    def _explained(self, call: str) -> AbstractContextManager[None]:
        return out_of_memory_explained(call, "", self._memory)

    def _memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        from workers.memory import meter_of  # torch must not be there before the engine has set its environment

        return meter_of(self._device).memory()
