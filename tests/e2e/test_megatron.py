"""Megatron-core through the real command line: the same numbers as FSDP, alone and beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness import NO_VALIDATION, ROOT, Outcome, Record, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

STEPS = 3
ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
ONLY_WATCHED = (f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_coef=0")
"""The reference answers, and training goes as without it."""
OF_THE_REFERENCE = ("actor/kl_loss", "actor/kl_coef")
CLOSE = 1e-5
TOKENS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


MEGATRON = (
    f"{ACTOR}.megatron.param_offload=true",
    f"{ACTOR}.megatron.optimizer_offload=true",
    f"{REF}.megatron.param_offload=true",
)
MIXED = (
    f"{REF}.strategy=megatron",
    f"{REF}.megatron.pipeline_model_parallel_size=2",
    f"{REF}.megatron.dtype=float32",
)


@pytest.fixture(scope="session")
def both_runs(runs: Path, task: Path) -> tuple[Outcome, Outcome]:
    """At once: each spends most of its time starting."""
    common = (*NO_VALIDATION, *ONLY_WATCHED, f"trainer.total_training_steps={STEPS}")
    with ThreadPoolExecutor(2) as pool:
        megatron = pool.submit(run, runs / "megatron", *common, *MEGATRON, config="quickstart_megatron")
        mixed = pool.submit(run, runs / "mixed", *common, *MIXED)
        outcomes = megatron.result(), mixed.result()
    for outcome in outcomes:
        assert outcome.status == 0, outcome.told
    return outcomes


@pytest.fixture
def megatron_run(both_runs: tuple[Outcome, Outcome]) -> Outcome:
    """The Megatron quick start, shorter: actor and reference, tp 2 with sequence parallelism; what can, offloads."""
    return both_runs[0]


@pytest.fixture
def mixed_run(both_runs: tuple[Outcome, Outcome]) -> Outcome:
    """An FSDP actor, data parallel, beside a Megatron reference in a pipeline of two."""
    return both_runs[1]


def numbers(record: Record) -> dict[str, float]:
    """What must not depend on the engine: of the data, the rewards, the update and what was sent."""
    return {
        name: value
        for name, value in record.items()
        if name.startswith(("actor/", "reward/", "advantage/", "response_length/", "data/", "sync/"))
    }


@pytest.mark.parametrize("name", ["megatron_run", "mixed_run"])
def test_the_engine_makes_no_difference(name: str, main_run: Outcome, request: pytest.FixtureRequest) -> None:
    """Every step begins with weights of the one before, and responses sampled from them."""
    other: Outcome = request.getfixturevalue(name)
    steps = other.steps()
    assert len(steps) == STEPS
    for record, expected in zip(steps, main_run.steps(), strict=False):
        found = {name: value for name, value in numbers(record).items() if name not in OF_THE_REFERENCE}
        assert found == pytest.approx(numbers(expected), rel=CLOSE, abs=CLOSE)
        assert record["mismatch/logprob_abs_diff_max"] < 1e-4, "the sampler has the trainer's weights"


def test_the_reference_says_the_same_whoever_asks(megatron_run: Outcome, mixed_run: Outcome) -> None:
    """Tensor parallel beside a Megatron actor, in a pipeline beside an FSDP one."""
    losses = [[record["actor/kl_loss"] for record in outcome.steps()] for outcome in (megatron_run, mixed_run)]
    assert losses[0] == pytest.approx(losses[1], abs=CLOSE)
    assert losses[0][0] == pytest.approx(0, abs=CLOSE)
    assert losses[0][-1] > 0.01, "the policy has moved"


def test_the_plan_says_who_has_which_engine(megatron_run: Outcome, mixed_run: Outcome) -> None:
    for role in ("actor", "reference"):
        assert re.search(rf"{role} +cpu 0-1 +Megatron +tp 2 x pp 1 x dp 1 +float32", megatron_run.stdout)
    assert re.search(r"actor +cpu 0-1 +FSDP2 +2 ranks +float32", mixed_run.stdout)
    assert re.search(r"reference +cpu 0-1 +Megatron +tp 1 x pp 2 x dp 1 +float32", mixed_run.stdout)


def test_megatron_is_quiet(megatron_run: Outcome, mixed_run: Outcome) -> None:
    for outcome in (megatron_run, mixed_run):
        assert outcome.complaints == "", outcome.told
        assert not re.search(r"traceback|warning|error:|pid=", outcome.stdout, re.IGNORECASE), outcome.told


def test_what_is_offloaded_comes_back(megatron_run: Outcome) -> None:
    for record in megatron_run.steps():
        away = {name.rpartition("/")[2] for name in record if name.startswith("memory/offloaded_bytes/")}
        assert away >= {"actor_weights", "ref_weights"}
    assert "memory/offloaded_bytes/actor_optimizer" in megatron_run.steps()[-1]


def test_the_exported_model_is_a_hugging_face_one(megatron_run: Outcome, task: Path) -> None:
    (checkpoint,) = megatron_run.checkpoints()
    before = load_file(task / "model" / "model.safetensors")
    after = load_file(checkpoint / "hf_model" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(not torch.equal(after[name], before[name]) for name in before)
    AutoModelForCausalLM.from_pretrained(checkpoint / "hf_model")


DIGITS = '''"""A random model says nothing right, but some of it is digits."""


def compute_score(data_source, solution_str, ground_truth, extra_info):
    return sum(letter.isdigit() for letter in solution_str) / 8
'''


@pytest.fixture(scope="module")
def experts_run(runs: Path, task: Path) -> Outcome:
    """Two steps of a Qwen3-MoE made at random, half of its experts on either rank."""
    model, reward = runs / "experts_model", runs / "digits.py"
    shutil.copytree(task / "model", model, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    tokens = {name: json.loads((task / "model" / "config.json").read_text())[name] for name in TOKENS}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.2,
        **tokens,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(model)
    reward.write_text(DIGITS)
    outcome = run(
        runs / "experts",
        *NO_VALIDATION,
        f"actor_rollout_ref.model.path={model}",
        f"{ACTOR}.strategy=megatron",
        f"{ACTOR}.megatron.expert_model_parallel_size=2",
        f"{ACTOR}.megatron.dtype=float32",
        f"{ACTOR}.optim.lr=1e-2",
        f"{ACTOR}.use_kl_loss=true",
        f"reward.custom_reward_function.path={reward}",
        "trainer.total_training_steps=3",
    )
    assert outcome.status == 0, outcome.told
    return outcome


def test_experts_are_trained_and_reach_the_sampler(experts_run: Outcome) -> None:
    steps = experts_run.steps()
    assert len(steps) == 3
    assert re.search(r"actor +cpu 0-1 +Megatron +tp 1 x pp 1 x dp 2 \(ep 2\) +float32", experts_run.stdout)
    assert steps[0]["actor/kl_loss"] == pytest.approx(0, abs=CLOSE)
    assert steps[-1]["actor/kl_loss"] > 0.01, "the policy has moved"
    for record in steps:
        assert record["actor/grad_norm"] > 0
        assert record["mismatch/logprob_abs_diff_mean"] < CLOSE, "the sampler has the trainer's weights"


def test_experts_leave_as_they_came(experts_run: Outcome, runs: Path) -> None:
    """Under the same names; all of them trained."""
    (checkpoint,) = experts_run.checkpoints()
    before = load_file(runs / "experts_model" / "model.safetensors")
    after = load_file(checkpoint / "hf_model" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_the_example_plans_its_run(tmp_path: Path, task: Path) -> None:
    """On CPU slots instead of GPUs, with a model of the right shape but no weights."""
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(task / "model", model)
    Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ).save_pretrained(model)
    data.mkdir()
    for name, source in {"train": "train_chat", "test": "heldout"}.items():
        shutil.copy(task / f"{source}.parquet", data / f"{name}.parquet")
    overrides = ["trainer.dry_run=true", "trainer.device=cpu", "ray_kwargs.ray_init.num_cpus=8"]
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "examples/qwen2_7b_grpo_megatron.sh", *overrides, f"trainer.default_local_dir={tmp_path}/run"],
        cwd=ROOT,
        env=os.environ | {"PATH": python, "MODEL": str(model), "DATA": str(data)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for role in ("actor", "reference"):
        assert re.search(rf"{role} +cpu 0-7 +Megatron +tp 2 x pp 2 x dp 2 +bfloat16", done.stdout), done.stdout
