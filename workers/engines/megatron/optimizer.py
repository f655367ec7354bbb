"""AdamW on Megatron's parameters, divided over data-parallel replicas (ZeRO stage 1, arXiv 1910.02054).

Megatron lays parameters and gradients out in flat buckets. Each replica owns an equal range of every bucket's elements,
wherever in a parameter that begins: gradients are reduce-scattered to the owners, who keep float32 masters and moments
of their range only, and the stepped weights are gathered in place. Megatron's own distributed optimizer would do that
too, but its checkpoints are wrong without Transformer Engine or Apex.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from workers.engines.base import OptimizerSpec
from workers.engines.optimizer import adamw, begin_state, moments

NORM_GUARD = 1e-6
"""Added to the norm gradients are divided by, as torch.nn.utils.clip_grad_norm_ does."""


class Gradients:
    """The gradient buffers of some model chunks. They take memory only inside `with`, where they begin at 0."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._chunks = chunks
        self._storages = [buffer.grad_data.untyped_storage() for buffer in _buffers(chunks)]
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._free()

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(self._sizes)

    def __enter__(self) -> None:
        try:
            for storage, size in zip(self._storages, self._sizes, strict=True):
                storage.resize_(size)
        except RuntimeError:  # no room for the last of them: the others must not stay
            self._free()
            raise
        for chunk in self._chunks:
            chunk.zero_grad_buffer()

    def __exit__(self, *_: object) -> None:
        self._free()

    def _free(self) -> None:
        for storage in self._storages:
            storage.resize_(0)


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements of one parameter that this rank steps.

    parameter: its name. first: of the elements, counted row by row. weights, gradient: [num_elements], views that see
    what becomes of their storages.
    """

    parameter: str
    first: int
    weights: Tensor
    gradient: Tensor


class ShardedAdamW:
    """AdamW whose state is divided over the replicas of each bucket. Made while gradient buffers have memory.

    It steps `masters`: this rank's elements of the parameters, or copies in `dtype` where parameters have another.

    parameters: of the chunks, by name. spec: of the optimizer.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        parameters: Mapping[str, nn.Parameter],
        spec: OptimizerSpec,
        dtype: torch.dtype,
    ) -> None:
        self._buckets = [
            _Bucket(bucket, buffer.data_parallel_group) for buffer in _buffers(chunks) for bucket in buffer.buckets
        ]
        names = {parameter: name for name, parameter in parameters.items()}
        self.segments = [segment for bucket in self._buckets for segment in bucket.segments(names)]
        self.masters = [nn.Parameter(s.weights.to(dtype)) for s in self.segments]  # the weights themselves if of dtype
        self._rounded = [
            (segment.weights, master)
            for segment, master in zip(self.segments, self.masters, strict=True)
            if segment.weights.dtype != dtype
        ]
        is_matrix = [parameters[segment.parameter].ndim >= 2 for segment in self.segments]
        self._adamw = adamw(
            [master for master, decays in zip(self.masters, is_matrix, strict=True) if decays],
            [master for master, decays in zip(self.masters, is_matrix, strict=True) if not decays],
            spec,
        )

    def missing_bytes(self) -> int:
        """Of the state that the first step makes."""
        return 0 if self._adamw.state else 2 * sum(m.nbytes for m in self.masters)

    @torch.no_grad()
    def step(self, lr: float, scale: float) -> None:
        """One step with the gradients in the buffers times `scale`; collective over replicas."""
        for segment, master in zip(self.segments, self.masters, strict=True):
            master.grad = segment.gradient.mul_(scale).to(master.dtype)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        begin_state(self._adamw)
        self._adamw.step()
        self._adamw.zero_grad()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds masters into this rank's part of the weights, and gets the other parts; collective over replicas."""
        for weights, master in self._rounded:
            weights.copy_(master)
        works = [bucket.gather() for bucket in self._buckets]
        for work in works:
            work.wait()

    def tensors(self) -> list[Tensor]:
        """What is the optimizer's alone: moments and separate master weights."""
        return [master.detach() for _, master in self._rounded] + moments(self._adamw)

    def state(self, moment: str) -> list[Tensor]:
        """`exp_avg` or `exp_avg_sq` of each segment, made if there is none yet."""
        begin_state(self._adamw)
        return [self._adamw.state[master][moment] for master in self.masters]

    @property
    def num_steps(self) -> int:
        """Steps that were taken, not skipped; every parameter takes all of them."""
        return max((int(state["step"].item()) for state in self._adamw.state.values()), default=0)

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        for state in self._adamw.state.values():
            state["step"].fill_(value)


class _Bucket:
    """One of Megatron's buckets: flat weights and gradients of some parameters, an equal part for each rank of `group`.

    Megatron fills buckets up so that they can be divided.
    """

    def __init__(self, bucket: Any, group: dist.ProcessGroup) -> None:
        self._bucket, self._group = bucket, group
        self._size = bucket.param_data.numel() // group.size()
        self._first = group.rank() * self._size
        self._own = bucket.param_data[self._first : self._first + self._size]

    def segments(self, names: Mapping[nn.Parameter, str]) -> Iterator[Segment]:
        """What of each parameter is in this rank's part."""
        for parameter in self._bucket.params_list:
            place = self._first - (parameter.main_grad.storage_offset() - self._bucket.grad_data.storage_offset())
            first, last = max(0, place), min(parameter.numel(), place + self._size)
            if first < last:
                weights, gradient = parameter.detach().view(-1), parameter.main_grad.view(-1)
                yield Segment(names[parameter], first, weights[first:last], gradient[first:last])

    def gather(self) -> dist.Work:
        """Begins to collect every rank's part, in place."""
        work = dist.all_gather_into_tensor(self._bucket.param_data, self._own, group=self._group, async_op=True)
        assert isinstance(work, dist.Work)
        return work


def _buffers(chunks: Sequence[DistributedDataParallel]) -> Iterator[Any]:
    """Megatron's, each with the group that has replicas of what is in it: experts have another than the rest."""
    for chunk in chunks:
        yield from (*chunk.buffers, *chunk.expert_parallel_buffers)


def gradient_norm(gradients: list[Tensor], group: dist.ProcessGroup, device: torch.device) -> float:
    """L2 norm over the ranks of the group; each gives the gradients that no other rank gives, if any; collective."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    if gradients:
        total = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    dist.all_reduce(total, group=group)
    return float(total.sqrt())


def clip_scale(norm: float, limit: float) -> float:
    """What gradients of this norm are multiplied by."""
    return min(1.0, limit / (norm + NORM_GUARD))
