"""Losses against formulas written out with Python loops, and their independence of how a mini-batch is split."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_world import (
    COLUMNS,
    CPU,
    INPUTS,
    LENGTH,
    VOCABULARY,
    accumulate,
    by_sequence,
    make_batch,
    naive_aggregate,
    norm_of,
    splits,
    theta_of,
    whole,
)

from trainer.algorithms import kl
from trainer.algorithms.aggregation import AGGREGATION_MODES, aggregate, count_loss_tokens, normalizers
from trainer.algorithms.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from trainer.algorithms.policy.clipped import Gspo, Ppo
from trainer.algorithms.thresholds import Bounds, Correction
from trainer.config.schema import (
    ActorConfig,
    CriticConfig,
    KlCtrlConfig,
    PolicyLossConfig,
    RolloutCorrectionConfig,
)
from workers.batch import Batch
from workers.normalizers import Normalizers

PPO = Ppo(clip_low=0.2, clip_high=0.28, clip_c=3.0)
POLICY = PolicyLoss(
    objective=PPO,
    agg_mode="token-mean",
    entropy_coeff=0.01,
    calculate_entropy=False,
    kl_loss_coef=0.1,
    kl_loss_type="k3",
    length=LENGTH,
)
VALUE = ValueLoss(clip=0.5, agg_mode="token-mean", length=LENGTH)


# --- formulas written out -------------------------------------------------------------------------------------------


def naive_ppo(new: float, old: float, advantage: float) -> float:
    ratio = math.exp(min(max(new - old, -20.0), 20.0))
    result = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.28))
    return min(result, -advantage * 3.0) if advantage < 0 else result


def naive_k3(new: float, ref: float) -> float:
    x = min(max(ref - new, -20.0), 20.0)
    return min(max(math.exp(x) - x - 1.0, -10.0), 10.0)


def naive_policy_loss(loss: PolicyLoss, batch: Batch, theta: list[float]) -> float:
    columns = {name: batch.tokens[name].tolist() for name in COLUMNS}
    targets = [int(t) for response in batch.responses for t in response]
    new = [b + theta[t] for b, t in zip(columns["base"], targets, strict=True)]
    scale = 1.0 + sum(theta) / len(theta)
    per_token = []
    for i, logprob in enumerate(new):
        value = naive_ppo(logprob, columns["old_logprobs"][i], columns["advantages"][i])
        value -= loss.entropy_coeff * columns["entropy"][i] * scale
        value += (loss.kl_loss_coef or 0.0) * naive_k3(logprob, columns["ref_logprobs"][i])
        per_token.append(value)
    return naive_aggregate(by_sequence(batch, per_token), loss.agg_mode)


def naive_value_loss(loss: ValueLoss, batch: Batch, theta: list[float]) -> float:
    targets = [int(t) for response in batch.responses for t in response]
    rows = zip(*(batch.tokens[c].tolist() for c in ("base", "values", "returns")), targets, strict=True)
    per_token = []
    for base, old, target_return, target in rows:
        new = base + theta[target]
        near = min(max(new, old - loss.clip), old + loss.clip)
        per_token.append(0.5 * max((new - target_return) ** 2, (near - target_return) ** 2))
    return naive_aggregate(by_sequence(batch, per_token), loss.agg_mode)


LENGTHS = [3, 0, 5, 1, 8, 2, 4]


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_loss_and_gradient_are_the_formula(mode: str, kind: str) -> None:
    loss = replace(POLICY, agg_mode=mode) if kind == "policy" else replace(VALUE, agg_mode=mode)
    batch, theta = make_batch(5, LENGTHS), theta_of(6)

    def naive(at: list[float]) -> float:
        if isinstance(loss, PolicyLoss):
            return naive_policy_loss(loss, batch, at)
        return naive_value_loss(loss, batch, at)

    value, gradient, _ = whole(loss, batch, theta)
    assert value == pytest.approx(naive(theta.tolist()), rel=1e-12)
    step = 1e-6
    for i in range(VOCABULARY):
        up, down = theta.tolist(), theta.tolist()
        up[i] += step
        down[i] -= step
        assert gradient[i].item() == pytest.approx((naive(up) - naive(down)) / (2 * step), abs=1e-8)


def one_token(loss: PolicyLoss, ratio: float, advantage: float) -> tuple[float, float, dict[str, float]]:
    """Loss, its derivative by the log-prob and metrics for a single token."""
    batch = make_batch(0, [1])
    for name, value in {"advantages": advantage, "base": math.log(ratio), "old_logprobs": 0.0}.items():
        batch.tokens[name] = torch.tensor([value], dtype=torch.float64)
    batch.tokens["loss_mask"] = torch.tensor([True])
    value, gradient, metrics = whole(loss, batch, torch.zeros(VOCABULARY, dtype=torch.float64))
    return value, gradient.sum().item(), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope", "clipped", "clipped_lower"),
    [
        (1.1, 2.0, -2.2, -2.2, 0, 0),  # inside the range
        (1.5, 2.0, -2.56, 0.0, 1, 0),  # too likely already: bounded by 1 + 0.28
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # became less likely although good: pulled back
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # unlikely enough: bounded by 1 - 0.2
        (1.5, -2.0, 3.0, 3.0, 0, 0),  # became more likely although bad: pushed down
        (5.0, -2.0, 6.0, 0.0, 0, 1),  # dual clip at 3
        (1.0, 0.0, 0.0, 0.0, 0, 0),
    ],
)
def test_clipping_by_hand(
    ratio: float, advantage: float, value: float, slope: float, clipped: int, clipped_lower: int
) -> None:
    loss = replace(POLICY, entropy_coeff=0.0, kl_loss_coef=None)
    got, gradient, metrics = one_token(loss, ratio, advantage)
    assert got == pytest.approx(value) and gradient == pytest.approx(slope)
    assert metrics["actor/clip_frac"] == clipped and metrics["actor/clip_frac_lower"] == clipped_lower
    assert metrics["actor/ppo_kl"] == pytest.approx(-math.log(ratio))
    assert metrics["actor/ratio_max"] == pytest.approx(ratio) == metrics["actor/ratio_min"]
    assert metrics["actor/loss"] == pytest.approx(value) == metrics["actor/pg_loss"]


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    """Without old log-probs, and with old log-probs equal to the new ones: d/dtheta of -mean(A log p)."""
    loss = replace(POLICY, entropy_coeff=0.0, kl_loss_coef=None)
    batch, theta = make_batch(1, LENGTHS), theta_of(2)
    mask = batch.tokens["loss_mask"]
    targets = torch.from_numpy(np.concatenate(batch.responses).astype(np.int64))
    expected = torch.zeros(VOCABULARY, dtype=torch.float64)
    expected.index_add_(0, targets, -batch.tokens["advantages"] * mask / mask.sum())
    batch.tokens["old_logprobs"] = batch.tokens["base"] + theta[targets]
    given_old = whole(loss, batch, theta)
    del batch.tokens["old_logprobs"]
    for value, gradient, metrics in (given_old, whole(loss, batch, theta)):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)
        assert value == pytest.approx(-(batch.tokens["advantages"] * mask).sum().item() / mask.sum().item())
        assert metrics["actor/ppo_kl"] == 0.0 and metrics["actor/clip_frac"] == 0.0
        assert metrics["actor/ratio_max"] == 1.0 == metrics["actor/ratio_min"]


# --- independence of the split --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(split=splits(), mode=st.sampled_from(AGGREGATION_MODES), kind=st.sampled_from([POLICY, VALUE]))
def test_any_split_gives_the_same(
    split: tuple[int, list[int], list[list[int]]], mode: str, kind: PolicyLoss | ValueLoss
) -> None:
    seed, lengths, parts = split
    loss, batch, theta = replace(kind, agg_mode=mode), make_batch(seed, lengths), theta_of(seed)
    value, gradient, metrics = whole(loss, batch, theta)
    value_split, gradient_split, metrics_split = accumulate(loss, batch, theta, parts)
    assert value_split == pytest.approx(value, rel=1e-11, abs=1e-12)
    torch.testing.assert_close(gradient_split, gradient, rtol=1e-10, atol=1e-12)
    assert metrics_split == pytest.approx(metrics, rel=1e-6, abs=1e-12)  # shares of tokens are float32


@settings(deadline=None, max_examples=15)
@given(split=splits(), mode=st.sampled_from(AGGREGATION_MODES))
def test_any_split_gives_the_same_in_float32(split: tuple[int, list[int], list[list[int]]], mode: str) -> None:
    seed, lengths, parts = split
    loss, batch = replace(POLICY, agg_mode=mode), make_batch(seed, lengths, torch.float32)
    theta = theta_of(seed, torch.float32)
    _, gradient, _ = whole(loss, batch, theta)
    _, gradient_split, _ = accumulate(loss, batch, theta, parts)
    assert (gradient - gradient_split).norm() <= 1e-6 * gradient.norm() + 1e-12


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_aggregate_alone(seed: int, lengths: list[int]) -> None:
    batch = make_batch(seed, lengths)
    micro = batch.micro_batch(range(len(lengths)), norm_of(batch), share_prompt=False, device=CPU)
    mask, values = micro.tokens["loss_mask"], micro.tokens["base"]
    for mode in AGGREGATION_MODES:
        result = aggregate(values, mask, micro.sequence, micro.num_sequences, mode=mode, norm=micro.norm)
        expected = naive_aggregate(by_sequence(batch, values.tolist()), mode) if mask.any() else 0.0
        assert result.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


# --- extreme inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_wild_ratios_are_finite(mode: str, shift: float) -> None:
    batch = make_batch(3, LENGTHS, torch.float32)
    batch.tokens["base"] = batch.tokens["base"] + shift
    value, gradient, metrics = whole(replace(POLICY, agg_mode=mode), batch, theta_of(3, torch.float32))
    assert math.isfinite(value) and gradient.isfinite().all() and all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("loss", [POLICY, VALUE], ids=["policy", "value"])
@pytest.mark.parametrize("mode", AGGREGATION_MODES)
@pytest.mark.parametrize("lengths", [[4, 2], [0, 0], []], ids=["masked", "no tokens", "no sequences"])
def test_nothing_to_learn_from(loss: PolicyLoss | ValueLoss, mode: str, lengths: list[int]) -> None:
    """Zero, not NaN, even where masked tokens hold NaN."""
    batch = make_batch(3, lengths)
    batch.tokens["loss_mask"] = torch.zeros(sum(lengths), dtype=torch.bool)
    for name in INPUTS:
        batch.tokens[name] = torch.full((sum(lengths),), math.nan, dtype=torch.float64)
    value, gradient, metrics = whole(replace(loss, agg_mode=mode), batch, theta_of(3))
    assert value == 0.0 and gradient.eq(0.0).all()
    assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("loss", [POLICY, replace(POLICY, kl_loss_type="k2"), VALUE], ids=["k3", "k2", "value"])
def test_masked_tokens_do_not_reach_the_gradient(loss: PolicyLoss | ValueLoss) -> None:
    batch, theta = make_batch(4, LENGTHS), theta_of(4)
    before = whole(loss, batch, theta)
    for name in INPUTS:
        batch.tokens[name][~batch.tokens["loss_mask"]] = math.nan
    after = whole(loss, batch, theta)
    assert after[0] == before[0] and after[2] == before[2]
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


# --- the rest -------------------------------------------------------------------------------------------------------


def test_mismatch_counts_only_what_was_asked() -> None:
    batch = make_batch(0, [4])
    batch.tokens["loss_mask"] = torch.tensor([True, True, True, False])
    batch.tokens["old_logprobs"] = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    batch.tokens["rollout_logprobs"] = torch.tensor([-1.5, math.nan, -2.75, 9.0], dtype=torch.float64)
    _, _, metrics = whole(POLICY, batch, theta_of(0))
    assert metrics["mismatch/num_tokens"] == 2.0
    assert metrics["mismatch/logprob_abs_diff_sum"] == pytest.approx(0.75)
    assert metrics["mismatch/logprob_abs_diff_max"] == pytest.approx(0.5)
    assert metrics["mismatch/kl_sum"] == pytest.approx(math.exp(0.5) - 1.5 + math.exp(-0.25) - 0.75)


def test_metrics_follow_what_is_computed() -> None:
    batch, theta = make_batch(0, LENGTHS), theta_of(0)
    del batch.tokens["rollout_logprobs"], batch.tokens["ref_logprobs"]
    bare = replace(POLICY, entropy_coeff=0.0, kl_loss_coef=None)
    assert not bare.needs_entropy and not bare.needs_reference
    names = "pg_loss ppo_kl clip_frac clip_frac_lower ratio_max ratio_min loss"
    assert set(whole(bare, batch, theta)[2]) == {f"actor/{n}" for n in names.split()}
    watched = whole(replace(bare, calculate_entropy=True), batch, theta)
    assert watched[0] == whole(bare, batch, theta)[0] and "actor/entropy" in watched[2]
    assert set(whole(VALUE, batch, theta)[2]) == {"critic/value_loss", "critic/clip_frac", "critic/value_mean"}


def test_losses_from_configuration_travel() -> None:
    actor = ActorConfig.model_construct(
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
        clip_ratio_c=4.0,
        policy_loss=PolicyLossConfig(loss_mode="vanilla", params={}),
        loss_agg_mode="token-sum",
        entropy_coeff=0.0,
        calculate_entropy=True,
        use_kl_loss=False,
        kl_loss_coef=0.5,
        kl_loss_type="k2",
        loss_scale_factor=None,
    )
    plain = RolloutCorrectionConfig(
        rollout_is=None,
        rollout_is_threshold=2.0,
        rollout_rs=None,
        rollout_rs_threshold=None,
        bypass_mode=False,
        rollout_is_batch_normalize=False,
    )
    loss = policy_loss(actor, 64, plain)
    assert loss == PolicyLoss(Ppo(0.1, 0.3, 4.0), "token-sum", 0.0, True, None, "k2", 64.0)
    changed = actor.model_copy(
        update={
            "loss_scale_factor": 9.0,
            "use_kl_loss": True,
            "policy_loss": PolicyLossConfig(loss_mode="gspo", params={}),
        }
    )
    icepop = plain.model_copy(update={"rollout_is": "token", "rollout_is_threshold": "0.5_5"})
    assert policy_loss(changed, 64, icepop) == replace(
        loss,
        objective=Gspo(0.1, 0.3),
        length=9.0,
        kl_loss_coef=0.5,
        correction=Correction(level="token", bounds=Bounds(0.5, 5.0)),
    )
    with pytest.raises(ValueError, match="loss_scale_factor=0: the loss is divided by it; set it above 0"):
        policy_loss(actor.model_copy(update={"loss_scale_factor": 0.0}), 64, plain)
    critic = CriticConfig.model_construct(cliprange_value=0.4, loss_agg_mode="token-mean")
    assert value_loss(critic, 64) == ValueLoss(0.4, "token-mean", 64.0)
    assert pickle.loads(pickle.dumps(loss)) == loss


def test_unknown_names_are_refused() -> None:
    batch = make_batch(0, [2])
    with pytest.raises(ValueError, match="loss_agg_mode='mean' is unknown; choose one of token-mean"):
        whole(replace(VALUE, agg_mode="mean"), batch, theta_of(0))
    with pytest.raises(ValueError, match="KL estimator 'k4' is unknown"):
        kl.estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_normalizers() -> None:
    lengths, mask = np.array([2, 0, 3]), np.array([True, False, True, True, True])
    assert count_loss_tokens(lengths, None).tolist() == [2, 0, 3]
    counts = count_loss_tokens(lengths, mask)
    assert counts.tolist() == [1, 0, 3]
    assert normalizers(counts, length=8.0) == Normalizers(num_tokens=4.0, num_sequences=3.0, length=8.0)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("k1", "kl"), [0.5, -0.5, 1000.0]),
        (("abs",), [0.5, 0.5, 1000.0]),
        (("k2", "mse"), [0.125, 0.125, 500000.0]),
        (("k3", "low_var_kl"), [math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5, 10.0]),
    ],
)
def test_kl_estimators(names: Sequence[str], expected: list[float]) -> None:
    logprobs = torch.tensor([-1.0, -2.0, 0.0], dtype=torch.float64)
    reference = torch.tensor([-1.5, -1.5, -1000.0], dtype=torch.float64)
    for name in names:
        assert kl.estimate(logprobs, reference, name).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("base", ["k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl"])
def test_straight_through_estimators(base: str) -> None:
    """With + the value is the estimator's, the slope that of k2: log policy - log reference."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.5, -0.5, -300.0], dtype=torch.float64)
    value = kl.estimate(logprobs, reference, f"{base}+")
    assert value.tolist() == kl.estimate(logprobs, reference, base).tolist()
    (slope,) = torch.autograd.grad(value.sum(), logprobs)
    assert slope.tolist() == pytest.approx([0.5, -0.5, 0.0, 297.0])


def test_expected_gradients_of_estimators() -> None:
    """What the docs say of each in a loss, by enumeration of all outcomes of one token."""
    generator = torch.Generator().manual_seed(0)
    logits, others = (torch.randn(6, dtype=torch.float64, generator=generator) * 0.5 for _ in range(2))
    logits.requires_grad_()
    policy, reference = logits.log_softmax(0), others.log_softmax(0)

    def gradient(y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(y, logits, retain_graph=True)[0]

    forward = gradient((policy.exp() * (policy - reference)).sum())
    backward = gradient((reference.exp() * (reference - policy)).sum())
    expected = {"k1": torch.zeros(6), "k2": forward, "k3": backward, "k1+": forward, "k3+": forward, "abs+": forward}
    for kind, wanted in expected.items():
        found = gradient((policy.exp().detach() * kl.estimate(policy, reference, kind)).sum())
        torch.testing.assert_close(found, wanted.double(), rtol=1e-10, atol=1e-12)


def test_k3_keeps_small_divergences() -> None:
    """x^2 / 2 for a small difference, which exp(x) - 1 - x in float32 would round away."""
    small = kl.k3(torch.tensor([0.0]), torch.tensor([1e-3]))
    assert small.item() == pytest.approx(5e-7, rel=1e-2)


def test_kl_in_the_reward() -> None:
    logprobs, reference = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([-1.0, -3.0, -5.0, math.nan])
    mask = torch.tensor([True, True, True, False])
    rewards, mean = kl.reward_penalty(logprobs, reference, mask, torch.tensor([2, 1, 1, 0]), kind="k1", coef=0.5)
    assert rewards.tolist() == [-0.5, -1.5, -2.5, 0.0]
    assert mean == pytest.approx((2.0 + 5.0 + 0.0 + 0.0) / 4)


def test_kl_controllers() -> None:
    cfg = KlCtrlConfig.model_construct(type="adaptive", kl_coef=0.1, horizon=1000, target_kl=2.0)
    controller = kl.kl_controller(cfg)
    controller.update(current_kl=2.2, num_sequences=100)  # 10 % too high
    assert controller.coef == pytest.approx(0.1 * 1.01)
    controller.update(current_kl=100.0, num_sequences=100)  # held at 20 %
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02)
    resumed = kl.kl_controller(cfg)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coef == controller.coef
    fixed = kl.kl_controller(cfg.model_copy(update={"type": "fixed"}))
    fixed.update(current_kl=100.0, num_sequences=100)
    fixed.load_state_dict(fixed.state_dict())
    resumed = kl.kl_controller(cfg)
    resumed.load_state_dict(fixed.state_dict())
    assert resumed.coef == 0.1, "adaptive from now on"
    assert fixed.coef == 0.1
