"""The order of the prompts: every epoch a permutation, and any stop and resume gives the same continuation."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import PromptOrder, steps_per_epoch


@given(
    num_prompts=st.integers(1, 30),
    batch=st.integers(1, 30),
    seed=st.integers(0, 2**40),
    stop=st.integers(0, 20),
    shuffle=st.booleans(),
)
def test_resume_continues_identically(num_prompts: int, batch: int, seed: int, stop: int, shuffle: bool) -> None:
    batch = min(batch, num_prompts)
    whole = PromptOrder(num_prompts, seed=seed, shuffle=shuffle)
    undisturbed = [whole.next_batch(batch) for _ in range(stop + 12)]

    first = PromptOrder(num_prompts, seed=seed, shuffle=shuffle)
    for _ in range(stop):
        first.next_batch(batch)
    second = PromptOrder(num_prompts, seed=seed, shuffle=shuffle)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))

    assert [second.next_batch(batch) for _ in range(12)] == undisturbed[stop:]
    assert second.state_dict() == whole.state_dict()


@given(num_prompts=st.integers(1, 40), batch=st.integers(1, 40), seed=st.integers(0, 1000))
def test_an_epoch_sees_no_prompt_twice_and_drops_less_than_a_batch(num_prompts: int, batch: int, seed: int) -> None:
    batch = min(batch, num_prompts)
    order = PromptOrder(num_prompts, seed=seed, shuffle=True)
    for epoch in range(3):
        rows = [row for _ in range(steps_per_epoch(num_prompts, batch)) for row in order.next_batch(batch)]
        assert order.epoch == epoch
        assert len(set(rows)) == len(rows) > num_prompts - batch
        assert set(rows) <= set(range(num_prompts))


def test_epochs_and_seeds_differ_and_no_shuffle_is_in_order() -> None:
    order, other = PromptOrder(50, seed=1, shuffle=True), PromptOrder(50, seed=2, shuffle=True)
    first, second = order.next_batch(50), order.next_batch(50)
    assert first != second and first != other.next_batch(50)
    straight = PromptOrder(5, seed=1, shuffle=False)
    assert [straight.next_batch(2) for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


def test_the_order_is_the_published_one() -> None:
    """A change of the order would silently break resuming older checkpoints."""
    assert PromptOrder(8, seed=1, shuffle=True).next_batch(8) == [5, 0, 1, 4, 2, 6, 3, 7]


def test_a_batch_larger_than_the_data_names_both() -> None:
    with pytest.raises(ValueError, match=r"data\.train_batch_size=9 is more than the 8 prompts of data\.train_files"):
        PromptOrder(8, seed=1, shuffle=True).next_batch(9)
    with pytest.raises(ValueError, match=r"data\.train_batch_size=0"):
        steps_per_epoch(8, 0)
    assert steps_per_epoch(8, 3) == 2


@pytest.mark.parametrize(
    ("resumed", "message"),
    [
        (PromptOrder(9, seed=1, shuffle=True), r"data\.train_files: this run has 9 prompts, the checkpoint 8 prompts"),
        (PromptOrder(8, seed=2, shuffle=True), r"data\.seed: this run has 2, the checkpoint 1"),
        (PromptOrder(8, seed=1, shuffle=False), r"data\.shuffle: this run has False, the checkpoint True"),
    ],
)
def test_resume_with_other_data_is_refused(resumed: PromptOrder, message: str) -> None:
    state = PromptOrder(8, seed=1, shuffle=True).state_dict()
    with pytest.raises(ValueError, match=message):
        resumed.load_state_dict(state)
