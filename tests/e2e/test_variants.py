"""Other algorithms, data and shapes of the same loop; and all the metrics there are."""

from __future__ import annotations

import math

import pytest
from harness import ROOT, Outcome

from trainer.tracking.catalog import documented_metrics, is_documented

PER_DATA_SOURCE = {"val/<data_source>/accuracy", "val/<data_source>/greedy_accuracy"}
FROM_REWARD_PARTS = {"reward/part/<name>"}
"""Logged by the run of test_rewards.py."""


def test_what_is_recomputed_comes_out_the_same(frozen_run: Outcome) -> None:
    """Log-probs of 4 updates in other micro-batches and another order, of the reference, and of the sampler."""
    steps = frozen_run.steps()
    assert len(steps) == 2
    for record in steps:
        assert record["actor/num_updates"] == 4
        assert record["actor/ratio_max"] == pytest.approx(1, abs=1e-4)
        assert record["actor/ratio_min"] == pytest.approx(1, abs=1e-4)
        assert abs(record["actor/ppo_kl"]) <= 1e-6
        assert abs(record["actor/kl_loss"]) <= 1e-6
        assert record["actor/clip_frac"] == 0
        assert record["mismatch/logprob_abs_diff_mean"] < 1e-4
        assert record["actor/entropy"] > 0.01
        assert record["actor/grad_norm"] > 0.1, "there is a gradient, only the step is tiny"


def test_every_token_is_compared_when_asked(frozen_run: Outcome) -> None:
    for record in frozen_run.steps():
        responses = record["perf/tokens"] - 512 * record["prompt_length/mean"]
        assert responses == pytest.approx(512 * record["response_length/mean"], abs=1)
        assert record["mismatch/num_tokens"] >= responses, "once per update that sees it"


def test_an_exported_model_goes_on_from_where_it_was(frozen_run: Outcome, main_run: Outcome) -> None:
    """At a lower temperature than the main run's validation, and on sums that it was trained on."""
    step = int(main_run.checkpoints()[0].name.removeprefix("step_"))
    (exported,) = (record for record in main_run.records() if record["step"] == step)
    assert frozen_run.records()[0]["val/accuracy"] > exported["val/accuracy"] - 0.1


def test_accuracy_of_each_data_source(frozen_run: Outcome) -> None:
    first = frozen_run.records()[0]
    for name in ("accuracy", "greedy_accuracy"):
        halves = [first[f"val/half {half}/{name}"] for half in (0, 1)]
        assert sum(halves) / 2 == pytest.approx(first[f"val/{name}"])


def test_the_critic_learns(ppo_run: Outcome) -> None:
    losses = [record["critic/value_loss"] for record in ppo_run.steps()]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    for record in ppo_run.steps():
        for name in ("value_loss", "clip_frac", "value_mean", "explained_variance", "grad_norm", "lr"):
            assert math.isfinite(record[f"critic/{name}"]), (name, record)
        assert record["critic/num_updates"] == 2
        assert record["advantage/mean"] == pytest.approx(0, abs=1e-5), "whitened"


def test_critic_warmup_leaves_the_policy_alone(ppo_run: Outcome) -> None:
    first, second, *later = ppo_run.steps()
    assert "actor/loss" not in first
    assert "actor/loss" in second
    for record in (first, second):  # the policy that sampled is still the reference
        assert record["kl/reward_kl"] == pytest.approx(0, abs=1e-6)
    for record in later:
        assert record["kl/reward_kl"] > 1e-4
        assert record["actor/num_updates"] == 2


def test_the_kl_coefficient_adapts(ppo_run: Outcome) -> None:
    """It falls while the KL is under its target, and rises after."""
    coefficients = [record["kl/reward_kl_coef"] for record in ppo_run.steps()]
    assert coefficients[0] == pytest.approx(0.05)
    assert coefficients[1] < coefficients[0]
    assert coefficients[3] > coefficients[2]


def test_offloaded_models_come_back_for_each_use(ppo_run: Outcome) -> None:
    for record in ppo_run.steps():
        away = {name: size for name, size in record.items() if name.startswith("memory/offloaded_bytes/")}
        assert {name.rpartition("/")[2] for name in away} >= {"ref_weights", "critic_weights", "critic_optimizer"}
        assert away["memory/offloaded_bytes/critic_optimizer"] == pytest.approx(
            2 * away["memory/offloaded_bytes/critic_weights"], rel=0.01
        )
    assert "memory/offloaded_bytes/actor_optimizer" in ppo_run.steps()[-1]


def test_groups_that_teach_nothing_are_replaced(dapo_run: Outcome) -> None:
    for record in dapo_run.steps():
        assert record["filter_groups/without_signal"] > 0, (
            "of 64 sums with four answers some are all right or all wrong"
        )
        assert record["filter_groups/generated"] >= 64 + record["filter_groups/without_signal"]
        assert record["filter_groups/filled_up"] == 0
        assert 2 <= record["filter_groups/rounds"] <= 6
        assert record["reward/frac_zero_std_groups"] == 0
        assert record["actor/num_updates"] == 2
        assert (
            record["correction/is_weight_mean"] == pytest.approx(1, abs=1e-4)
            if "correction/is_weight_mean" in record
            else True
        )
        assert record["perf/tokens"] > 0 and record["mismatch/logprob_abs_diff_mean"] < 1e-4


def test_documented_and_logged_metrics_are_the_same(
    main_run: Outcome, frozen_run: Outcome, ppo_run: Outcome, dapo_run: Outcome
) -> None:
    documented = documented_metrics((ROOT / "docs" / "metrics.md").read_text())
    records = [record for outcome in (main_run, frozen_run, ppo_run, dapo_run) for record in outcome.records()]
    logged = {name for record in records for name in record} - {"step"}
    assert {name for name in logged if not is_documented(name, documented)} == set()
    patterns = {name for name in documented if any(is_documented(one, {name}) for one in logged)}
    assert documented - patterns - FROM_REWARD_PARTS == set(), "documented, but no run logs it"
    assert patterns >= PER_DATA_SOURCE


def test_no_metric_is_ever_without_a_value(
    main_run: Outcome, frozen_run: Outcome, ppo_run: Outcome, dapo_run: Outcome
) -> None:
    for outcome in (main_run, frozen_run, ppo_run, dapo_run):
        for record in outcome.records():
            assert [name for name, value in record.items() if value is None] == []
