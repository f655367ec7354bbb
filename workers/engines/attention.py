"""Packed attention without padding, one function for every engine.

The rows of a packed micro-batch attend along `Segments`: causal runs in which a prompt shared by several responses
appears once per response, although its projections were computed once. On CPU the runs are gathered into a few
rectangles of similar length for PyTorch's SDPA: causal attention never looks right, so the padding on the right of a
run cannot be seen and needs no mask. On CUDA in half precision flash attention takes the rows as they lie (`flash`).

Registered with transformers under `ATTENTION_NAME`; models get the segments as the keyword `segments`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.batch import Segments
from workers.engines.flash import FlashLayout, flash_attention, flash_layout

ATTENTION_NAME = "tandem_packed"
BUCKET_WASTE = 1.25
"""Runs share a rectangle on CPU while its longest is at most this much longer than its shortest."""


@dataclass(frozen=True, slots=True)
class Rectangles:
    """`Segments` made ready for SDPA, computed once per micro-batch and used by every layer.

    rows: packed row of every element attention works on: the runs, filled up to rectangles.
    owner: [num_tokens], which of those elements gives each packed row its output.
    rectangles: (number of runs, width) of each rectangle, in order.
    max_length: of a run.
    """

    rows: Tensor
    owner: Tensor
    rectangles: tuple[tuple[int, int], ...]
    max_length: int


PackedLayout = Rectangles | FlashLayout


def prepare(segments: Segments, dtype: torch.dtype) -> PackedLayout:
    """Lays the runs out for the device their tensors are on and the dtype attention will compute in."""
    if segments.rows.device.type == "cpu" or dtype == torch.float32:  # flash attention knows half precision only
        return _rectangles(segments)
    return flash_layout(segments)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Causal attention along the layout's runs.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim].
    Returns [num_tokens, num_heads, head_dim].
    """
    if isinstance(layout, FlashLayout):
        return flash_attention(query, key, value, layout, scale)
    return gather_rows(_sdpa(query, key, value, layout, scale), layout.owner, unique=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def hf_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` behind transformers' interface: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out.

    Raises RuntimeError where the model did not hand `segments` down (a model whose layers drop keyword arguments), and
    where it wants another kind of attention: a window shorter than a sequence, capped scores, attention sinks.
    """
    layout = kwargs.pop("segments", None)
    if layout is None:
        raise RuntimeError(f"{type(module).__name__} did not pass `segments` on: this architecture cannot run packed")
    _check_kind(module, layout, **kwargs)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, layout, scaling).unsqueeze(0), None


def _check_kind(
    module: nn.Module,
    layout: PackedLayout,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> None:
    windowed = sliding_window is not None and layout.max_length > sliding_window
    refused = {"sliding_window": windowed, "softcap": softcap is not None, "s_aux (attention sinks)": s_aux is not None}
    if any(refused.values()):
        names = ", ".join(name for name, is_refused in refused.items() if is_refused)
        raise RuntimeError(f"{type(module).__name__} uses {names}: packed attention is plain causal attention")


def register() -> None:
    """Makes the attention known to transformers (idempotent)."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, hf_attention)


class _GatherRows(torch.autograd.Function):
    """x[index] along dim 0 whose backward is one pass over rows (torch's index_select adds row by row on CPU)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, unique: bool) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        ctx.unique = unique
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        (grad,) = grads
        if ctx.unique:
            return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, index, grad), None, None
        flat = grad.reshape(grad.shape[0], math.prod(grad.shape[1:]))  # -1 would be ambiguous for no rows
        total = torch.ops.aten.embedding_dense_backward(flat, index, ctx.num_rows, -1, False)
        return total.view(ctx.num_rows, *grad.shape[1:]), None, None


def gather_rows(x: Tensor, index: Tensor, *, unique: bool = False) -> Tensor:
    """x[index] along dim 0, differentiable. unique: no row comes twice, which makes the gradient a copy."""
    out: Tensor = _GatherRows.apply(x, index, unique)  # type: ignore[no-untyped-call]
    return out


def _rectangles(segments: Segments) -> Rectangles:
    """Runs sorted by length and cut into buckets; one flat gather index for all of them."""
    lengths = np.asarray(segments.lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    device = segments.rows.device
    rows = segments.rows.cpu().numpy()
    gather: list[np.ndarray] = []
    place = np.empty(len(rows), dtype=np.int64)  # run element -> its place in the rectangles
    shapes: list[tuple[int, int]] = []
    size = 0
    for runs in _buckets(lengths):
        width = int(lengths[runs].max())
        columns = np.minimum(np.arange(width), lengths[runs][:, None] - 1)  # past the end: repeat the last element
        elements = starts[runs][:, None] + columns
        gather.append(rows[elements].reshape(-1))
        inside = np.arange(width) < lengths[runs][:, None]
        place[elements[inside]] = (np.arange(elements.size).reshape(elements.shape) + size)[inside]
        shapes.append((len(runs), width))
        size += elements.size
    owner = torch.from_numpy(place[segments.owner.cpu().numpy()]).to(device)
    index = torch.from_numpy(np.concatenate(gather)).to(device)
    return Rectangles(index, owner, tuple(shapes), int(lengths.max()))


def _buckets(lengths: np.ndarray) -> Iterator[np.ndarray]:
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] > BUCKET_WASTE * lengths[order[start]]:
            yield order[start:end]
            start = end


def _sdpa(query: Tensor, key: Tensor, value: Tensor, layout: Rectangles, scale: float) -> Tensor:
    gathered = [gather_rows(x, layout.rows) for x in (query, key, value)]
    outputs: list[Tensor] = []
    start = 0
    for count, width in layout.rectangles:
        q, k, v = (x[start : start + count * width].view(count, width, *x.shape[1:]).transpose(1, 2) for x in gathered)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start += count * width
    return torch.cat(outputs)
