"""A real replica in a Ray actor: what it streams, and that it can be watched, held and ended while it generates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from workers.protocol import RolloutBlock, SequenceMeta
from workers.rollout.spec import GenerateRequest, GenerateStats, SamplingSpec
from workers.rollout.vllm.replica import CONCURRENCY_GROUPS, VllmReplica
from workers.rollout.vllm.selfcheck import SAMPLING, tiny_spec, write_tiny_model

PROMPTS = 64
LONG = replace(SAMPLING, n=2, max_tokens=100, logprobs="none")


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    model = tmp_path_factory.mktemp("tiny")
    write_tiny_model(model)
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    actor = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(VllmReplica).remote(
        tiny_spec(model, "cpu"), 0
    )
    assert ray.get(actor.ping.remote(), timeout=120) == 0
    yield actor
    ray.shutdown()


def start(replica: Any, sampling: SamplingSpec = LONG) -> Any:
    request = GenerateRequest(
        token_ids=np.repeat(np.arange(2, 2 + PROMPTS, dtype=np.int32), 3),
        lengths=np.full(PROMPTS, 3, dtype=np.int32),
        groups=np.arange(100, 100 + PROMPTS, dtype=np.int32),
        sampling=sampling,
        seed=1,
    )
    return replica.generate.options(num_returns="streaming").remote(request)


def read(stream: Any) -> tuple[list[RolloutBlock], list[SequenceMeta], GenerateStats]:
    *pairs, stats = [ray.get(ref) for ref in stream]
    return pairs[::2], pairs[1::2], stats


def wait_until_it_steps(replica: Any) -> int:
    deadline = time.monotonic() + 30
    first = ray.get(replica.status.remote()).steps
    while (now := ray.get(replica.status.remote())).steps < first + 3 or not now.busy:
        assert time.monotonic() < deadline
    return int(now.steps)


def test_finished_prompts_come_while_others_are_generated(replica: Any) -> None:
    blocks, metas, stats = read(start(replica))
    assert len(blocks) > 1  # 128 responses, 16 at a time
    assert sorted(g for meta in metas for g in meta.group.tolist()) == sorted(list(range(100, 100 + PROMPTS)) * 2)
    assert all(np.array_equal(b.meta.group, m.group) for b, m in zip(blocks, metas, strict=True))
    assert stats.tokens == sum(len(b.response_ids) for b in blocks) == PROMPTS * 2 * 100
    assert stats.peak_bytes > 0 and stats.seconds > 0


def test_it_can_be_held_and_goes_on(replica: Any) -> None:
    stream = start(replica)
    wait_until_it_steps(replica)
    ray.get(replica.pause.remote(), timeout=10)
    time.sleep(0.3)
    held = ray.get(replica.status.remote(), timeout=10)
    time.sleep(0.5)
    assert ray.get(replica.status.remote(), timeout=10).steps == held.steps and not held.busy
    ray.get(replica.resume.remote(), timeout=10)
    blocks, _, _ = read(stream)
    assert sum(len(b.meta) for b in blocks) == PROMPTS * 2


def test_it_can_be_ended_and_used_again(replica: Any) -> None:
    stream = start(replica)
    wait_until_it_steps(replica)
    ray.get(replica.abort.remote(), timeout=10)
    _, metas, _ = read(stream)
    assert sum(len(m) for m in metas) < PROMPTS * 2
    assert all((np.bincount(m.group)[100:] % 2 == 0).all() for m in metas)  # whole groups only
    blocks, _, _ = read(start(replica, replace(LONG, max_tokens=4)))
    assert sum(len(b.meta) for b in blocks) == PROMPTS * 2


def test_a_prompt_that_does_not_fit_is_an_error_that_says_so(replica: Any) -> None:
    request = GenerateRequest(
        token_ids=np.full(200, 3, dtype=np.int32),
        lengths=np.array([200], dtype=np.int32),
        groups=np.zeros(1, dtype=np.int32),
        sampling=LONG,
        seed=1,
    )
    with pytest.raises(ValueError, match="200 tokens leaves no room to answer in max_model_len=128"):
        read(replica.generate.options(num_returns="streaming").remote(request))
