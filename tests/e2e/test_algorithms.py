"""Every advantage estimator with every policy loss through the real driver, on one set of workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from workbench import PROMPTS, RESPONSES, UPDATES, Taken, Workbench, workbench

from trainer.algorithms.aggregation import AGGREGATION_MODES
from trainer.algorithms.estimators.catalog import ESTIMATORS
from trainer.algorithms.policy.build import OBJECTIVES

LOSS = "actor_rollout_ref.actor.policy_loss"
CORRECTION = "algorithm.rollout_correction"
PARAMS: dict[str, list[str]] = {
    "dro": [f"{LOSS}.params.dro_beta=0.1"],
    "clip_cov": [f"{LOSS}.params.clip_cov_{name}" for name in ("lb=-100.0", "ub=100.0", "ratio=0.1")],
    "kl_cov": [f"{LOSS}.params.kl_cov_ratio=0.1"],
}
"""What a loss cannot do without; and bounds within which tokens of so small a batch lie."""
COLUMNS = {"values": "values", "logprobs": "old_logprobs", "sum_pi_squared": "sum_pi_squared"}
"""What an estimator needs -> the column that the training ranks are asked for."""
OWN = '''"""Algorithms of a user's own."""

import torch

from trainer.algorithms.policy.base import Objective


def half(x, *, scale):
    """+ scale for the better half of all responses, - scale for the others."""
    return torch.repeat_interleave(torch.where(x.rewards > x.rewards.mean(), scale, -scale), x.lengths)


def plain(x, *, weight=1.0):
    """REINFORCE without any ratio."""
    loss = -weight * x.advantages * x.logprobs
    never = torch.zeros_like(x.mask)
    return Objective(loss, never, never, {"actor/own_weight_max": loss.new_tensor(weight)})
'''


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, task: Path) -> Iterator[Workbench]:
    """Workers for all tests of this file."""
    with workbench(tmp_path_factory.mktemp("algorithms"), task) as started:
        yield started


def check(taken: Taken, *, updates: int = UPDATES, may_rest: bool = False) -> None:
    """A step that learned something, and whose every metric is a number. may_rest: rewards may differ in vain."""
    metrics = taken.metrics
    assert len(taken.samples) == PROMPTS * RESPONSES
    assert not {name: value for name, value in metrics.items() if not math.isfinite(value)}
    assert (metrics["actor/num_updates"], metrics["actor/skipped_updates"]) == (updates, 0)
    assert metrics["reward/frac_zero_std_groups"] < 1, "there was something to learn"
    if may_rest and metrics["advantage/std"] == 0:
        assert metrics["actor/grad_norm"] == 0
    else:
        assert metrics["actor/grad_norm"] > 0
        assert taken.moved


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_with_every_loss(bench: Workbench, name: str, loss: str) -> None:
    """Two updates of a step, the second with a ratio that is not 1; each estimator and each loss in two steps."""
    settings = [f"algorithm.adv_estimator={name}", f"{LOSS}.loss_mode={loss}", *PARAMS.get(loss, [])]
    for taken in bench.steps(*settings, number=2 if name == "grpo" or loss == "ppo" else 1):
        check(taken, may_rest=name == "grpo_passk")  # where the two best of every group are equally good
        needs, columns = ESTIMATORS[name].needs, taken.samples.columns
        for needed, column in COLUMNS.items():
            assert needed not in needs or column in columns, column
        assert ("sum_pi_squared" in columns) == ("sum_pi_squared" in needs), "not asked for in vain"
        assert (taken.samples.baseline is not None) == ("baseline" in needs)
        assert ("critic/value_loss" in taken.metrics) == ("values" in needs)
        if loss in ("clip_cov", "kl_cov"):
            assert taken.metrics["actor/clip_frac_lower"] == pytest.approx(0.1, abs=0.02), "the share that was chosen"


def test_the_sums_of_squared_probabilities_are_such(bench: Workbench) -> None:
    """Between 1 / vocabulary and 1, and at least the square of the chosen token's probability."""
    (taken,) = bench.steps("algorithm.adv_estimator=optimal_token_baseline")
    squares, logprobs = (taken.samples.fetch_column(name) for name in ("sum_pi_squared", "old_logprobs"))
    assert (squares >= np.exp(2 * logprobs) - 1e-6).all() and (squares <= 1 + 1e-6).all()
    assert squares.std() > 0.01


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("loss", ["ppo", "gspo"])
def test_every_aggregation(bench: Workbench, loss: str, mode: str) -> None:
    settings = [f"actor_rollout_ref.actor.loss_agg_mode={mode}", f"{LOSS}.loss_mode={loss}"]
    (taken,) = bench.steps(*settings)
    check(taken)


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3", "k1+", "k3+"])
def test_a_divergence_in_the_loss_and_in_the_reward(bench: Workbench, kind: str) -> None:
    actor = "actor_rollout_ref.actor"
    settings = [f"{actor}.use_kl_loss=true", f"{actor}.kl_loss_type={kind}", "algorithm.use_kl_in_reward=true"]
    (taken,) = bench.steps(*settings, f"algorithm.kl_penalty={kind.rstrip('+')}", "algorithm.kl_ctrl.kl_coef=0.1")
    check(taken)
    assert {"actor/kl_loss", "kl/reward_kl"} <= taken.metrics.keys()
    assert {"ref_logprobs", "old_logprobs"} <= taken.samples.columns.keys()


def test_functions_of_ones_own(bench: Workbench, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    for taken in bench.steps(
        f"algorithm.adv_estimator={path}:half",
        "algorithm.adv_params.scale=0.25",
        f"{LOSS}.loss_mode={path}:plain",
        f"{LOSS}.params.weight=3.0",
        number=2,
    ):
        check(taken)
        assert (taken.metrics["advantage/max"], taken.metrics["advantage/min"]) == (0.25, -0.25)
        assert taken.metrics["actor/own_weight_max"] == 3.0


def test_the_sampler_in_the_place_of_the_old_policy(bench: Workbench) -> None:
    """bypass_mode: no pass for old log-probs, although there are two updates."""
    for taken in bench.steps(f"{CORRECTION}.bypass_mode=true", number=2):
        check(taken)
        assert "old_logprobs" not in taken.samples.columns
        assert taken.metrics["actor/ratio_max"] == pytest.approx(1, abs=0.01)
        assert taken.metrics["mismatch/num_tokens"] == taken.samples.num_tokens


def test_decoupled_ppo(bench: Workbench) -> None:
    """The ratio is taken against the policy before the update, the weight is that policy's against the sampler."""
    for taken in bench.steps(f"{CORRECTION}.rollout_is=token", number=2):
        check(taken)
        assert "old_logprobs" in taken.samples.columns
        assert taken.metrics["correction/weight_mean"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_weights_whose_mean_is_one(bench: Workbench, level: str) -> None:
    settings = [f"{CORRECTION}.rollout_is={level}", f"{CORRECTION}.rollout_is_batch_normalize=true"]
    (taken,) = bench.steps(*settings)
    check(taken)
    weights = taken.samples.fetch_column("rollout_weights")
    assert weights.mean() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("statistic", ["token_k1", "seq_sum_k2", "seq_mean_k3", "seq_max_k2"])
def test_rejection(bench: Workbench, statistic: str) -> None:
    bound = "0.5_2.0" if statistic.endswith("k1") else "0.1"
    settings = [f"{CORRECTION}.rollout_rs={statistic}", f"{CORRECTION}.rollout_rs_threshold={bound}"]
    (taken,) = bench.steps(*settings, f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=0.5_5.0")
    check(taken)


@pytest.mark.parametrize("loss", ["ppo", "gspo", "clip_cov"])
def test_several_epochs_of_mini_batches(bench: Workbench, loss: str) -> None:
    actor = "actor_rollout_ref.actor"
    settings = [f"{actor}.ppo_epochs=2", f"{actor}.ppo_mini_batch_size=2", f"{actor}.shuffle=true"]
    for taken in bench.steps(*settings, f"{LOSS}.loss_mode={loss}", *PARAMS.get(loss, []), number=2):
        check(taken, updates=2 * PROMPTS // 2)
        assert taken.metrics["actor/ratio_max"] > 1 + 1e-5, "the policy moves away from the one that sampled"
