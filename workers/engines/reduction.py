"""Loss and metrics of one optimizer step, over micro-batches and ranks; the same for every engine."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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
