"""One vLLM engine in this process: `LLM` is built, and its engine stepped by us.

Stepping it ourselves is what `LLM.generate` does inside, in every version; it lets finished requests leave at once and
lets another thread hold, end or watch the work between two steps, without any of vLLM's own ways of doing that, which
differ from release to release.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np

from workers.imports import big_imports
from workers.protocol import IntArray
from workers.rollout.spec import ReplicaStatus, SamplingSpec
from workers.rollout.vllm import patches
from workers.rollout.vllm.arguments import EnginePlan
from workers.rollout.vllm.capabilities import Capabilities
from workers.rollout.vllm.outputs import sampling_parameters, wants_logprobs

CHUNK_S = 0.2
"""Finished requests leave together, at most this often, seconds."""

_PLAIN = (str, int, float, bytes, bool, type(None))

TAGS = ("weights", "kv_cache")
"""Memory that sleeps, in the order in which it wakes."""

Finished = tuple[int, IntArray, Any]
"""Group number, prompt ids, vLLM's RequestOutput."""


class Engine:
    """A vLLM engine built to a plan. One thread generates and takes weights; pause, abort and status are for others."""

    def __init__(self, plan: EnginePlan, can: Capabilities) -> None:
        self._can = can
        self.sleep_level = plan.sleep_level
        self._asleep: set[str] = set()
        _set_environment(plan)
        with _callers_generators_kept():
            with big_imports():
                from vllm import LLM

            if can.needs_patches:
                patches.apply()
            self._llm = LLM(**plan.arguments)
        self._engine = cast(Any, self._llm.llm_engine)
        if ".v1." not in type(self._engine).__module__:  # 0.8 to 0.10 fall back to V0 by themselves
            self._can = can = replace(can, v0_engine=True)
        # V0 asserts that it can sleep; V1 takes the call as it is where there is no memory to give back
        self._sleeps = not can.v0_engine or bool(plan.arguments.get("enable_sleep_mode"))
        config = self._engine.get_model_config() if can.v0_engine else self._engine.model_config
        self._max_len, self._vocab = int(config.max_model_len), int(config.get_vocab_size())
        self._runs = threading.Event()
        self._runs.set()
        self._aborted = threading.Event()
        self._pending: dict[str, tuple[int, IntArray]] = {}
        self._scheduler = _scheduler(self._engine, can)
        self._parents = _parents(self._engine)
        self._calls = self._steps = self._tokens = self._preemptions = self._told = 0

    def generate(
        self, prompts: Sequence[IntArray], groups: Sequence[int], sampling: SamplingSpec
    ) -> Iterator[list[Finished]]:
        """Requests as they finish, in bunches. groups: a number for each prompt, given back with its output.

        Raises ValueError for a prompt the model cannot take, RuntimeError if the engine is not awake.
        """
        if self._asleep:
            raise RuntimeError(f"generate was called while asleep: {', '.join(sorted(self._asleep))} must wake first")
        for prompt in prompts:
            self._check_prompt(prompt)
        self._aborted.clear()
        self._submit(prompts, groups, sampling)
        try:
            yield from self._run()
        finally:
            if self._pending:
                self._drop_all()

    def rpc(self, method: str, *args: object) -> Any:
        """Calls a method of the extension on every worker; a list of their results.

        Raises TypeError for arguments that do not cross vLLM's RPC in every version, tensors above all.
        """
        _check_plain(args, method)
        return self._llm.collective_rpc(method, args=args)

    def sleep(self, level: int | None = None) -> dict[str, int]:
        """Gives memory back; level None: the plan's. Level 0 does nothing.

        Returns the bytes that waking each tag will take on a device, the most of any worker's.
        """
        level = self.sleep_level if level is None else level
        if not level:
            return dict.fromkeys(TAGS, 0)
        before = self.rpc("tandem_memory")
        if level == 2 and not self._can.sleep_keeps_buffers:
            self.rpc("tandem_save_buffers")
        if self._sleeps:
            self._llm.sleep(level=level)
        self._asleep = set(TAGS)
        return given_back(before, self.rpc("tandem_memory"), by_tag=self._can.wake_tags)

    def wake(self, tag: str) -> None:
        """Takes memory again for "weights" or "kv_cache"; nothing happens if it has it."""
        if tag not in self._asleep:
            return
        tags = {tag} if self._can.wake_tags else set(self._asleep)  # all at once where there are no tags
        if self._sleeps:
            self._llm.wake_up(**({"tags": [tag]} if self._can.wake_tags else {}))
        self._asleep -= tags
        if tag == "weights" and not self._can.sleep_keeps_buffers:
            self.rpc("tandem_restore_buffers")

    def forget_prefixes(self) -> None:
        """Empties the prefix cache: what it holds was computed with other weights.

        Raises RuntimeError if vLLM keeps it, as it does while requests use it.
        """
        if self._llm.reset_prefix_cache() is False:  # some versions answer nothing
            raise RuntimeError("vLLM did not empty its prefix cache, which was computed with other weights")

    def pause(self) -> None:
        """Holds generation before its next step, until `resume`."""
        self._runs.clear()

    def resume(self) -> None:
        """Ends a pause."""
        self._runs.set()

    def abort(self) -> None:
        """Ends the generate call under way: what has finished is given out, the rest is dropped."""
        self._aborted.set()
        self._runs.set()

    def status(self) -> ReplicaStatus:
        """What the engine is doing; cheap, and answers while it generates."""
        scheduler = self._scheduler
        v1 = scheduler is not None and not self._can.v0_engine
        # within a step, a request is in none of the places for a moment: a counter does not go back for that
        self._told = max(self._told, self._tokens + self._num_unfinished_tokens())
        return ReplicaStatus(
            pid=os.getpid(),
            busy=bool(self._pending) and self._runs.is_set(),
            steps=self._steps,
            running=len(scheduler.running) if scheduler else len(self._pending),
            waiting=len(scheduler.waiting) if scheduler else 0,
            cache_use=float(scheduler.kv_cache_manager.usage) if v1 else float("nan"),
            preemptions=self._preemptions,
            tokens=self._told,
        )

    def _check_prompt(self, prompt: IntArray) -> None:
        if len(prompt) >= self._max_len:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens leaves no room to answer in max_model_len={self._max_len}; "
                "raise actor_rollout_ref.rollout.max_model_len, or lower data.max_prompt_length"
            )
        if len(prompt) == 0 or int(prompt.min()) < 0 or int(prompt.max()) >= self._vocab:
            raise ValueError(
                f"a prompt has {'no tokens' if len(prompt) == 0 else 'token ids'} outside the model's vocabulary of "
                f"{self._vocab}; the tokenizer is another model's (actor_rollout_ref.model.tokenizer_path)"
            )

    def _submit(self, prompts: Sequence[IntArray], groups: Sequence[int], sampling: SamplingSpec) -> None:
        without, with_logprobs = sampling_parameters(sampling, flat_logprobs=self._can.flat_logprobs)
        self._calls += 1
        for prompt, group in zip(prompts, groups, strict=True):
            parameters = with_logprobs if wants_logprobs(sampling, group) else without
            name = f"{self._calls}-{group}"
            self._pending[name] = (group, prompt)
            # the one form of prompt that every version takes
            self._engine.add_request(name, {"prompt_token_ids": prompt.tolist()}, parameters)

    def _run(self) -> Iterator[list[Finished]]:
        """Steps until nothing is pending; ends early when aborted. Waits, between steps, while paused."""
        done: list[Finished] = []
        left = time.monotonic()
        while self._pending and not self._aborted.is_set():
            self._runs.wait()
            done += self._step()
            now = time.monotonic()
            if done and (now - left >= CHUNK_S or not self._pending):
                yield done
                done, left = [], now
        if done:
            yield done

    def _step(self) -> list[Finished]:
        waiting = self._num_waiting()
        finished = [output for output in self._engine.step() if output.finished]
        self._steps += 1
        self._tokens += sum(len(c.token_ids) for output in finished for c in output.outputs)
        # only a preempted request goes back to wait, and none is admitted in a step that preempts
        self._preemptions += max(0, self._num_waiting() - waiting)
        return [(*self._pending.pop(output.request_id), output) for output in finished]

    def _num_unfinished_tokens(self) -> int:
        """Tokens of responses that run, and of those that wait for their siblings: a request leaves as a whole."""
        if self._scheduler is None or self._can.v0_engine:
            return 0
        ended = [response for parent in list(self._parents.values()) for response in list(parent.output_aggregator)]
        running: int = sum(request.num_output_tokens for request in list(self._scheduler.requests.values()))
        return running + sum(len(response.token_ids) for response in ended if response is not None)

    def _num_waiting(self) -> int:
        return len(self._scheduler.waiting) if self._scheduler else 0

    def _drop_all(self) -> None:
        """Ends what is pending; a step lets the scheduler let go of it."""
        self._tokens += self._num_unfinished_tokens()  # they were generated all the same
        self._engine.abort_request(list(self._pending))
        self._pending.clear()
        while self._engine.has_unfinished_requests():
            self._engine.step()


def given_back(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], *, by_tag: bool) -> dict[str, int]:
    """Bytes by tag, from each worker's (free bytes, parameter bytes) before and after: what is no weight is cache.

    by_tag: the tags wake apart; else all wakes with the weights.
    """
    freed = [max(0, late[0] - early[0]) for early, late in zip(before, after, strict=True)]
    if not by_tag:
        return {"weights": max(freed), "kv_cache": 0}
    weights = [min(size, worker[1]) for size, worker in zip(freed, before, strict=True)]
    return {"weights": max(weights), "kv_cache": max(f - w for f, w in zip(freed, weights, strict=True))}


def _scheduler(engine: Any, can: Capabilities) -> Any:
    """The engine's scheduler, for counters only: its own statistics cost a Python call per token. None: not there."""
    names = ["running", "waiting"]
    if can.v0_engine:
        found = next(iter(getattr(engine, "scheduler", [])), None)
    else:
        found = getattr(getattr(getattr(engine, "engine_core", None), "engine_core", None), "scheduler", None)
        names += ["requests", "kv_cache_manager"]
    return found if all(hasattr(found, name) for name in names) else None


def _parents(engine: Any) -> dict[str, Any]:
    """V1's requests of several responses, by name, each with those that have ended; empty where it does not tell."""
    found: dict[str, Any] = getattr(getattr(engine, "output_processor", None), "parent_requests", {})
    return found


@contextmanager
def _callers_generators_kept() -> Iterator[None]:
    """vLLM seeds Python's, NumPy's and PyTorch's generators of its process; this one is ours."""
    import torch

    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(tensor)


def _set_environment(plan: EnginePlan) -> None:
    """What vLLM and its libraries read at import."""
    for name, value in plan.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # no Triton on CPU is no news


def _check_plain(value: object, method: str) -> None:
    """Only what every version's RPC carries."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_plain(item, method)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, method)
            _check_plain(item, method)
    elif not isinstance(value, _PLAIN):
        raise TypeError(
            f"{method}: a {type(value).__name__} does not cross vLLM's RPC in every version; send plain containers, "
            "and tensors by shared memory"
        )
