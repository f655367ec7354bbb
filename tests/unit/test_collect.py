"""What a step trains on: groups without signal are replaced, within bounds; long responses pay; greedy baselines."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from collect_world import Recorded

from trainer.collect import Collector, GroupFilter, Overlong
from trainer.data.order import PromptOrder
from trainer.samples import Samples
from trainer.scoring import RewardErrorRate
from workers.protocol import Prompt
from workers.rollout.spec import SamplingSpec

N = 2
SAMPLING = SamplingSpec(N, 1.0, 1.0, -1, 8, False, stop_token_ids=(), logprobs="none")
PROMPTS = [Prompt(index=i, token_ids=(i,)) for i in range(40)]


def collect(source: Recorded, *, batch_size: int = 4, **settings: Any) -> tuple[Samples, dict[str, float]]:
    collector = Collector(
        source,  # type: ignore[arg-type]
        PROMPTS,
        SAMPLING,
        lambda name: nullcontext(),  # type: ignore[arg-type]
        batch_size=batch_size,
        max_error_rate=settings.pop("max_error_rate", 1.0),
        groups=settings.pop("groups", None),
        overlong=settings.pop("overlong", None),
        greedy_baseline=settings.pop("greedy_baseline", False),
    )
    assert not settings
    return collector.collect(PromptOrder(len(PROMPTS), seed=0, shuffle=False), 7)


def indices(samples: Samples) -> list[int]:
    """Prompt of every row, by its index in the data."""
    return [samples.prompts[int(g)].index for g in samples.meta.group]


def every_third(index: int) -> list[float]:
    return [1.0, 0.0] if index % 3 == 0 else [1.0, 1.0]


def test_without_a_filter_a_step_takes_what_comes() -> None:
    source = Recorded(every_third)
    samples, metrics = collect(source)
    assert indices(samples) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert metrics == {"reward/errors": 0, "reward/error_rate": 0}
    assert [options["seed"] for _, options in source.calls] == [(0, 7)] and source.is_asleep


def test_groups_without_signal_are_replaced() -> None:
    source = Recorded(every_third)
    samples, metrics = collect(source, groups=GroupFilter(None, 10))
    assert indices(samples) == [0, 0, 3, 3, 6, 6, 9, 9]
    assert samples.rewards.tolist() == [1, 0] * 4
    asked = [rows for rows, _ in source.calls]
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]], "2 of 4 were of use: 4 for 2 more; 3 of 8: 3 for 1"
    assert len({str(options["seed"]) for _, options in source.calls}) == 3, "no round repeats another's chance"
    assert metrics == {
        "reward/errors": 0,
        "reward/error_rate": 0,
        "filter_groups/rounds": 3,
        "filter_groups/generated": 11,
        "filter_groups/without_signal": 7,
        "filter_groups/filled_up": 0,
    }
    assert not any(options["sleep"] for _, options in source.calls) and source.is_asleep, "asleep once, at the end"


def test_every_response_keeps_its_own_tokens() -> None:
    samples, _ = collect(Recorded(every_third), groups=GroupFilter(None, 10))
    prompts = [int(samples.blocks[b].prompts()[r][0]) for b, r in samples.where]
    assert prompts == indices(samples)


def test_what_is_missing_after_the_last_round_is_filled_up() -> None:
    samples, metrics = collect(Recorded(every_third), groups=GroupFilter(None, 1))
    assert indices(samples) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (metrics["filter_groups/rounds"], metrics["filter_groups/filled_up"]) == (1, 2)


def test_a_task_that_is_solved_still_makes_a_batch() -> None:
    samples, metrics = collect(Recorded(lambda _: [1.0, 1.0]), groups=GroupFilter(None, 3))
    assert indices(samples) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (metrics["filter_groups/generated"], metrics["filter_groups/filled_up"]) == (12, 4)


def test_a_part_of_the_reward_can_decide() -> None:
    source = Recorded(lambda index: [0.1 * index, 0.5], parts=every_third)
    samples, _ = collect(source, groups=GroupFilter("acc", 10))
    assert indices(samples) == [0, 0, 3, 3, 6, 6, 9, 9]
    with pytest.raises(ValueError, match=r"algorithm\.filter_groups\.metric=f1.*\(it gives: acc\)"):
        collect(Recorded(every_third, parts=every_third), groups=GroupFilter("f1", 10))


def test_failed_rewards_are_no_signal_and_are_counted() -> None:
    def rewards(index: int) -> list[float]:
        return [1.0, float("nan")] if index == 0 else [1.0, 0.0]

    samples, metrics = collect(Recorded(rewards), groups=GroupFilter(None, 10))
    assert indices(samples) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert metrics["reward/errors"] == 1
    assert metrics["reward/error_rate"] == pytest.approx(1 / 12)
    with pytest.raises(RewardErrorRate):
        collect(Recorded(rewards), groups=GroupFilter(None, 10), max_error_rate=0.1)


def test_the_share_of_failed_rewards_is_a_steps_not_a_calls() -> None:
    def rewards(index: int) -> list[float]:
        return [float("nan")] * 2 if index == 8 else [1.0, 0.0] if index != 0 else [1.0, 1.0]

    source = Recorded(rewards)
    samples, metrics = collect(source, batch_size=8, groups=GroupFilter(None, 10), max_error_rate=0.12)
    assert [len(rows) for rows, _ in source.calls] == [8, 2] and indices(samples)[::2] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert (metrics["reward/errors"], metrics["reward/error_rate"]) == (2, 0.1), "of the second call it is a half"


def test_a_call_whose_rewards_all_failed_is_followed_by_another() -> None:
    def rewards(index: int) -> list[float]:
        return [float("nan")] * 2 if index in (8, 9) else [1.0, 0.0] if index != 0 else [1.0, 1.0]

    groups = GroupFilter("acc", 10)
    source = Recorded(rewards, parts=lambda index: [1.0, 1.0] if index == 0 else [1.0, 0.0])
    samples, metrics = collect(source, batch_size=8, groups=groups, max_error_rate=0.25)
    assert len(source.calls) == 3 and indices(samples)[-1] == 10 and metrics["reward/errors"] == 4
    with pytest.raises(RewardErrorRate, match=r"4 of 20 rewards failed \(20.0%\)"):
        collect(Recorded(rewards), batch_size=8, groups=GroupFilter(None, 10), max_error_rate=0.15)


def test_a_failed_greedy_reward_counts_among_all_of_the_step() -> None:
    source = Recorded(lambda index: [1.0, 0.0] if index or len(source.calls) == 1 else [float("nan")] * 2)
    samples, metrics = collect(source, greedy_baseline=True, max_error_rate=0.2)
    assert indices(samples) == [1, 1, 2, 2, 3, 3]
    assert (metrics["reward/errors"], metrics["reward/error_rate"]) == (1, pytest.approx(1 / 12)), "not 1 of 4"
    source = Recorded(lambda _: [1.0, 0.0] if len(source.calls) == 1 else [float("nan")] * 2)
    with pytest.raises(RewardErrorRate, match="4 of 4 rewards failed"):
        collect(source, greedy_baseline=True, max_error_rate=1.0)


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (60, 0), (61, -0.05), (70, -0.5), (80, -1), (90, -1)])
def test_overlong_punishment_is_the_papers(length: int, penalty: float) -> None:
    """Equation 13 of https://arxiv.org/abs/2503.14476 with L_max = 80 and L_cache = 20."""
    assert Overlong(80, 20, 1.0).penalty(np.array([length])) == pytest.approx(penalty)
    assert Overlong(80, 20, 0.3).penalty(np.array([length])) == pytest.approx(0.3 * penalty)


def test_the_filter_sees_rewards_before_they_are_punished() -> None:
    source = Recorded(every_third, length=6)
    samples, metrics = collect(source, groups=GroupFilter(None, 10), overlong=Overlong(8, 4, 1.0))
    assert indices(samples) == [0, 0, 3, 3, 6, 6, 9, 9]
    assert samples.rewards.tolist() == [0.5, -0.5] * 4
    assert (metrics["reward/overlong_penalty"], metrics["reward/overlong_ratio"]) == (-0.5, 1)


def test_every_prompt_gets_a_greedy_baseline() -> None:
    def rewards(index: int) -> list[float]:
        return [float("nan") if index == 2 and source.is_second else float(index), 0.5]

    class Second(Recorded):
        @property
        def is_second(self) -> bool:
            return len(self.calls) == 2

    source = Second(rewards)
    samples, metrics = collect(source, greedy_baseline=True)
    assert indices(samples) == [0, 0, 1, 1, 3, 3], "prompt 2 has nothing to compare with"
    assert samples.baseline is not None and samples.baseline.tolist() == [0, 0, 1, 1, 3, 3]
    assert metrics["reward/errors"] == 1
    (_, first), (asked, second) = source.calls
    assert (first["n"], second["n"], asked) == (N, 1, [0, 1, 2, 3])
    assert (first["sleep"], second["sleep"]) == (False, True)
