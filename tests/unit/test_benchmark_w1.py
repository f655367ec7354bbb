"""W1: what it counts, configures and reads, and the model it makes. Nothing is timed here."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from test_benchmark import SUMMARY, Launches, call, line
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from scripts.benchmarks import floors, launch, w1, w1_step
from scripts.benchmarks.measure import memory_growth, memory_growth_share
from scripts.benchmarks.w1_model import random_prompts, save_random_weights, write_inputs, write_weights
from scripts.benchmarks.w1_rollout import LOGPROBS, WARMUP_TOKENS, Load, speed_up
from scripts.benchmarks.w1_work import SHAPES, overrides
from trainer.config.load import load_config
from trainer.tracking.run_data import read_history, read_summary
from workers.rollout.pool import RolloutPool
from workers.rollout.spec import GenerateRequest, SamplingSpec

GIB = 1 << 30
H200 = 139 * GIB


def parse(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    w1.COMMAND.add_options(parser)
    return parser.parse_args(arguments)


def meta_model(directory: Path) -> Any:
    """The model of a written config, without memory."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", SHAPES)
def test_flops_of_a_sequence_are_those_that_torch_counts(name: str, tmp_path: Path) -> None:
    """torch counts the whole square of the attention, of which half is looked at."""
    length, shape = 32, SHAPES[name]
    write_inputs(shape, tmp_path)
    model, no_mask = meta_model(tmp_path), {"full_attention": None}  # making a mask looks at numbers
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long, device="meta"), attention_mask=no_mask, use_cache=False)
    not_looked_at = 2 * shape.layers * shape.hidden * length**2
    alone = replace(shape, prompts=1, samples=1, prompt_length=0, response_length=length)
    assert alone.forward_flops + not_looked_at == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_groups_prompt_is_computed_once_and_has_no_logits() -> None:
    group = replace(SHAPES["1.5b"], prompts=1)
    alone = replace(group, samples=1)
    prompt = replace(alone, response_length=0)
    assert group.forward_flops == pytest.approx(8 * alone.forward_flops - 7 * prompt.forward_flops)
    assert SHAPES["1.5b"].forward_flops == pytest.approx(64 * group.forward_flops)
    assert SHAPES["1.5b"].update_flops == 3 * SHAPES["1.5b"].forward_flops


def test_the_work() -> None:
    assert SHAPES["1.5b"].num_tokens == 655_360
    assert SHAPES["7b"].num_responses == 256 and SHAPES["7b"].response_length == 512


@pytest.mark.parametrize("name", SHAPES)
def test_every_response_fits_the_replicas_memory(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    write_inputs(shape, tmp_path)
    weights = 2 * sum(parameter.numel() for parameter in meta_model(tmp_path).parameters())
    per_token = 2 * 2 * shape.layers * shape.hidden * shape.kv_heads // shape.heads
    cache = shape.num_responses * (shape.prompt_length + shape.response_length) * per_token
    assert weights + cache + 4 * GIB < shape.rollout_memory * H200


@pytest.mark.parametrize("flags", [(), ("--eager", "--sampler-logprobs"), ("--set", "trainer.total_epochs=1000")])
@pytest.mark.parametrize("name", SHAPES)
def test_the_configuration_is_valid(name: str, flags: tuple[str, ...]) -> None:
    shape = SHAPES[name]
    cfg = load_config(overrides(shape, Path("model"), parse("--shape", name, "--steps", "10", *flags)))
    rollout, actor = cfg.actor_rollout_ref.rollout, cfg.actor_rollout_ref.actor
    assert cfg.max_sequence_length == shape.prompt_length + shape.response_length
    assert cfg.data.train_batch_size * rollout.n == rollout.max_num_seqs == shape.num_responses
    assert actor.ppo_max_token_len_per_gpu % (shape.prompt_length + rollout.n * shape.response_length) == 0
    assert rollout.enforce_eager is ("--eager" in flags) and cfg.use_reference and not cfg.use_critic
    assert rollout.calculate_log_probs == (True if "--sampler-logprobs" in flags else "monitor")


def test_the_model_is_of_the_shape_and_its_tokenizer_makes_the_prompts(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    write_inputs(shape, tmp_path)
    texts = [json.loads(row)["prompt"] for row in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert np.array_equal(tokenizer(texts)["input_ids"], random_prompts(shape, 4 * shape.prompts, 0))
    assert not np.array_equal(random_prompts(shape, 8, 1), random_prompts(shape, 8, 2))
    save_random_weights(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16 and model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.config.intermediate_size == shape.intermediate and model.config.tie_word_embeddings
    assert torch.stack([p.float().std() for n, p in model.named_parameters() if "proj.weight" in n]).min() > 0.01


def test_weights_are_written_once(tmp_path: Path) -> None:
    (tmp_path / "weights.done").touch()
    write_weights(tmp_path, Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.done"]


def finished(directory: Path, steps: list[dict[str, float]], *, devices: int = 1) -> launch.Finished:
    """A run that wrote these lines."""
    roles = [{"role": role, "devices": list(range(devices))} for role in ("actor", "ref", "rollout")]
    (directory / "plan.json").write_text(json.dumps({"devices": {"number": devices}, "roles": roles}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
    (directory / "summary.json").write_text(json.dumps(SUMMARY))
    return launch.Finished("python -m trainer.main", directory, read_history(directory), read_summary(directory), 0.1)


def steps_with_memory(*, update: list[float]) -> list[dict[str, float]]:
    """Four steps of 2 s, with the update's peaks in GiB; nothing else was measured."""
    times = {"generate": 1.0, "update": 0.88, "other": 0.06}
    return [line(s + 1, **times) | {"memory/update_peak_bytes": gib * GIB} for s, gib in enumerate(update)]


def test_memory_is_read_per_phase_and_growth_is_from_the_second_step_on(tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    result = w1_step.read(finished(tmp_path, steps_with_memory(update=[90, 80, 85, 82])), shape)
    assert result["phase_memory_bytes"] == {"update": {"max": 90 * GIB, "steps": [g * GIB for g in (90, 80, 85, 82)]}}
    assert result["memory_growth_bytes"] == {"update": 2 * GIB}
    assert result["phases"]["update"]["share"] == pytest.approx(0.88 / result["seconds_per_step"])
    assert result["tflops_per_second_update"] == pytest.approx(3 * shape.forward_flops / 0.88 / 1e12)
    assert result["mfu_update"] == pytest.approx(3 * shape.forward_flops / 0.88 / 989e12)
    assert memory_growth({"sync": [5.0]}) == {"sync": 0.0}
    assert result["memory_growth_share"] == pytest.approx(2 / 90) and result["steps"] == 4
    assert memory_growth_share({"sync": [1.0, 10.0, 20.0], "update": [90.0, 80.0, 81.0]}) == pytest.approx(0.5)


def test_a_run_that_measured_no_memory_has_none(tmp_path: Path) -> None:
    steps = [line(step, generate=1.0, update=1.0, other=0.0) for step in (1, 2)]
    result = w1_step.read(finished(tmp_path, steps), SHAPES["tiny"])
    assert result["phase_memory_bytes"] == result["memory_growth_bytes"] == {}
    assert result["memory_growth_share"] is None


@pytest.mark.parametrize(
    ("steps", "share", "missed"),
    [(10, 0.02, True), (10, 0.005, False), (10, None, True), (4, 0.02, False), (5, 0.02, True)],
)
def test_memory_may_not_grow(steps: int, share: float | None, missed: bool) -> None:
    for shape in ("1.5b", "7b"):
        assert floors.NO_GROWTH in floors.W1["step", shape]
    result = {"steps": steps, "memory_growth_share": share}
    assert len(floors.missed(result, [floors.NO_GROWTH])) == missed


def test_w1_writes_shows_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = finished(tmp_path, steps_with_memory(update=[90, 80, 85, 82]))
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    monkeypatch.setattr(launch, "run", Launches(ran.run_dir))
    monkeypatch.setattr(w1_step, "write_weights", lambda model, console: None)
    out = tmp_path / "w1.json"
    status, text = call(w1.COMMAND, "--out", str(out))
    assert status == 0 and "missed: mfu_update" not in text and "90.0" in text and "+2.00" in text
    assert call(w1.COMMAND, "--out", str(out), "--set", "a=b", "--check")[0] == 0
    result = json.loads(out.read_text())
    assert result["part"] == "step" and result["versions"]["torch"] and result["command"] and result["missed"] == []


def test_two_devices_have_twice_the_peak_and_no_floors(tmp_path: Path) -> None:
    shape, steps = SHAPES["tiny"], steps_with_memory(update=[90, 80, 85, 82])
    result = w1_step.read(finished(tmp_path, steps, devices=2), shape)
    assert result["mfu_update"] == pytest.approx(3 * shape.forward_flops / 0.88 / 989e12 / 2)
    of = {"part": "step", "shape": "1.5b"}
    assert floors.w1(of | result) == () and floors.w1(of | result | {"devices": 1}) == floors.W1["step", "1.5b"]
    assert floors.w1({"part": "sync", "shape": "7b"}) == floors.W1["sync", "7b"]


@pytest.mark.parametrize(("part", "key"), [("step", "phases.update.median"), ("sync", "seconds")])
def test_floors_are_of_a_part_and_a_shape(part: str, key: str) -> None:
    shape = "1.5b" if part == "step" else "7b"
    assert key in [floor.key for floor in floors.W1[part, shape]]
    assert all(name in w1.PARTS and shape in SHAPES for name, shape in floors.W1)


def engine(**medians: float) -> dict[str, Any]:
    return {"logprobs": {asked: {"median": seconds} for asked, seconds in medians.items()}}


def test_what_graphs_bring_is_told_as_time_and_as_throughput() -> None:
    engines = {"graphs": engine(monitor=3.0, all=4.0), "eager": engine(monitor=4.0)}
    assert speed_up(engines, "monitor") == pytest.approx({"time_saved": 0.25, "throughput_gained": 1 / 3})
    assert speed_up(engines, "all") == {"time_saved": None, "throughput_gained": None}
    assert speed_up({"eager": engine(monitor=4.0)}, "monitor")["time_saved"] is None


class FakePool:
    """Stands for a pool: every response has the length asked for; keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []

    def generate(self, requests: list[GenerateRequest]) -> Iterator[Any]:
        (request,) = requests
        self.requests.append(request)
        for _ in request.lengths:
            yield Namespace(meta=Namespace(response_length=np.full(request.sampling.n, request.sampling.max_tokens)))


def test_rounds_have_new_prompts_and_the_first_is_short() -> None:
    pool, shape = FakePool(), replace(SHAPES["tiny"], prompt_length=16, response_length=100)
    sampling = SamplingSpec(
        n=4, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=100, ignore_eos=True, stop_token_ids=(), logprobs="none"
    )
    load = Load(cast(RolloutPool, pool), shape, sampling)
    assert all(len(load.measure(asked, 2)["rounds"]) == 2 for asked in LOGPROBS)
    assert [r.sampling.max_tokens for r in pool.requests] == [WARMUP_TOKENS, 100, 100] * 2
    assert [r.sampling.logprobs for r in pool.requests] == ["monitor"] * 3 + ["all"] * 3
    prompts = np.concatenate([r.token_ids.reshape(4, 16) for r in pool.requests])
    assert len(np.unique(prompts, axis=0)) == 6 * 4


def test_one_part_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert [parse(*flags).part for flags in ((), ("--sync-only",), ("--rollout-only",))] == ["step", "sync", "rollout"]
    with pytest.raises(SystemExit):
        parse("--sync-only", "--rollout-only")
