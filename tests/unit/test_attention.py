"""Packed attention is plain causal attention of each sequence by itself, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from workers.batch import Batch, Segments
from workers.engines.attention import BUCKET_WASTE, gather_rows, hf_attention, packed_attention, prepare
from workers.normalizers import Normalizers

Groups = list[tuple[int, list[int]]]
"""(prompt length, response lengths) of each group."""

HEAD_DIM = 6
SCALE = 0.37


def segments_of(groups: Groups, *, share_prompt: bool) -> tuple[Segments, int]:
    """The attention pattern of these lengths, and the number of packed rows."""
    lengths = [(group, prompt, r) for group, (prompt, responses) in enumerate(groups) for r in responses]
    total = sum(r for _, _, r in lengths)
    batch = Batch(
        [np.ones(prompt, dtype=np.int32) for _, prompt, _ in lengths],
        [np.ones(r, dtype=np.int32) for _, _, r in lengths],
        np.array([group for group, _, _ in lengths], dtype=np.int32),
        TensorDict({"loss_mask": torch.ones(total, dtype=torch.bool)}, batch_size=[total]),
    )
    norm = Normalizers(1.0, 1.0)
    micro = batch.micro_batch(range(len(batch)), norm, share_prompt=share_prompt, device=torch.device("cpu"))
    return micro.segments, len(micro.input_ids)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Softmax attention written out per run, head and query, in float64."""
    repeat = query.shape[1] // key.shape[1]
    outputs: list[Tensor] = []
    for run in torch.split(segments.rows, segments.lengths):
        q, k, v = (x[run].double() for x in (query, key, value))
        for place in range(len(run)):
            heads = []
            for head in range(query.shape[1]):
                weights = torch.softmax(SCALE * (k[: place + 1, head // repeat] @ q[place, head]), dim=0)
                heads.append(weights @ v[: place + 1, head // repeat])
            outputs.append(torch.stack(heads))
    return torch.stack(outputs)[segments.owner]


def inputs(rows: int, heads: int, kv_heads: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, HEAD_DIM), (rows, kv_heads, HEAD_DIM), (rows, kv_heads, HEAD_DIM))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def check_against_plain(groups: Groups, *, heads: int, kv_heads: int, share_prompt: bool, seed: int = 0) -> None:
    segments, rows = segments_of(groups, share_prompt=share_prompt)
    tensors = inputs(rows, heads, kv_heads, seed)
    packed = packed_attention(*tensors, prepare(segments, torch.float32), SCALE)
    plain = plain_attention(*tensors, segments)
    torch.testing.assert_close(packed, plain, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(packed.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(packed, tensors, upstream), torch.autograd.grad(plain, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


GROUPS = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 6), min_size=1, max_size=3)), max_size=4)


@given(
    groups=GROUPS, heads=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]), share=st.booleans(), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_any_pattern_equals_attention_per_sequence(
    groups: Groups, heads: tuple[int, int], share: bool, seed: int
) -> None:
    check_against_plain(groups, heads=heads[0], kv_heads=heads[1], share_prompt=share, seed=seed)


def test_a_shared_prompt_gathers_the_gradients_of_all_its_responses() -> None:
    check_against_plain([(7, [5, 1, 0, 3]), (2, [6, 6])], heads=4, kv_heads=2, share_prompt=True)


def test_sharing_a_prompt_changes_nothing() -> None:
    groups: Groups = [(3, [2, 4])]
    shared, rows = segments_of(groups, share_prompt=True)
    apart, more_rows = segments_of(groups, share_prompt=False)
    tensors = inputs(rows, 4, 2, seed=5)
    # rows of the unshared packing: prompt, response 1, prompt again, response 2
    copies = torch.cat([torch.arange(4), torch.arange(3), torch.arange(4, rows)])
    assert len(copies) == more_rows
    out = packed_attention(*tensors, prepare(shared, torch.float32), SCALE)
    copied = [t[copies] for t in tensors]
    torch.testing.assert_close(packed_attention(*copied, prepare(apart, torch.float32), SCALE), out[copies])


@given(groups=GROUPS.filter(bool))
@settings(max_examples=60, deadline=None)
def test_rectangles_hold_runs_of_similar_length(groups: Groups) -> None:
    segments, _ = segments_of(groups, share_prompt=True)
    layout = prepare(segments, torch.float32)
    assert sum(count for count, _ in layout.rectangles) == len(segments.lengths)
    assert len(layout.rows) == sum(count * width for count, width in layout.rectangles)
    assert len(layout.rows) <= BUCKET_WASTE * sum(segments.lengths)
    assert layout.max_length == max(segments.lengths)
    torch.testing.assert_close(layout.rows[layout.owner], segments.rows[segments.owner])


def test_runs_of_equal_length_make_one_rectangle() -> None:
    segments, _ = segments_of([(4, [3, 3]), (2, [5])], share_prompt=True)
    assert prepare(segments, torch.float32).rectangles == ((3, 6),)
    segments, _ = segments_of([(4, [1]), (30, [1])], share_prompt=True)
    assert prepare(segments, torch.float32).rectangles == ((1, 4), (1, 30))


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 5)])
def test_gathering_rows_is_differentiable(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rows = torch.tensor([6, 0, 0, 3, 6, 6])
    assert torch.equal(gather_rows(x, rows), x[rows])
    upstream = torch.randn(6, *shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (got,) = torch.autograd.grad(gather_rows(x, rows), x, upstream)
    (expected,) = torch.autograd.grad(x[rows], x, upstream)
    torch.testing.assert_close(got, expected)
    (none,) = torch.autograd.grad(gather_rows(x, rows[:0]).sum(), x)
    assert not none.any()


def call_hf(**keywords: Any) -> Tensor:
    """The attention as transformers calls it: [1, heads, tokens, dim]."""
    segments, rows = segments_of([(3, [2])], share_prompt=True)
    query, key, value = (t.transpose(0, 1)[None] for t in inputs(rows, 4, 2, seed=3))
    arguments = {"segments": prepare(segments, torch.float32), "scaling": SCALE} | keywords
    out, weights = hf_attention(torch.nn.Identity(), query, key, value, None, **arguments)
    assert weights is None
    return out


def test_transformers_gets_its_own_layout() -> None:
    segments, rows = segments_of([(3, [2])], share_prompt=True)
    expected = packed_attention(*inputs(rows, 4, 2, seed=3), prepare(segments, torch.float32), SCALE)
    torch.testing.assert_close(call_hf(sliding_window=None), expected[None])
    torch.testing.assert_close(call_hf(sliding_window=4), expected[None])


def test_a_model_that_drops_keywords_is_refused() -> None:
    with pytest.raises(RuntimeError, match="did not pass `segments` on"):
        call_hf(segments=None)


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 3), ("softcap", 50.0), ("s_aux", SimpleNamespace())])
def test_attention_of_another_kind_is_refused(name: str, value: object) -> None:
    """A window shorter than a sequence, capped scores and attention sinks would be silently left out."""
    with pytest.raises(RuntimeError, match=name):
        call_hf(**{name: value})
