"""Chunked log-probs, entropies and sums of squared probabilities against log_softmax and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.engines.logprobs import sum_pi_squared, token_logprobs

HIDDEN, VOCABULARY = 12, 29


def inputs(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [rows, HIDDEN], weight [VOCABULARY, HIDDEN], targets [rows]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.25
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The formulas, in float64."""
    logp = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    return logp[torch.arange(len(targets)), targets], -(logp.exp() * logp).sum(-1)


def relative(got: Tensor, expected: Tensor) -> float:
    """Error in the norm, relative to what is expected (absolute below 1)."""
    return float(((got.double() - expected).norm() / expected.norm().clamp(min=1.0)).detach())


@given(
    rows=st.integers(1, 9),
    chunk=st.sampled_from([1, 2, 3, 9, 100, None]),
    temperature=st.sampled_from([0.6, 1.0, 1.7]),
    entropy=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_equal_the_formula(
    rows: int, chunk: int | None, temperature: float, entropy: bool, seed: int
) -> None:
    hidden, weight, targets = inputs(rows, seed)
    upstream = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed + 1))
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logprobs, entropies = token_logprobs(*ours, targets, temperature=temperature, entropy=entropy, chunk=chunk)
    assert logprobs.dtype == torch.float32
    loss = (logprobs * upstream[0]).sum()
    theirs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected, expected_entropies = reference(*theirs, targets, temperature)
    expected_loss = (expected * upstream[0]).sum()
    assert relative(logprobs, expected) < 1e-6
    if entropy:
        assert entropies is not None
        assert relative(entropies, expected_entropies) < 1e-6
        loss = loss + (entropies * upstream[1]).sum()
        expected_loss = expected_loss + (expected_entropies * upstream[1]).sum()
    else:
        assert entropies is None
    for got, wanted in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected_loss, theirs), strict=True):
        assert relative(got, wanted) < 1e-6


def test_nothing_is_rounded_at_the_size_of_the_logits() -> None:
    """Logits that float32 holds exactly, around 4096, where its neighbours are 5e-4 apart."""
    hidden, weight, targets = inputs(9, seed=4)
    hidden, weight = hidden.round(), (weight * 8).round()
    hidden[:, 0], weight[:, 0] = 1.0, 4096.0
    logprobs, entropies = token_logprobs(hidden, weight, targets, temperature=1.0, entropy=True, chunk=4)
    expected, expected_entropies = reference(hidden.double(), weight.double(), targets, 1.0)
    assert entropies is not None
    assert relative(logprobs, expected) < 2e-7
    assert relative(entropies, expected_entropies) < 2e-7


def test_the_entropy_alone_is_differentiable() -> None:
    hidden, weight, targets = inputs(5, seed=3)
    ours = hidden.clone().requires_grad_()
    _, entropies = token_logprobs(ours, weight, targets, temperature=1.0, entropy=True, chunk=2)
    assert entropies is not None
    theirs = hidden.double().requires_grad_()
    (got,) = torch.autograd.grad(entropies.sum(), ours)
    (wanted,) = torch.autograd.grad(reference(theirs, weight.double(), targets, 1.0)[1].sum(), theirs)
    assert relative(got, wanted) < 1e-6


def test_no_tokens_give_no_logprobs_and_zero_gradients() -> None:
    """What a rank with an empty micro-batch computes, so that it takes part in the collectives."""
    hidden, weight, targets = inputs(0, seed=0)
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, entropies = token_logprobs(hidden, weight, targets, temperature=0.7, entropy=True)
    assert entropies is not None
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    assert weight.grad is not None
    assert hidden.grad is not None
    assert not weight.grad.any()
    assert hidden.grad.shape == (0, HIDDEN)


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = inputs(4, seed=1)
    hidden = (hidden * 1e3).requires_grad_()
    logprobs, entropies = token_logprobs(hidden, weight, targets, temperature=0.1, entropy=True)
    assert entropies is not None
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(entropies).all()
    assert (logprobs <= 0).all()
    (grad,) = torch.autograd.grad(logprobs.sum() + entropies.sum(), hidden)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("entropy", [True, False])
def test_half_precision_weights_give_float32_logprobs(entropy: bool) -> None:
    hidden, weight, targets = inputs(6, seed=2)
    halves = [hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()]
    logprobs, _ = token_logprobs(*halves, targets, temperature=1.0, entropy=entropy, chunk=4)
    assert logprobs.dtype == torch.float32
    expected, _ = reference(halves[0].double(), halves[1].double(), targets, 1.0)
    torch.testing.assert_close(logprobs.double(), expected, rtol=0.02, atol=0.05)
    logprobs.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.bfloat16 for t in halves)


@given(
    rows=st.integers(0, 9),
    chunk=st.sampled_from([1, 2, 3, 9, 100, None]),
    temperature=st.sampled_from([0.6, 1.0, 1.7]),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_sum_of_squared_probabilities_is_the_formula(
    rows: int, chunk: int | None, temperature: float, size: float, seed: int
) -> None:
    """From a uniform distribution (1 / VOCABULARY) to a certain one (1)."""
    hidden, weight, _ = inputs(rows, seed)
    hidden = hidden * size
    found = sum_pi_squared(hidden.requires_grad_(), weight, temperature=temperature, chunk=chunk)
    assert found.dtype == torch.float32 and found.shape == (rows,) and not found.requires_grad
    logits = (hidden.detach() @ weight.t()).double() / temperature
    expected = torch.stack([row.softmax(-1) @ row.softmax(-1) for row in logits]) if rows else torch.zeros(0)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4 if size > 1.0 else 2e-6, atol=0)
