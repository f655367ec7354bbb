"""Corner cases of every advantage estimator: nothing to compare with, nothing chosen, equal and extreme rewards."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from estimator_formulas import EVERY, GROUP, WHITENED, make_batch, run

from trainer.algorithms.advantages import AdvantageInput

COMPARES = (*GROUP, "optimal_token_baseline")
HUGE = 1e30


def batch(sizes: list[int], *, paid: bool = False, masked: bool = False) -> AdvantageInput:
    return make_batch(7, sizes, masked=masked, paid=paid, binary=False, longest=9)


def with_rewards(x: AdvantageInput, rewards: torch.Tensor) -> AdvantageInput:
    assert x.values is not None
    return replace(x, rewards=rewards, baseline=rewards, parts={"score": rewards}, values=torch.zeros_like(x.values))


@pytest.mark.parametrize("paid", [False, True])
@pytest.mark.parametrize("name", COMPARES)
def test_groups_of_one_have_advantage_0(name: str, paid: bool) -> None:
    """All of them, and one beside a larger group: what is alone is compared with nothing and whitened with nothing."""
    assert run(name, batch([1, 1, 1], paid=paid)).advantages.eq(0.0).all()
    x = batch([1, 4], paid=paid)
    alone = torch.tensor([int((x.group == g).sum()) == 1 for g in x.group])
    result = run(name, x).advantages
    per_token = torch.repeat_interleave(alone, x.lengths)
    assert result[per_token].eq(0.0).all() and result[~per_token].any()


@pytest.mark.parametrize("name", EVERY)
def test_masked_rows_and_empty_responses(name: str) -> None:
    """Nothing chosen in one response of a group, no token at all in another: both 0, the rest finite."""
    x = batch([4, 3], paid=True)
    lengths = torch.tensor([2, 0, 3, 1, 0, 2, 2])
    x = make_batch(3, [4, 3], masked=False, paid=True, binary=False)
    total = int(lengths.sum())
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(total, dtype=torch.bool)
    mask[2:5] = False
    column = torch.rand(total, generator=generator)
    x = replace(
        x,
        lengths=lengths,
        loss_mask=mask,
        token_rewards=torch.where(mask, -column, torch.nan),
        values=torch.where(mask, column, torch.nan),
        logprobs=torch.where(mask, column.log(), torch.nan),
        sum_pi_squared=torch.where(mask, column.square(), torch.nan),
    )
    result = run(name, x)
    assert len(result.advantages) == total and result.advantages.isfinite().all()
    assert result.advantages[~mask].eq(0.0).all() and result.advantages[mask].any()


@pytest.mark.parametrize("name", EVERY)
def test_nothing_to_learn_from(name: str) -> None:
    """No sequence; only empty responses; every token masked; one single token."""
    nothing = torch.zeros(0)
    whole = batch([2, 2])
    columns = {"values": nothing, "logprobs": nothing, "sum_pi_squared": nothing}
    empty = replace(whole, lengths=torch.zeros(4, dtype=torch.int64), **columns)
    assert len(run(name, empty).advantages) == 0
    ids = torch.zeros(0, dtype=torch.int64)
    none = AdvantageInput(nothing, ids, ids, baseline=nothing, parts={"score": nothing}, **columns)
    assert len(run(name, none).advantages) == 0
    masked = replace(whole, loss_mask=torch.zeros(int(whole.lengths.sum()), dtype=torch.bool))
    assert run(name, masked).advantages.eq(0.0).all()
    token = torch.full((1,), 0.5)
    single = AdvantageInput(
        torch.ones(2),
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([0, 1]),
        values=token,
        baseline=torch.ones(2),
        parts={"score": torch.ones(2)},
        logprobs=token.log(),
        sum_pi_squared=token,
    )
    assert run(name, single).advantages.isfinite().all()


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 16777217.0, HUGE])
@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("gae", "reinforce_plus_plus")])
def test_equal_rewards_leave_no_signal(name: str, reward: float) -> None:
    """Exactly 0, however large: no rounding error may pass for a difference once it is divided by its own size."""
    x = batch([3, 5, 7])
    result = run(
        name, with_rewards(x, torch.full((15,), reward)), {"handle_zero_tail": False} if "token" in name else {}
    )
    tolerance = 1e-6 * reward if name == "optimal_token_baseline" else 0.0
    assert float(result.advantages.abs().max()) <= tolerance


@pytest.mark.parametrize("reward", [0.1, HUGE])
def test_equal_returns_are_whitened_to_0(reward: float) -> None:
    x = with_rewards(batch([3, 5, 7]), torch.full((15,), reward))
    assert run("reinforce_plus_plus", x, gamma=1.0).advantages.eq(0.0).all()
    assert run("gae", x, gamma=1.0, lam=1.0).advantages.eq(0.0).all()


@pytest.mark.parametrize("name", EVERY)
def test_huge_rewards_stay_finite(name: str) -> None:
    x = batch([3, 5, 7], paid=True, masked=True)
    rewards = torch.where(torch.arange(15) % 3 == 0, HUGE, 0.0)
    result = run(name, with_rewards(x, rewards))
    assert result.advantages.isfinite().all() and result.advantages.any()
    if name in WHITENED:
        assert float(result.advantages.abs().max()) < 100.0


@pytest.mark.parametrize("wrong", [float("inf"), float("-inf"), float("nan")])
def test_a_reward_that_is_not_finite_is_refused_before_it_spreads(wrong: float) -> None:
    x = batch([2, 2], paid=True)
    bad = x.rewards.clone()
    bad[2] = wrong
    with pytest.raises(
        ValueError, match=r"1 of 4 numbers are not finite in the rewards .* number 2 is .*finite numbers"
    ):
        replace(x, rewards=bad)
    with pytest.raises(ValueError, match="not finite in the greedy baselines"):
        replace(x, baseline=bad)
    with pytest.raises(ValueError, match=r"part answer of the rewards.*gdpo the reward function must return each part"):
        run("gdpo", replace(x, parts={"answer": bad}))
    assert x.token_rewards is not None
    penalty = x.token_rewards.clone()
    penalty[0] = wrong
    with pytest.raises(ValueError, match=r"not finite in the KL penalties.*algorithm\.kl_penalty=kl"):
        replace(x, token_rewards=penalty)
    with pytest.raises(ValueError, match=r"not finite in the returns of algorithm\.adv_estimator=gae|advantages of"):
        run("gae", replace(x, values=torch.full_like(penalty, wrong)))


def test_a_part_that_gdpo_does_not_use_may_be_missing() -> None:
    x = batch([2, 2])
    parts = {"answer": x.rewards, "rare": torch.full((4,), float("nan"))}
    assert run("gdpo", replace(x, parts=parts), {"weights": {"answer": 1.0}}).advantages.isfinite().all()


def test_what_an_estimator_lacks_is_named() -> None:
    x = batch([2, 2])
    for name, change, message in (
        ("gae", {"values": None}, "adv_estimator=gae needs values"),
        ("remax", {"baseline": None}, "needs the reward of a greedy response"),
        ("optimal_token_baseline", {"sum_pi_squared": None}, "sums of squared probabilities"),
        ("optimal_token_baseline", {"logprobs": None}, "needs the policy's log-probs"),
        ("gdpo", {"parts": {}}, 'the rewards have no parts; let the reward function return a dictionary with "score"'),
    ):
        with pytest.raises(ValueError, match=message):
            run(name, replace(x, **change))
    with pytest.raises(ValueError, match=r"max_rl: 1 of 4 rewards are below 0 \(lowest: -0\.5\).*give 0 for a failure"):
        run("max_rl", replace(x, rewards=torch.tensor([0.0, -0.5, 1.0, 1.0])))


@pytest.mark.parametrize("name", EVERY)
def test_512_responses_of_1024_tokens_take_well_under_a_second(name: str) -> None:
    num, length = 512, 1024
    generator = torch.Generator().manual_seed(0)

    def column() -> torch.Tensor:
        return torch.rand(num * length, generator=generator)

    x = AdvantageInput(
        rewards=torch.rand(num, generator=generator),
        group=torch.arange(num) // 8,
        lengths=torch.full((num,), length),
        token_rewards=column(),
        values=column(),
        loss_mask=column() > 0.1,
        parts={"a": torch.rand(num, generator=generator), "b": torch.rand(num, generator=generator)},
        baseline=torch.rand(num, generator=generator),
        logprobs=column().log(),
        sum_pi_squared=column(),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.thread_time()  # of the processor: other programs on the machine do not count
        run(name, x)
        seconds = time.thread_time() - start
    finally:
        torch.set_num_threads(threads)
    assert seconds < 1.0, f"{seconds:.2f} s"  # the slowest takes 0.1 s
