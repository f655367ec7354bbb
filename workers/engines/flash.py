"""Packed attention by variable-length flash attention, where responses share a prompt that was computed once.

Nothing is gathered or repeated. Attention of the packed rows is two passes over the tensors as they lie:

    own     every row looks back on the rows of its own response (a response behind its prompt: on those too), causal
    shared  the other responses to a prompt look back on all of the prompt's rows

A softmax over two sets of keys is the mean of the two softmaxes, weighted by their normalisers; flash attention gives
the normalisers' logarithms (lse). Its backward pass needs only the merged output and normaliser to be right for each
part: dS = P * (dP - rowsum(dO * O)) with P = exp(S - lse) holds key by key (Dao et al. 2022, arXiv 2205.14135, eq. 4).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.batch import Segments
from workers.engines.fusion import fused


class Bounds(NamedTuple):
    """Where runs begin: [num_runs + 1] int32, ascending from 0 to the number of rows. longest: of the runs, rows."""

    starts: Tensor
    longest: int


class Kernels(NamedTuple):
    """Variable-length attention. [rows, heads, dim] in and out; lse: [heads, rows] float32.

    forward(query, key, value, queries, keys, causal, scale) -> (out, lse); a run without keys gives 0 and any lse.
    backward(grad, query, key, value, out, lse, queries, keys, causal, scale) -> gradients of query, key, value.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """What the second pass needs.

    rows: [num_keys] int64, rows of the prompts, one prompt after the other; keys: where each begins in `rows`.
    queries: runs of all packed rows; those that look back on no shared prompt have no keys.
    looks_back: [num_rows] bool.
    """

    rows: Tensor
    queries: Bounds
    keys: Bounds
    looks_back: Tensor


@dataclass(frozen=True, slots=True)
class FlashLayout:
    """`Segments` made ready for flash attention. own: runs of the first pass. max_length: longest run with its prompt.

    shared: None where no prompt is shared.
    """

    own: Bounds
    shared: SharedPrompts | None
    max_length: int


def flash_layout(segments: Segments) -> FlashLayout:
    """Lays the runs out on the device of the segments."""
    device = segments.rows.device
    own = np.array(segments.lengths, dtype=np.int64) - [num_rows for _, num_rows in segments.borrowed]
    pieces = list(_look_back(segments, own))
    shared = None
    if any(num_rows for _, _, num_rows in pieces):
        prompts = [np.arange(first, first + num_rows) for _, first, num_rows in pieces]
        lengths = [num_queries for num_queries, _, _ in pieces]
        shared = SharedPrompts(
            torch.from_numpy(np.concatenate(prompts)).to(device, non_blocking=True),
            _bounds(np.array(lengths), device),
            _bounds(np.array([num_rows for _, _, num_rows in pieces]), device),
            torch.from_numpy(np.repeat([num_rows > 0 for _, _, num_rows in pieces], lengths)).to(device),
        )
    return FlashLayout(_bounds(own[own > 0], device), shared, max(segments.lengths))


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: FlashLayout, scale: float, kernels: Kernels | None = None
) -> Tensor:
    """query: [rows, heads, dim]; key, value: [rows, kv_heads, dim]. Returns [rows, heads, dim]. kernels: PyTorch's.

    Raises RuntimeError for a head that flash attention does not take.
    """
    if kernels is None and (query.shape[-1] > 256 or query.shape[-1] % 8 or query.shape[-1] != value.shape[-1]):
        sizes = " and ".join(map(str, sorted({query.shape[-1], value.shape[-1]})))
        raise RuntimeError(
            f"flash attention takes heads of one size, at most 256 and a multiple of 8; these have {sizes}: compute in "
            "float32 (fsdp_config.dtype or megatron.dtype)"
        )
    out: Tensor = _Attention.apply(query, key, value, layout, scale, kernels or TORCH)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: FlashLayout, scale: float, kernels: Kernels
    ) -> Tensor:
        out, lse = kernels.forward(query, key, value, layout.own, layout.own, True, scale)
        if (shared := layout.shared) is not None:
            if lse.ndim != 2:
                raise RuntimeError("this PyTorch's flash attention pads its normalisers: set share_prompt=false")
            keys, values = key.index_select(0, shared.rows), value.index_select(0, shared.rows)
            more = kernels.forward(query, keys, values, shared.queries, shared.keys, False, scale)
            merge = _merge(query.device.type)
            out, lse_by_row = merge(out, lse.t(), more[0], more[1].t(), shared.looks_back)
            lse = lse_by_row.t().contiguous()
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.settings = (layout, scale, kernels)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        layout, scale, kernels = ctx.settings
        (grad,) = grads
        of_query, of_key, of_value = kernels.backward(
            grad, query, key, value, out, lse, layout.own, layout.own, True, scale
        )
        if (shared := layout.shared) is not None:
            keys, values = key.index_select(0, shared.rows), value.index_select(0, shared.rows)
            more = kernels.backward(grad, query, keys, values, out, lse, shared.queries, shared.keys, False, scale)
            of_query += more[0]
            for whole, part in ((of_key, more[1]), (of_value, more[2])):  # a prompt's rows are there once
                whole.index_copy_(0, shared.rows, whole.index_select(0, shared.rows) + part)
        return of_query, of_key, of_value, None, None, None


def _merge_parts(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, looks_back: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax from two; rows that do not look back keep what they have. lse: [rows, heads]."""
    both = torch.where(looks_back[:, None], torch.logaddexp(lse, more_lse), lse)
    weight = torch.where(looks_back[:, None], torch.exp(more_lse - both), 0.0)[..., None]
    wide = torch.promote_types(out.dtype, torch.float32)
    merged = out.to(wide) * (1.0 - weight) + more.to(wide) * weight
    return merged.to(out.dtype), both


@cache
def _merge(device_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return fused(_merge_parts) if device_type == "cuda" else _merge_parts


def _look_back(segments: Segments, own: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(number of rows, first row and number of rows of the prompt they look back on), covering all rows in order."""
    count, prompt = 0, (0, 0)
    for num_rows, (first, length) in zip(own.tolist(), segments.borrowed, strict=True):
        wanted = (first, length) if length else (0, 0)
        if wanted != prompt:
            if count:
                yield count, *prompt
            count, prompt = 0, wanted
        count += num_rows
    if count:
        yield count, *prompt


def _bounds(lengths: np.ndarray, device: torch.device) -> Bounds:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Bounds(torch.from_numpy(starts).to(device, non_blocking=True), int(lengths.max(initial=0)))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Bounds, keys: Bounds, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    bounds = (queries.starts, keys.starts, queries.longest, keys.longest)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(query, key, value, *bounds, 0.0, causal, False, scale=scale)
    return out, lse


def _backward(
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
    bounds = (queries.starts, keys.starts, queries.longest, keys.longest)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout's generator; there is no dropout
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), query, key, value, out, lse, *bounds, 0.0, causal, state, state[:0], scale=scale
    )
    return gradients


TORCH = Kernels(_forward, _backward)
"""FlashAttention 2 as PyTorch carries it, or 3 after `use_installed`."""


def use_installed(kernels: Kernels = TORCH) -> bool:
    """Turns to FlashAttention 3 on a Hopper GPU where it is installed and gives what PyTorch's own gives.

    Idempotent; PyTorch 2.10 and later can exchange its kernels.
    """
    if importlib.util.find_spec("flash_attn_interface") is None or torch.cuda.get_device_capability()[0] != 9:
        return False
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        return False
    if torch.nn.attention.current_flash_attention_impl() is not None:
        return True
    expected = _sample(kernels)
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
        if all(_is_close(got, right) for got, right in zip(_sample(kernels), expected, strict=True)):
            return True
    except (ImportError, OSError, RuntimeError):
        pass  # an installation for another PyTorch or GPU, or without a backward pass
    torch.nn.attention.restore_flash_attention_impl()
    return False


def _sample(kernels: Kernels) -> tuple[Tensor, ...]:
    """Attention of two responses to one prompt and of one to another, and its gradients, with random numbers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    none = torch.zeros(0, dtype=torch.int64, device=device)
    layout = flash_layout(Segments(none, (200, 165, 90), none, ((0, 0), (0, 130), (0, 0))))
    generator = torch.Generator(device).manual_seed(0)
    tensors = [
        torch.randn((325, heads, 128), generator=generator, dtype=torch.bfloat16, device=device).requires_grad_()
        for heads in (4, 2, 2)
    ]
    out = flash_attention(tensors[0], tensors[1], tensors[2], layout, 128**-0.5, kernels)
    return out, *torch.autograd.grad(out.square().sum(), tensors)


def _is_close(got: Tensor, right: Tensor) -> bool:
    return bool((got.float() - right.float()).norm() < 0.01 * right.float().norm())
