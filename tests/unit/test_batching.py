"""What every plan must hold, for arbitrary lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.batching import (
    BALANCE_TOLERANCE,
    BatchPlan,
    IntArray,
    Limits,
    MiniBatch,
    plan_batch,
    plan_forward,
    to_local,
)

HIDDEN = 64


@dataclass(frozen=True)
class Case:
    prompt: IntArray
    response: IntArray
    group: IntArray
    num_ranks: int
    groups_per_minibatch: int
    limits: Limits
    epochs: int
    seed: int | None

    def plan(self, num_ranks: int | None = None, rank_of: IntArray | None = None) -> BatchPlan:
        return plan_batch(
            self.prompt,
            self.response,
            self.group,
            groups_per_minibatch=self.groups_per_minibatch,
            num_ranks=num_ranks or self.num_ranks,
            limits=self.limits,
            epochs=self.epochs,
            shuffle_seed=self.seed,
            rank_of=rank_of,
            hidden_size=HIDDEN,
        )

    def tokens(self, rows: tuple[int, ...]) -> int:
        if not self.limits.share_prompt:
            return sum(int(self.prompt[r] + self.response[r]) for r in rows)
        prompts = {int(self.group[r]): int(self.prompt[r]) for r in rows}
        return sum(prompts.values()) + sum(int(self.response[r]) for r in rows)

    def row_flops(self, row: int) -> tuple[float, float]:
        """Of the response and of its prompt."""
        p, r = float(self.prompt[row]), float(self.response[row])
        return 12 * HIDDEN * r + r * r + 2 * p * r, 12 * HIDDEN * p + p * p

    def flops(self, rows: list[int]) -> float:
        response = sum(self.row_flops(r)[0] for r in rows)
        prompts = {int(self.group[r]) if self.limits.share_prompt else r: self.row_flops(r)[1] for r in rows}
        return response + sum(prompts.values())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_groups = draw(st.integers(1, 10))
    sizes = draw(st.lists(st.integers(1, 6), min_size=num_groups, max_size=num_groups))
    prompts = draw(st.lists(st.integers(1, 50), min_size=num_groups, max_size=num_groups))
    total = sum(sizes)
    response = np.array(draw(st.lists(st.integers(0, 100), min_size=total, max_size=total)), dtype=np.int64)
    group = np.repeat(np.array(draw(st.permutations(range(num_groups))), dtype=np.int64) * 3, sizes)
    prompt = np.repeat(np.array(prompts, dtype=np.int64), sizes)
    longest = int((prompt + response).max())
    limits = Limits(
        max_tokens=draw(st.integers(longest, longest + 400)),
        max_sequences=draw(st.sampled_from([None, 1, 2, 5])),
        share_prompt=draw(st.booleans()),
    )
    return Case(
        prompt,
        response,
        group,
        num_ranks=draw(st.integers(1, 5)),
        groups_per_minibatch=draw(st.integers(1, num_groups)),
        limits=limits,
        epochs=draw(st.integers(1, 3)),
        seed=draw(st.sampled_from([None, 0, 7])),
    )


def check_minibatch(case: Case, minibatch: MiniBatch, rank_of: IntArray) -> None:
    assert len(minibatch.ranks) == case.num_ranks
    assert {len(rank) for rank in minibatch.ranks} == {minibatch.num_micro_batches}
    assert any(rank[-1] for rank in minibatch.ranks), "a micro-batch that is empty everywhere"
    for number, rank in enumerate(minibatch.ranks):
        for rows in rank:
            assert case.tokens(rows) <= case.limits.max_tokens
            assert case.limits.max_sequences is None or len(rows) <= case.limits.max_sequences
            assert all(rank_of[r] == number for r in rows)
            groups = [case.group[r] for r in rows]
            assert sum(a != b for a, b in zip(groups[1:], groups, strict=False)) + 1 == len(set(groups)) or not rows


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_every_plan(case: Case) -> None:
    plan = case.plan()
    per_epoch = -(-len(set(case.group.tolist())) // case.groups_per_minibatch)
    assert len(plan.minibatches) == case.epochs * per_epoch
    for minibatch in plan.minibatches:
        check_minibatch(case, minibatch, plan.rank_of)
        groups = set(case.group[minibatch.rows].tolist())
        assert minibatch.rows.tolist() == np.flatnonzero(np.isin(case.group, list(groups))).tolist()
        assert len(groups) <= case.groups_per_minibatch
    for epoch in range(case.epochs):
        seen = np.concatenate([m.rows for m in plan.minibatches[epoch * per_epoch : (epoch + 1) * per_epoch]])
        assert sorted(seen.tolist()) == list(range(len(case.group)))
    again = case.plan()
    assert again.minibatches == plan.minibatches and (again.rank_of == plan.rank_of).all()
    assert sorted(r for n in range(case.num_ranks) for r in plan.rows_of_rank(n)) == list(range(len(case.group)))


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_minibatches_do_not_depend_on_the_number_of_ranks(case: Case) -> None:
    alone = [m.rows.tolist() for m in case.plan(num_ranks=1).minibatches]
    assert [m.rows.tolist() for m in case.plan(num_ranks=3).minibatches] == alone


@settings(deadline=None, max_examples=100)
@given(case=cases())
def test_ranks_are_balanced(case: Case) -> None:
    """No rank is over the mean by more than the tolerance and the cost of one row."""
    plan = case.plan()
    for minibatch in plan.minibatches[: len(plan.minibatches) // case.epochs]:
        loads = [case.flops([r for rows in rank for r in rows]) for rank in minibatch.ranks]
        row = max(sum(case.row_flops(r)) for r in minibatch.rows.tolist())
        assert max(loads) <= sum(loads) / case.num_ranks * (1 + BALANCE_TOLERANCE) + row + 1e-6


@settings(deadline=None, max_examples=100)
@given(case=cases())
def test_micro_batches_are_few_and_groups_whole(case: Case) -> None:
    """On one rank, no two micro-batches would fit into one, and a group that fits is in one."""
    case = Case(case.prompt, case.response, case.group, 1, 100, Limits(case.limits.max_tokens), 1, None)
    (minibatch,) = case.plan().minibatches
    used = [case.tokens(rows) for rows in minibatch.ranks[0]]
    assert len(used) <= 2 * sum(used) / case.limits.max_tokens + 1
    where = {row: k for k, rows in enumerate(minibatch.ranks[0]) for row in rows}
    for group in set(case.group.tolist()):
        rows = np.flatnonzero(case.group == group).tolist()
        if case.tokens(tuple(rows)) <= case.limits.max_tokens:
            assert len({where[r] for r in rows}) == 1


@settings(deadline=None, max_examples=60)
@given(case=cases(), data=st.data())
def test_rows_stay_where_they_were_put(case: Case, data: st.DataObject) -> None:
    places = st.lists(st.integers(0, case.num_ranks - 1), min_size=len(case.group), max_size=len(case.group))
    rank_of = np.array(data.draw(places), dtype=np.int64)
    plan = case.plan(rank_of=rank_of)
    assert (plan.rank_of == rank_of).all()
    forward = plan_forward(
        case.prompt, case.response, case.group, num_ranks=case.num_ranks, limits=case.limits, rank_of=rank_of
    )
    assert forward.rows.tolist() == list(range(len(case.group)))
    for minibatch in (*plan.minibatches, forward):
        check_minibatch(case, minibatch, rank_of)


def test_crowded_micro_batches() -> None:
    """Tight budgets and uneven ranks, where evening out FLOPs does not always fit and packing falls back."""
    rng = np.random.default_rng(0)
    for trial in range(300):
        num_groups = int(rng.integers(4, 25))
        group = np.arange(num_groups).repeat(rng.integers(1, 6, num_groups))
        prompt = rng.integers(1, 60, num_groups)[group]
        response = rng.choice([0, 1, int(rng.integers(1, 100)), 100], len(group))
        limits = Limits(int((prompt + response).max() + rng.integers(0, 30)), (None, 5, 6)[trial % 3])
        case = Case(prompt, response, group, 2, num_groups, limits, 1, None)
        rank_of = rng.integers(0, 2, len(group))
        check_minibatch(case, case.plan(rank_of=rank_of).minibatches[0], rank_of)


def uniform(num_groups: int, n: int, prompt: int = 10, response: int = 20) -> tuple[IntArray, IntArray, IntArray]:
    size = num_groups * n
    group = np.repeat(np.arange(num_groups, dtype=np.int64), n)
    return np.full(size, prompt, dtype=np.int64), np.full(size, response, dtype=np.int64), group


def test_whole_groups_on_two_ranks() -> None:
    plan = plan_batch(*uniform(64, 8), groups_per_minibatch=64, num_ranks=2, limits=Limits(16384))
    (minibatch,) = plan.minibatches
    assert minibatch.num_micro_batches == 1
    assert [len(rank[0]) for rank in minibatch.ranks] == [256, 256]
    assert all(len(set(plan.rank_of[g * 8 : g * 8 + 8].tolist())) == 1 for g in range(64))


@pytest.mark.parametrize("prompt", [10, 1000])
def test_a_group_is_split_for_balance_only(prompt: int) -> None:
    """Also where both ranks then have to compute a long prompt: the slower one is still done earlier."""
    plan = plan_batch(*uniform(3, 8, prompt), groups_per_minibatch=3, num_ranks=2, limits=Limits(16384))
    per_group = [np.bincount(plan.rank_of[g * 8 : g * 8 + 8], minlength=2).tolist() for g in range(3)]
    assert sorted(per_group) == [[0, 8], [4, 4], [8, 0]]


def test_long_context_counts_more_than_its_tokens() -> None:
    """One response of 4,000 tokens costs more than four of 1,000: attention is quadratic."""
    response = np.array([4000] + [1000] * 5, dtype=np.int64)
    plan = plan_forward(
        np.ones(6, dtype=np.int64), response, np.arange(6), num_ranks=2, limits=Limits(8000), hidden_size=64
    )
    assert [sorted(r for rows in rank for r in rows) for rank in plan.ranks] == [[0], [1, 2, 3, 4, 5]]


def test_more_ranks_than_sequences() -> None:
    plan = plan_forward(*uniform(1, 2), num_ranks=4, limits=Limits(100))
    assert plan.ranks == (((0,),), ((1,),), ((),), ((),))
    nothing = np.zeros(0, dtype=np.int64)
    assert plan_forward(nothing, nothing, nothing, num_ranks=2, limits=Limits(100)).ranks == ((), ())


def test_shuffled_epochs() -> None:
    def order(seed: int | tuple[int, int] | None) -> list[list[int]]:
        plan = plan_batch(
            *uniform(12, 2), groups_per_minibatch=4, num_ranks=2, limits=Limits(100), epochs=2, shuffle_seed=seed
        )
        return [m.rows.tolist() for m in plan.minibatches]

    plain = order(None)
    assert plain[:3] == plain[3:] == [list(range(0, 8)), list(range(8, 16)), list(range(16, 24))]
    assert order(42) == order(42) != order(43)
    assert order((42, 1)) != order((42, 2))
    assert order(42)[:3] != order(42)[3:]


def test_a_sequence_over_the_budget_is_refused() -> None:
    key = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
    with pytest.raises(ValueError, match=rf"{key}=29 is too small: .* has 30 tokens; set it to at least 30"):
        plan_batch(*uniform(2, 2), groups_per_minibatch=2, num_ranks=1, limits=Limits(29))
    with pytest.raises(ValueError, match=r"critic.ppo_max_token_len_per_gpu=5"):
        plan_forward(*uniform(2, 2), num_ranks=1, limits=Limits(5, key="critic.ppo_max_token_len_per_gpu"))


def test_local_rows() -> None:
    rows = np.array([2, 5, 9], dtype=np.int64)
    assert to_local(((9, 2), (), (5,)), rows) == ((2, 0), (), (1,))
