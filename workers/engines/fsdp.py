"""TrainEngine on PyTorch FSDP2: any dense Hugging Face decoder, packed micro-batches, CPU (gloo) or CUDA (NCCL)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from workers.batch import Batch, MicroBatch
from workers.engines.attention import prepare
from workers.engines.base import EngineSpec, Loss, MicroBatches, StepResult, Update
from workers.engines.models import compile_layers, decoder_layers, load_model
from workers.engines.optimizer import begin_state, learning_rate, make_optimizer
from workers.normalizers import Normalizers

_NO_NORM = Normalizers(1.0, 1.0)
_STATE_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class FSDPEngine:
    """See `workers.engines.base.TrainEngine`."""

    def __init__(self, spec: EngineSpec, mesh: DeviceMesh, device: torch.device) -> None:
        self._spec = spec
        self._device = device
        self._group = mesh.get_group()
        torch.manual_seed(spec.seed)
        model = load_model(spec)
        if spec.compile:
            compile_layers(model)
        self._module = _shard(model, spec, mesh)
        self._optimizer = make_optimizer(self._module, spec.optimizer) if spec.optimizer else None
        self._num_updates = 0

    def forward(self, batch: Batch, micro_batches: MicroBatches, *, temperature: float) -> Tensor:
        """Log-probs or values of every response token, float32 [batch.num_tokens] on the host."""
        result = torch.zeros(batch.num_tokens, dtype=torch.float32)
        with torch.no_grad():
            for rows in micro_batches:
                micro = self._pack(batch, rows, _NO_NORM)
                outputs, _ = self._run(micro, temperature, entropy=False)
                result[torch.from_numpy(batch.token_index(rows))] = outputs.cpu()
        return result

    def train_step(self, batch: Batch, update: Update, loss: Loss, *, temperature: float, entropy: bool) -> StepResult:
        """Forward, backward and one optimizer step; a non-finite loss or gradient on any rank skips it on all."""
        assert self._optimizer is not None and self._spec.optimizer is not None
        metrics: list[dict[str, Tensor]] = []
        for number, rows in enumerate(update.micro_batches):
            self._module.set_requires_gradient_sync(number == len(update.micro_batches) - 1)
            micro = self._pack(batch, rows, update.norm)
            outputs, entropies = self._run(micro, temperature, entropy=entropy)
            value, measured = loss(outputs, entropies, micro)
            (_spread(value) + 0.0 * outputs.sum()).backward()  # empty micro-batches take part in the collectives
            metrics.append(measured if len(rows) else {})
        lr = learning_rate(self._spec.optimizer, self._num_updates)
        grad_norm = self._clip(self._spec.optimizer.clip_grad)
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._num_updates += 1
        return StepResult(reduce_metrics(metrics, self._group), grad_norm, lr, skipped)

    def export_weights(self) -> Iterator[tuple[str, Tensor, tuple[int, ...], int]]:
        """This rank's rows of every parameter under its Hugging Face name; dim 0 is what FSDP2 shards."""
        for name, parameter in self._module.named_parameters():
            data = parameter.data
            assert isinstance(data, DTensor)
            local = data.to_local()
            shard = math.ceil(data.shape[0] / data.device_mesh.size())
            yield (
                _hf_name(name),
                local,
                tuple(data.shape),
                min(shard * data.device_mesh.get_local_rank(), data.shape[0]),
            )

    def save(self, directory: Path) -> None:
        """Sharded model, optimizer and update counter through torch.distributed.checkpoint."""
        save_sharded(self._state(), checkpoint_id=directory, process_group=self._group)

    def load(self, directory: Path) -> None:
        """Takes back what `save` wrote, under any number of ranks."""
        state = self._state()
        load_sharded(state, checkpoint_id=directory, process_group=self._group)
        optimizers = [self._optimizer] if self._optimizer else []
        set_state_dict(
            self._module,
            optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"] if optimizers else {},
            options=_STATE_OPTIONS,
        )
        self._num_updates = int(state["num_updates"].item())

    def save_hf(self, directory: Path) -> None:
        """Hugging Face checkpoint (config and safetensors) in the stored dtype, written by rank 0."""
        weights = {
            _hf_name(n): p.full_tensor().cpu()  # type: ignore[attr-defined]
            for n, p in self._module.named_parameters()
        }
        if dist.get_rank(self._group) == 0:
            model = self._module.model
            assert isinstance(model, PreTrainedModel)
            model.save_pretrained(directory, state_dict=weights)
        dist.barrier(self._group)

    def _state(self) -> dict[str, Any]:
        if self._optimizer:
            begin_state(self._optimizer)
        optimizers = [self._optimizer] if self._optimizer else []
        model, optimizer = get_state_dict(self._module, optimizers, options=_STATE_OPTIONS)
        state: dict[str, Any] = {"model": model, "num_updates": torch.tensor(self._num_updates)}
        return state | ({"optimizer": optimizer} if optimizers else {})

    def _pack(self, batch: Batch, rows: Sequence[int], norm: Normalizers) -> MicroBatch:
        return batch.micro_batch(rows, norm, share_prompt=self._spec.share_prompt, device=self._device)

    def _run(self, micro: MicroBatch, temperature: float, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        layout = prepare(micro.segments, getattr(torch, self._spec.sharding.dtype))
        outputs, entropies = self._module(micro, layout, temperature, entropy)
        return outputs, entropies

    def _clip(self, limit: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), limit)
        full = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return float(full)


class _ShardedModule(FSDPModule, nn.Module):
    """What fully_shard turns a module into, for type checkers."""

    model: nn.Module


def _shard(module: nn.Module, spec: EngineSpec, mesh: DeviceMesh) -> _ShardedModule:
    """fully_shard on every layer that is large enough, then on the root; gradients are summed over ranks."""
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, spec.sharding.dtype), reduce_dtype=torch.float32)
    for layer in decoder_layers(module):
        if sum(p.numel() for p in layer.parameters()) >= spec.sharding.wrap_min_num_params:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=spec.sharding.reshard_after_forward)
    root = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=spec.sharding.reshard_after_forward)
    for part in module.modules():  # the module itself: fully_shard changes it in place
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
    return root  # type: ignore[return-value]


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


def _spread(loss: Tensor) -> Tensor:
    """The loss; one that is not finite gets a gradient that is not either, and every rank sees it in the norm."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _hf_name(name: str) -> str:
    return name.removeprefix("model.")
