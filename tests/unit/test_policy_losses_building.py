"""Objectives from the configuration: names, parameters, one's own function; what the driver chooses for them."""

from __future__ import annotations

import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_world import theta_of, whole
from policy_world import CLIPS, LENGTHS, likely, loss_of, policy_batch

from trainer.algorithms.losses import driver_columns
from trainer.algorithms.policy.base import BatchInput
from trainer.algorithms.policy.build import (
    ALIASES,
    OBJECTIVES,
    ClipRange,
    CustomObjective,
    parameters,
    policy_objective,
)
from trainer.algorithms.policy.covariance import covariances
from trainer.config.notices import OWN_AGGREGATION

MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
PARAMS = "actor_rollout_ref.actor.policy_loss.params"

DEFAULTS = {
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "clip_cov": {"clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0},
    "kl_cov": {"kl_cov_ratio": 2e-4, "ppo_kl_coef": 0.1},
    "dro": {"dro_beta": None},
}
"""verl's defaults."""


def test_names_and_defaults() -> None:
    assert set(OBJECTIVES) == {
        *("ppo", "gspo", "sapo", "cispo", "gmpo", "gpg", "clip_cov", "kl_cov", "dppo_tv", "dppo_kl", "dro", "topr")
    }
    for name in OBJECTIVES:
        assert set(parameters(name)) == set(DEFAULTS.get(name, {}))
        if name != "dro":
            built: Any = policy_objective(name, {}, CLIPS)
            given = {k: v for k, v in asdict(built).items() if k in parameters(name)}
            assert given == DEFAULTS.get(name, {})
            assert pickle.loads(pickle.dumps(built)) == built
    for other, name in ALIASES.items():
        assert policy_objective(other, {}, CLIPS) == policy_objective(name, {}, CLIPS)


@pytest.mark.parametrize(
    ("name", "params", "clips", "message"),
    [
        ("pop", {}, CLIPS, f"{MODE}=pop: unknown; choose one of ppo, gspo"),
        ("sapo", {"tau": 1.0}, CLIPS, "tau: unknown parameter of"),
        ("sapo", {"tau": 1.0}, CLIPS, "it has tau_pos, tau_neg"),
        ("ppo", {"clip_low": 0.1}, CLIPS, "it has none"),
        ("sapo", {"tau_pos": 0.0}, CLIPS, f"{PARAMS}.tau_pos=0.0: must be above 0; raise it"),
        ("sapo", {"tau_neg": -1}, CLIPS, f"{PARAMS}.tau_neg=-1: must be above 0"),
        ("sapo", {"tau_neg": "1"}, CLIPS, f"{PARAMS}.tau_neg='1': not a number"),
        ("sapo", {"tau_neg": True}, CLIPS, "not a number"),
        ("sapo", {"tau_neg": math.inf}, CLIPS, "not a number"),
        ("clip_cov", {"clip_cov_ratio": 0.0}, CLIPS, "must be above 0"),
        ("clip_cov", {"clip_cov_ratio": 1.5}, CLIPS, "a share of the tokens; set it to at most 1"),
        ("clip_cov", {"clip_cov_lb": 6.0}, CLIPS, f"{PARAMS}.clip_cov_lb=6.0: not below clip_cov_ub=5.0"),
        ("kl_cov", {"kl_cov_ratio": 2.0}, CLIPS, "at most 1"),
        ("kl_cov", {"ppo_kl_coef": -0.1}, CLIPS, "must not be below 0"),
        ("dro", {}, CLIPS, f"{PARAMS}.dro_beta=null: loss_mode=dro needs the weight of its penalty; set it, e.g. 0.1"),
        ("dro", {"dro_beta": 0.0}, CLIPS, "must be above 0"),
        ("ppo", {}, replace(CLIPS, clip_c=1.0), "clip_ratio_c=1.0: bounds the ratio from above; set it above 1"),
        ("dppo_tv", {}, replace(CLIPS, clip_c=0.5), "clip_ratio_c=0.5"),
        ("ppo", {}, replace(CLIPS, clip_low=-0.1), "clip_ratio_low=-0.1: the clip range would not hold ratio 1"),
        ("gspo", {}, replace(CLIPS, clip_high=math.nan), "clip_ratio_high=nan"),
        ("no.such.module:loss", {}, CLIPS, f"{MODE}=no.such.module:loss: cannot be imported"),
    ],
)
def test_what_is_refused(name: str, params: dict[str, Any], clips: ClipRange, message: str) -> None:
    with pytest.raises(ValueError) as error:
        policy_objective(name, params, clips)
    assert message in str(error.value)


OWN = """
from trainer.algorithms.policy.base import Objective, unclipped
from trainer.config.notices import OWN_AGGREGATION

def reinforce(x, scale=1.0):
    return -scale * x.advantages * x.logprobs

def told(x):
    never = x.mask & False
    return Objective(-x.advantages * x.logprobs, ~never, never, {"own/share": x.mask.double().sum() * 0.0 + 0.25})

def looks(x):
    left = sum(field[~x.mask].abs().sum() for field in (x.logprobs, x.old, x.log_ratio, x.advantages))
    loss = unclipped(-x.advantages * x.logprobs)
    found = {"own/left_max": left, "own/columns_max": left * 0.0 + len(x.columns)}
    return Objective(loss.loss, loss.clipped, loss.clipped_lower, found)

def short(x):
    return (-x.advantages * x.logprobs)[:1]

def nothing(x):
    return None
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own_losses.py"
    file.write_text(OWN)
    return file


def test_a_loss_of_ones_own(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, theta = policy_batch(3, LENGTHS), theta_of(3)
    wanted = whole(loss_of("gpg"), batch, theta, likely)
    twice = loss_of(f"{own}:reinforce", {"scale": 2.0})
    value, gradient, _ = whole(pickle.loads(pickle.dumps(twice)), batch, theta, likely)
    assert value == pytest.approx(2 * wanted[0])
    torch.testing.assert_close(gradient, 2 * wanted[1])
    monkeypatch.chdir(own.parent)
    relative = policy_objective("own_losses.py:told", {}, CLIPS)
    assert relative == CustomObjective(f"{own}:told"), "workers may start elsewhere"
    metrics = whole(loss_of(f"{own}:told"), batch, theta, likely)[2]
    assert metrics["own/share"] == 0.25 and metrics["actor/clip_frac"] == 1.0


def test_what_a_loss_of_ones_own_is_given(own: Path) -> None:
    """The fields that the docs promise are 0 where masked, whatever the columns hold there."""
    batch, theta = policy_batch(3, LENGTHS), theta_of(3)
    mask = batch.tokens["loss_mask"]
    for name in ("advantages", "old_logprobs"):
        batch.tokens[name][~mask] = math.nan
    metrics = whole(loss_of(f"{own}:looks"), batch, theta, likely)[2]
    assert metrics["own/left_max"] == 0.0
    assert metrics["own/columns_max"] == len(batch.tokens.keys())


def test_mistakes_in_a_loss_of_ones_own(own: Path) -> None:
    with pytest.raises(ValueError, match=r"scael: unknown parameter of .*it has scale"):
        policy_objective(f"{own}:reinforce", {"scael": 2.0}, CLIPS)
    batch, theta = policy_batch(3, [4, 4]), theta_of(3)
    with pytest.raises(ValueError, match=r"short: returned \[1\] for 8 tokens; return one loss per token"):
        whole(loss_of(f"{own}:short"), batch, theta, likely)
    with pytest.raises(ValueError, match="nothing: returned NoneType for 8 tokens"):
        whole(loss_of(f"{own}:nothing"), batch, theta, likely)


def test_the_docs_name_every_loss_and_parameter() -> None:
    text = (Path(__file__).parents[2] / "docs" / "algorithms" / "policy_losses.md").read_text()
    for name in [*OBJECTIVES, *ALIASES]:
        assert f"`{name}`" in text, name
        for parameter in parameters(name):
            default = DEFAULTS[name][parameter]
            shown = "must be given" if default is None else str(default).replace("0.0002", "2e-4")
            assert f"`{parameter}` ({shown})" in text, parameter


# --- what the driver chooses ----------------------------------------------------------------------------------------


def batch_input(seed: int, lengths: list[int]) -> BatchInput:
    tokens = policy_batch(seed, lengths).tokens
    return BatchInput(tokens["old_logprobs"], tokens["advantages"] * 3, tokens["loss_mask"], torch.tensor(lengths))


def naive_covariance(x: BatchInput) -> dict[int, float]:
    kept = [i for i, m in enumerate(x.mask.tolist()) if m]
    advantages, old = x.advantages.tolist(), x.old.tolist()
    a = sum(advantages[i] for i in kept) / len(kept)
    b = sum(old[i] for i in kept) / len(kept)
    return {i: (advantages[i] - a) * (old[i] - b) for i in kept}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 1.0))
def test_clip_cov_chooses_at_random_within_the_bounds(seed: int, share: float) -> None:
    x = batch_input(seed, LENGTHS)
    params = {"clip_cov_ratio": share, "clip_cov_lb": -1.0, "clip_cov_ub": 2.0}
    loss = loss_of("clip_cov", params)
    column = driver_columns(loss, x, seed=(seed, 1))["chosen_tokens"]
    chosen = set(torch.nonzero(column).flatten().tolist())
    candidates = {i for i, c in naive_covariance(x).items() if -1.0 < c < 2.0}
    assert chosen <= candidates
    assert len(chosen) == min(len(candidates), max(1, int(share * int(x.mask.sum()))))
    assert column.equal(driver_columns(loss, x, seed=(seed, 1))["chosen_tokens"])


def test_clip_cov_draws_again_each_step() -> None:
    x = batch_input(1, [20] * 20)
    loss = loss_of("clip_cov", {"clip_cov_ratio": 0.1, "clip_cov_lb": -99.0, "clip_cov_ub": 99.0})
    draws = torch.stack([driver_columns(loss, x, seed=(1, step))["chosen_tokens"] for step in range(200)])
    frequency = draws.mean(0)[x.mask]
    assert frequency.min() > 0.0 and frequency.max() < 0.3, "every candidate has its turn"


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 1.0))
def test_kl_cov_chooses_the_largest(seed: int, share: float) -> None:
    x = batch_input(seed, LENGTHS)
    column = driver_columns(loss_of("kl_cov", {"kl_cov_ratio": share}), x, seed=(0,))["chosen_tokens"]
    covariance = naive_covariance(x)
    count = max(1, int(share * len(covariance)))
    largest = sorted(covariance, key=lambda i: -covariance[i])[:count]
    assert torch.nonzero(column).flatten().tolist() == sorted(largest)


def test_kl_cov_chooses_the_same_in_any_order() -> None:
    lengths = [3, 5, 2, 6]
    x = batch_input(2, lengths)
    order = [2, 0, 3, 1]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places = torch.tensor([i for row in order for i in range(starts[row], starts[row + 1])])
    moved = BatchInput(x.old[places], x.advantages[places], x.mask[places], x.lengths[order])
    loss = loss_of("kl_cov", {"kl_cov_ratio": 0.3})
    column = driver_columns(loss, x, seed=(0,))["chosen_tokens"]
    assert driver_columns(loss, moved, seed=(0,))["chosen_tokens"].equal(column[places])


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_odd_batches_choose_no_masked_token(name: str) -> None:
    x = batch_input(3, [4, 4])
    nothing = BatchInput(x.old * math.nan, x.advantages * math.nan, torch.zeros(8, dtype=torch.bool), x.lengths)
    assert driver_columns(loss_of(name), nothing, seed=(0,))["chosen_tokens"].eq(0.0).all()
    empty = BatchInput(x.old[:0], x.advantages[:0], x.mask[:0], torch.zeros(2, dtype=torch.int64))
    assert driver_columns(loss_of(name), empty, seed=(0,))["chosen_tokens"].shape == (0,)
    old = x.old.clone()
    old[int(torch.nonzero(x.mask)[0])] = -math.inf
    spoiled = BatchInput(torch.where(x.mask, old, math.nan), x.advantages, x.mask, x.lengths)
    assert covariances(old, x.advantages, x.mask).isfinite().all()
    assert not (driver_columns(loss_of(name), spoiled, seed=(0,))["chosen_tokens"].bool() & ~x.mask).any()


def test_other_losses_need_no_columns() -> None:
    for name in set(OBJECTIVES) - {"clip_cov", "kl_cov"}:
        assert (
            driver_columns(loss_of(name), batch_input(3, [4]), seed=(0,)) == {} == dict.fromkeys(loss_of(name).columns)
        )


def test_the_losses_that_prescribe_their_aggregation_are_those_that_notices_name() -> None:
    prescribed = {name for name, kind in OBJECTIVES.items() if kind.agg_mode is not None}
    assert prescribed | {old for old, new in ALIASES.items() if new in prescribed} == set(OWN_AGGREGATION)
