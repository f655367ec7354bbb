"""Loss, gradients and metrics of one optimizer step, over micro-batches and ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

WHOLE_GRADIENTS_SHARE = 0.1
"""Of a device: what gradients that are not divided over its ranks may take of it."""
_GRADIENT = 4
"""Bytes of an element: float32."""


def adds_up_whole(num_elements: int, num_ranks: int, device_bytes: int | None) -> bool:
    """Whether gradients of several micro-batches add up on each rank, to be divided over the ranks once, at the end.

    That sends them once instead of once a micro-batch; where they are large, their memory is worth more: layers would
    be recomputed for it. It hangs on sizes alone, not on what is free, so that a run can be repeated bit by bit.

    num_elements: of the whole model. device_bytes: of one device; None: a CPU's, which is not planned.
    """
    return num_ranks == 1 or device_bytes is None or _GRADIENT * num_elements <= WHOLE_GRADIENTS_SHARE * device_bytes


def gradient_bytes(num_elements: int, num_ranks: int, num_micro_batches: int, device_bytes: int | None) -> int:
    """What one rank holds of them within an update, at most, where parameters are divided over the ranks."""
    is_whole = num_micro_batches > 1 and adds_up_whole(num_elements, num_ranks, device_bytes)
    return _GRADIENT * (num_elements if is_whole else -(-num_elements // num_ranks))


def reduce_metrics(metrics: list[dict[str, Tensor]], group: dist.ProcessGroup) -> dict[str, float]:
    """Adds metrics over micro-batches and ranks; names ending in _max and _min are maxima and minima.

    Collective, one object per rank: ranks whose micro-batches were all empty have no metrics of their own.
    """
    names = sorted({name for m in metrics for name in m})
    local = {name: _reduce(name, torch.stack([m[name].float() for m in metrics if name in m])) for name in names}
    values = dict(zip(local, torch.stack(list(local.values())).tolist(), strict=True)) if local else {}
    if dist.get_world_size(group) == 1:
        return values
    everyone: list[dict[str, float]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, values, group=group)
    merged = sorted({name for m in everyone for name in m})
    return {n: float(_reduce(n, torch.tensor([m[n] for m in everyone if n in m], dtype=torch.float64))) for n in merged}


def _reduce(name: str, values: Tensor) -> Tensor:
    if name.endswith("_max"):
        return values.max()
    return values.min() if name.endswith("_min") else values.sum()


def spread(loss: Tensor) -> Tensor:
    """The loss; one that is not finite gets a gradient that is not either, and every rank sees it in the norm."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
