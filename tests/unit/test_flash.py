"""Two passes of flash attention over rows as they lie equal attention of each sequence by itself.

PyTorch's kernels run on a GPU only. Here the same two passes run on kernels written out in float64: what a kernel is
asked for, how two softmaxes become one, and the gradients of that are the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import GROUPS, SCALE, Groups, inputs, plain_attention, segments_of
from torch import Tensor

from workers.engines import flash
from workers.engines.flash import Bounds, Kernels, flash_attention, flash_layout


def runs(queries: Bounds, keys: Bounds) -> Iterator[tuple[slice, slice]]:
    assert len(queries.starts) == len(keys.starts)
    starts = zip(queries.starts.tolist(), keys.starts.tolist(), strict=True)
    for (query, key), (query_end, key_end) in pairwise(starts):
        assert query_end - query <= queries.longest and key_end - key <= keys.longest
        yield slice(query, query_end), slice(key, key_end)


def scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    """[heads, queries, keys]; a causal run has as many queries as keys."""
    repeat = query.shape[1] // key.shape[1]
    found = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(repeat, dim=1)) * scale
    if not causal:
        return found
    assert len(query) == len(key)
    return found.masked_fill(torch.ones(len(query), len(key)).tril() == 0, -torch.inf)


def forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Bounds, keys: Bounds, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros_like(query), query.new_full(query.shape[1::-1], torch.inf)
    repeat = query.shape[1] // key.shape[1]
    covered = 0
    for q, k in runs(queries, keys):
        covered += q.stop - q.start
        if k.stop == k.start:
            continue
        found = scores(query[q], key[k], causal, scale)
        lse[:, q] = torch.logsumexp(found, dim=-1)
        values = value[k].repeat_interleave(repeat, dim=1)
        out[q] = torch.einsum("hqk,khd->qhd", torch.softmax(found, dim=-1), values)
    assert covered == len(query)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Bounds,
    keys: Bounds,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
    repeat = query.shape[1] // key.shape[1]
    for q, k in runs(queries, keys):
        p = torch.exp(scores(query[q], key[k], causal, scale) - lse[:, q, None])
        of_p = torch.einsum("qhd,khd->hqk", grad[q], value[k].repeat_interleave(repeat, dim=1))
        of_scores = p * (of_p - (grad[q] * out[q]).sum(-1).T[..., None]) * scale
        of_query[q] = torch.einsum("hqk,khd->qhd", of_scores, key[k].repeat_interleave(repeat, dim=1))
        spread = [
            torch.einsum("hqk,qhd->khd", of_scores, query[q]),
            torch.einsum("hqk,qhd->khd", p, grad[q]),
        ]
        for whole, part in zip((of_key, of_value), spread, strict=True):
            whole[k] += part.unflatten(1, (-1, repeat)).sum(2)
    return of_query, of_key, of_value


KERNELS = Kernels(forward, backward)


@given(
    groups=GROUPS.filter(bool),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    share=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_pattern_equals_attention_per_sequence(
    groups: Groups, heads: tuple[int, int], share: bool, seed: int
) -> None:
    segments, rows = segments_of(groups, share_prompt=share)
    tensors = inputs(rows, *heads, seed)
    packed = flash_attention(*tensors, flash_layout(segments), SCALE, KERNELS)
    plain = plain_attention(*tensors, segments)
    torch.testing.assert_close(packed, plain, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(packed.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(packed, tensors, upstream), torch.autograd.grad(plain, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_rows_lie_as_they_are() -> None:
    """Prompt of 3, responses of 4, 1 and 3 tokens: 3 + 3, 0 and 2 rows; then a group of one: 2 + 1 rows."""
    segments, rows = segments_of([(3, [4, 1, 3]), (2, [2])], share_prompt=True)
    layout = flash_layout(segments)
    assert layout.own.starts.tolist() == [0, 6, 8, rows] and layout.own.longest == 6
    assert layout.shared is not None and layout.max_length == 6
    assert layout.shared.queries.starts.tolist() == [0, 6, 8, rows]
    assert layout.shared.keys.starts.tolist() == [0, 0, 3, 3]
    assert layout.shared.rows.tolist() == [0, 1, 2]
    assert layout.shared.looks_back.tolist() == [False] * 6 + [True] * 2 + [False] * 3


@pytest.mark.parametrize("groups", [[(3, [4]), (2, [2])], [(3, [4, 1])]])
def test_no_second_pass_without_shared_prompts(groups: Groups) -> None:
    segments, _ = segments_of(groups, share_prompt=True)
    assert flash_layout(segments).shared is None


@pytest.mark.parametrize(("factor", "expected"), [(1.0, True), (1.1, False)])
def test_installed_kernels_are_used_if_they_agree(
    factor: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 3 cannot run here: its place is taken by kernels whose gradient is right, or off by a tenth."""
    active: list[str] = []

    def exchanged(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        of_query, of_key, of_value = backward(*args)
        return of_query, of_key * (factor if active else 1.0), of_value

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append, raising=False)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not flash.use_installed(Kernels(forward, exchanged)), "it is not installed"
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: name)
    assert flash.use_installed(Kernels(forward, exchanged)) is expected
    assert bool(active) is expected


def test_a_broken_installation_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built for another PyTorch, say: it is found, and cannot be imported."""

    def activate(name: str) -> None:
        raise ImportError("undefined symbol")

    restored: list[bool] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(
        torch.nn.attention, "restore_flash_attention_impl", lambda: restored.append(True), raising=False
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: name)
    assert not flash.use_installed(KERNELS)
    assert restored


@pytest.mark.parametrize("size", [260, 12])
def test_heads_that_flash_attention_does_not_take_are_refused(size: int) -> None:
    segments, rows = segments_of([(3, [2])], share_prompt=True)
    heads = torch.zeros(rows, 2, size, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=rf"these have {size}: compute in float32"):
        flash_attention(heads, heads, heads, flash_layout(segments), SCALE)
