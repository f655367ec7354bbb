"""The seam with the vLLM that is installed: a real engine, held against transformers."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from workers.rollout.vllm import installed, selfcheck
from workers.rollout.vllm.arguments import fit_sampling, plan_engine
from workers.rollout.vllm.engine import Engine
from workers.rollout.vllm.outputs import to_block
from workers.rollout.vllm.selfcheck import SAMPLING, prompts

GREEDY = replace(SAMPLING, temperature=0.0, n=1)


@pytest.mark.parametrize("name", selfcheck.CHECKS)
def test_selfcheck(bench: Any, name: str) -> None:
    check = selfcheck.CHECKS[name]
    assert check(bench)


def test_the_version_that_runs_is_the_one_that_was_read(bench: Any) -> None:
    import vllm

    found = installed.find()
    assert found is not None
    assert vllm.__file__ is not None and vllm.__file__.startswith(str(found.root))
    assert vllm.__version__.split("+")[0] == str(bench.can.version).split("+")[0]


def test_what_was_read_is_what_python_sees(bench: Any) -> None:
    """The static reader against the imported module."""
    import dataclasses
    import inspect

    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    assert {f.name for f in dataclasses.fields(EngineArgs)} <= bench.can.engine_arguments
    assert bench.can.wake_tags == ("tags" in inspect.signature(LLM.wake_up).parameters)
    assert bench.can.flat_logprobs == ("flat_logprobs" in inspect.signature(SamplingParams).parameters)


def test_the_engine_takes_every_argument_of_the_plan(bench: Any, tmp_path: Any) -> None:
    plan = plan_engine(selfcheck.tiny_spec(tmp_path, "cpu"), bench.can, {})
    assert set(plan.arguments) <= bench.can.engine_arguments
    assert not plan.problems


@pytest.mark.parametrize("logprobs", ["all", "none", "monitor"])
def test_only_those_log_probs_that_are_asked_for(bench: Any, logprobs: Any) -> None:
    block = bench.sample(replace(SAMPLING, logprobs=logprobs))
    if logprobs == "none":
        assert block.logprobs is None
        return
    asked = np.repeat(block.meta.group == 0, block.meta.response_length)
    expected = np.isfinite(block.logprobs)
    assert np.array_equal(expected, asked if logprobs == "monitor" else np.ones_like(asked))


def test_top_k_log_probs_are_those_of_the_truncated_distribution(bench: Any) -> None:
    truncated = replace(SAMPLING, top_k=2, temperature=0.8)
    if fit_sampling(truncated, bench.can, auto_adapt=False)[2] is not None:
        pytest.skip("this version's log-probs are from before truncation; refused (test_vllm_arguments)")
    block = bench.sample(truncated)
    assert block.logprobs is not None
    full = bench.logprobs(block, 0.8)
    assert (block.logprobs >= full - 1e-4).all() and (block.logprobs > full + 1e-3).any()


def test_each_prompt_has_its_responses_in_order(bench: Any) -> None:
    block = bench.sample(replace(SAMPLING, n=3))
    assert sorted(zip(block.meta.group.tolist(), block.meta.sample.tolist(), strict=True)) == [
        (group, sample) for group in range(3) for sample in range(3)
    ]
    assert set(block.meta.finish_reason.tolist()) == {1}  # length
    for prompt, group in zip(block.prompts(), block.meta.group, strict=True):
        assert np.array_equal(prompt, prompts()[group])


def test_a_stop_token_ends_a_response_and_belongs_to_it(bench: Any) -> None:
    first = int(bench.sample(GREEDY).responses()[0][0])
    block = bench.sample(replace(GREEDY, ignore_eos=False, stop_token_ids=(first,)))
    row = block.meta.group.tolist().index(0)
    assert block.responses()[row].tolist() == [first]
    assert block.meta.finish_reason[row] == 0


def test_a_seed_reaches_every_generator_that_samples(bench: Any) -> None:
    def drawn(seed: int) -> tuple[float, float]:
        bench.engine.rpc("tandem_seed", seed)
        return float(torch.rand(())), float(np.random.rand())

    large = (1 << 62) + 5
    assert drawn(large) == drawn(large)
    assert all(a != b for a, b in zip(drawn(large), drawn(6), strict=True))


def test_the_same_seed_gives_the_same_responses(bench: Any) -> None:
    def rows(seed: int) -> list[tuple[int, int, list[int]]]:
        bench.engine.rpc("tandem_seed", seed)
        block = bench.sample()
        keys = zip(block.meta.group.tolist(), block.meta.sample.tolist(), block.responses(), strict=True)
        return sorted((g, s, r.tolist()) for g, s, r in keys)

    assert rows(5) == rows(5)
    assert rows(5) != rows(6)


def test_weights_that_are_left_out_are_named(bench: Any) -> None:
    bench.engine.rpc("tandem_begin_update")
    with pytest.raises(Exception, match=r"not \(fully\) written.*embed_tokens"):
        bench.engine.rpc("tandem_finish_update")
    bench.update()
    assert bench.difference() < 1e-4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.array([256], dtype=np.int32), "outside the model's vocabulary of 256"),
        (np.array([-1], dtype=np.int32), "outside the model's vocabulary"),
        (np.array([], dtype=np.int32), "no tokens"),
        (np.full(128, 3, dtype=np.int32), "128 tokens leaves no room to answer in max_model_len=128"),
    ],
)
def test_a_prompt_the_model_cannot_take(bench: Any, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(bench.engine.generate([prompts()[0], prompt], [0, 1], SAMPLING))
    assert not bench.engine.status().busy
    assert len(bench.sample().meta) == 6  # nothing of the refused call is left


@pytest.mark.parametrize("value", [torch.zeros(1), {"a": [torch.zeros(1)]}, np.zeros(1), {1.5: object()}])
def test_only_plain_containers_cross_the_rpc(bench: Any, value: Any) -> None:
    with pytest.raises(TypeError, match="does not cross vLLM's RPC"):
        bench.engine.rpc("tandem_load_bucket", [value])


def test_finished_requests_leave_while_others_run(bench: Any) -> None:
    """One prompt gets the stop token at once, the others run to the end."""
    engine = bench.engine
    long = replace(SAMPLING, n=1, max_tokens=100, logprobs="none")
    some = [np.array([5, i], dtype=np.int32) for i in range(2, 40)]  # more than max_num_seqs run together
    bunches = [[group for group, _, _ in bunch] for bunch in engine.generate(some, list(range(len(some))), long)]
    assert sorted(g for bunch in bunches for g in bunch) == list(range(len(some)))
    assert len(bunches) > 1


def _in_background(bench: Any, sampling: Any) -> tuple[threading.Thread, list[Any]]:
    got: list[Any] = []

    def work() -> None:
        some = [np.array([5, i], dtype=np.int32) for i in range(2, 40)]
        for bunch in bench.engine.generate(some, list(range(len(some))), sampling):
            got.extend(bunch)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, got


def _wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


LONG = replace(SAMPLING, n=1, max_tokens=110, logprobs="none")


def test_status_counts_while_it_generates(bench: Any) -> None:
    before = bench.engine.status()
    thread, got = _in_background(bench, LONG)
    _wait_for(lambda: bench.engine.status().tokens > before.tokens + 50)
    during = bench.engine.status()
    thread.join()
    after = bench.engine.status()
    assert during.busy and not after.busy
    assert during.steps > before.steps
    assert 0 < during.running <= 16 and during.waiting > 0
    assert 0 < during.cache_use <= 1 or bench.can.v0_engine  # V0 does not tell
    assert after.tokens - before.tokens == sum(len(o.outputs[0].token_ids) for _, _, o in got) == 38 * 110
    assert (after.running, after.waiting) == (0, 0)


def test_tokens_are_never_taken_back(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses that have ended count while they wait for their siblings."""
    if bench.can.v0_engine:
        pytest.skip("V0 does not tell")
    engine, step = bench.engine, bench.engine._step
    told, counted = [engine.status().tokens], [engine.status().tokens]

    def watched() -> Any:
        finished = step()
        counted.append(engine._tokens + engine._num_unfinished_tokens())
        told.append(engine.status().tokens)
        return finished

    monkeypatch.setattr(engine, "_step", watched)
    some = replace(SAMPLING, n=8, max_tokens=100, ignore_eos=False, stop_token_ids=tuple(range(100, 130)))
    outputs = [o for bunch in engine.generate(prompts(), [0, 1, 2], some) for _, _, o in bunch]
    lengths = [len(c.token_ids) for o in outputs for c in o.outputs]
    assert len(set(lengths)) > 1, "siblings end at different steps"
    assert told == counted == sorted(counted)
    assert told[-1] - told[0] == sum(lengths)


def test_pause_holds_and_resume_goes_on(bench: Any) -> None:
    start = bench.engine.status().steps
    thread, got = _in_background(bench, LONG)
    _wait_for(lambda: bench.engine.status().steps > start + 5)
    bench.engine.pause()
    time.sleep(0.2)
    held = bench.engine.status()
    time.sleep(0.3)
    assert bench.engine.status().steps == held.steps and not held.busy
    bench.engine.resume()
    thread.join()
    assert len(got) == 38


def test_abort_ends_the_call_and_leaves_the_engine_clean(bench: Any) -> None:
    start = bench.engine.status().steps
    thread, got = _in_background(bench, LONG)
    _wait_for(lambda: bench.engine.status().steps > start + 5)
    bench.engine.abort()
    thread.join(20)
    assert not thread.is_alive() and len(got) < 38
    status = bench.engine.status()
    assert (status.running, status.waiting, status.busy) == (0, 0, False)
    assert bench.difference() < 1e-4


def test_a_call_that_is_left_early_leaves_nothing_behind(bench: Any) -> None:
    some = [np.array([5, i], dtype=np.int32) for i in range(2, 40)]
    for _ in bench.engine.generate(some, list(range(38)), LONG):
        break
    status = bench.engine.status()
    assert (status.running, status.waiting, status.busy) == (0, 0, False)
    block = to_block([o for bunch in bench.engine.generate(prompts(), [0, 1, 2], SAMPLING) for o in bunch], 0)
    assert len(block.meta) == 6


def test_prefix_cache_does_not_outlive_the_weights(bench: Any, tmp_path: Any) -> None:
    """The prompt is longer than a block of the cache, which has 128 tokens in CPU builds: shorter ones are not kept."""
    model = selfcheck.write_tiny_model(tmp_path)
    spec = replace(selfcheck.tiny_spec(tmp_path, "cpu"), max_model_len=256)
    other = selfcheck.Bench(Engine(plan_engine(spec, bench.can, {}), bench.can), model, bench.can, "cpu", True)
    prompt = [np.arange(3, 3 + 200, dtype=np.int32)]

    def difference() -> float:
        (bunch,) = list(other.engine.generate(prompt, [0], SAMPLING))
        block = to_block(bunch, 0)
        assert block.logprobs is not None
        return float(np.abs(block.logprobs - other.logprobs(block, 1.0)).mean())

    assert difference() < 1e-4
    assert difference() < 1e-4, "the second time from the cache"
    other.update()
    assert difference() < 1e-4, "computed with the old weights' cache"


def test_preemptions_are_counted_as_vllm_counts_them(bench: Any, tmp_path: Any) -> None:
    """A cache too small for all: some sequences are pushed out and computed again."""
    if not bench.can.cpu_cache_bytes:
        pytest.skip("this CPU build takes whole GiB for its cache, too much to run full (issue 3)")
    selfcheck.write_tiny_model(tmp_path)
    spec = replace(
        selfcheck.tiny_spec(tmp_path, "cpu"),
        kv_cache_gb=1024 * 1024 / (1 << 30),
        engine_kwargs={"disable_log_stats": False, "block_size": 32},
    )
    engine = Engine(plan_engine(spec, bench.can, {}), bench.can)
    some = [np.array([5, i], dtype=np.int32) for i in range(2, 18)]
    assert len([o for bunch in engine.generate(some, list(range(16)), LONG) for o in bunch]) == 16
    counters = {m.name: getattr(m, "value", None) for m in engine._llm.get_metrics()}
    assert engine.status().preemptions == counters["vllm:num_preemptions"] > 0
    assert engine.status().tokens == counters["vllm:generation_tokens"]
