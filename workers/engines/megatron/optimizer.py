"""AdamW on Megatron's parameters: gradients in float32 buffers, master weights where the model computes in less.

Every data-parallel rank holds the whole state of its part. Megatron's distributed optimizer would divide it, but its
checkpoints are wrong without Transformer Engine or Apex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from workers.engines.base import OptimizerSpec
from workers.engines.optimizer import begin_state, make_optimizer, moments

NORM_GUARD = 1e-6
"""Added to the norm gradients are divided by, as torch.nn.utils.clip_grad_norm_ does."""


class Gradients:
    """The gradient buffers of some model chunks. They take memory only inside `with`, where they begin at 0."""

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._chunks = chunks
        buffers = (buffer for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers])
        self._storages = [buffer.grad_data.untyped_storage() for buffer in buffers]
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._free()

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(self._sizes)

    def __enter__(self) -> None:
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        for chunk in self._chunks:
            chunk.zero_grad_buffer()

    def __exit__(self, *_: object) -> None:
        self._free()

    def _free(self) -> None:
        for storage in self._storages:
            storage.resize_(0)


class MasterAdamW:
    """AdamW that steps `masters`: the parameters themselves, or copies in `dtype` where they have another.

    parameters: by name. spec: of the optimizer.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], spec: OptimizerSpec, dtype: torch.dtype) -> None:
        self._parameters = parameters
        self.masters = {
            name: p if p.dtype == dtype else nn.Parameter(p.detach().to(dtype)) for name, p in parameters.items()
        }
        self._adamw = make_optimizer(nn.ParameterList(self.masters.values()), spec)

    def missing_bytes(self) -> int:
        """Of the state that the first step makes."""
        return 0 if self._adamw.state else 2 * sum(m.nbytes for m in self.masters.values())

    def step(self, lr: float, scale: float) -> None:
        """One step with the gradients in the buffers times `scale`."""
        for name, parameter in self._parameters.items():
            self.masters[name].grad = parameter.main_grad.mul_(scale).to(self.masters[name].dtype)  # type: ignore[attr-defined]
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds master weights into the parameters."""
        for name, parameter in self._parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def tensors(self) -> list[Tensor]:
        """What is the optimizer's alone: moments and separate master weights."""
        separate = [m.detach() for name, m in self.masters.items() if m is not self._parameters[name]]
        return separate + moments(self._adamw)

    def state(self, moment: str) -> dict[str, Tensor]:
        """`exp_avg` or `exp_avg_sq` of each parameter, made if there is none yet."""
        begin_state(self._adamw)
        return {name: self._adamw.state[master][moment] for name, master in self.masters.items()}

    @property
    def num_steps(self) -> int:
        """Steps that were taken, not skipped; every parameter takes all of them."""
        return max((int(state["step"].item()) for state in self._adamw.state.values()), default=0)

    @num_steps.setter
    def num_steps(self, value: int) -> None:
        for state in self._adamw.state.values():
            state["step"].fill_(value)


def gradient_norm(gradients: list[Tensor], group: dist.ProcessGroup) -> float:
    """L2 norm over the ranks of the group; each gives the gradients that no other rank gives; collective."""
    norms = torch.stack(torch._foreach_norm(gradients)).double() if gradients else torch.zeros(1, dtype=torch.float64)
    total = norms.square().sum().cpu()
    everywhere = total.to(gradients[0].device) if gradients else total
    dist.all_reduce(everywhere, group=group)
    return float(everywhere.sqrt())


def clip_scale(norm: float, limit: float) -> float:
    """What gradients of this norm are multiplied by."""
    return min(1.0, limit / (norm + NORM_GUARD))
