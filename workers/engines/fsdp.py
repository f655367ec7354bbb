"""TrainEngine on PyTorch FSDP2: any dense Hugging Face decoder, packed micro-batches, CPU (gloo) or CUDA (NCCL)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
from workers.engines.base import EngineSpec, Loss, MicroBatches, Output, StepResult, Update
from workers.engines.flash import use_installed
from workers.engines.logprobs import CHUNK_BYTES
from workers.engines.models import LogprobModel, ValueModel, compile_layers, decoder_layers, load_model
from workers.engines.optimizer import begin_state, learning_rate, make_optimizer, moments
from workers.engines.recompute import Recompute, estimate, free_bytes, largest, smallest_total
from workers.engines.reduction import adds_up_whole, gradient_bytes, reduce_metrics, spread
from workers.engines.residency import Part, local_of
from workers.normalizers import Normalizers
from workers.sync.buckets import Shard

_NO_NORM = Normalizers(1.0, 1.0)
_STATE_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class FSDPEngine:
    """See `workers.engines.base.TrainEngine`. model: what `load` gave, if that was done before."""

    holds_outputs = True

    def __init__(
        self, spec: EngineSpec, mesh: DeviceMesh, device: torch.device, model: LogprobModel | ValueModel | None = None
    ) -> None:
        self._spec = spec
        self._device = device
        self._group = mesh.get_group()
        self._device_bytes = smallest_total(device, self._group)
        self._num_ranks = dist.get_world_size(self._group)
        model = model or load(spec)
        if device.type == "cuda":
            use_installed()
        if spec.compile:
            compile_layers(model)
        setting = spec.gradient_checkpointing if spec.optimizer else False
        itemsize = getattr(torch, spec.sharding.dtype).itemsize
        layers = decoder_layers(model)
        self._recompute = Recompute(layers, setting, device, estimate(layers, itemsize))
        self._module = _shard(model, spec, mesh)
        self._optimizer = make_optimizer(self._module, spec.optimizer) if spec.optimizer else None
        self._num_updates = 0
        self._stays_gathered = False
        weights = [local_of(p) for p in self._module.parameters()]
        self._shard_bytes = sum(w.nbytes for w in weights)
        self._num_elements = sum(p.numel() for p in self._module.parameters())
        in_layers = sum(p.numel() for layer in decoder_layers(self._module) for p in layer.parameters())
        self._num_root_elements = self._num_elements - in_layers
        self.parts = {"weights": Part(lambda: weights)}
        if self._optimizer is not None:
            self.parts["optimizer"] = Part(partial(moments, self._optimizer), self._missing_state_bytes)

    def forward(
        self, batch: Batch, micro_batches: MicroBatches, *, temperature: float, output: Output = "outputs"
    ) -> Tensor:
        """Log-probs, values or `output` of every response token, float32 [batch.num_tokens] on the host."""
        result = torch.zeros(batch.num_tokens, dtype=torch.float32)
        try:
            with torch.no_grad():
                for rows in micro_batches:
                    micro = self._pack(batch, rows, _NO_NORM)
                    outputs, _ = self._run(micro, temperature, entropy=False, output=output)
                    result[torch.from_numpy(batch.token_index(rows))] = outputs.cpu()
        finally:
            for part in _sharded_parts(self._module):  # no backward pass follows that would
                part.reshard()
        return result

    def train_step(self, batch: Batch, update: Update, loss: Loss, *, temperature: float, entropy: bool) -> StepResult:
        """Forward, backward and one optimizer step; a non-finite loss or gradient on any rank skips it on all."""
        assert self._optimizer is not None and self._spec.optimizer is not None
        metrics: list[dict[str, Tensor]] = []
        tokens = [batch.packed_tokens(rows, share_prompt=self._spec.share_prompt) for rows in update.micro_batches]
        self._fit(max(tokens), len(tokens), begun=False)
        for number, rows in enumerate(update.micro_batches):
            is_last = number == len(update.micro_batches) - 1
            self._module.set_requires_gradient_sync(is_last or not self._adds_up_whole)
            self._module.set_reshard_after_backward(is_last or not self._stays_gathered)
            micro = self._pack(batch, rows, update.norm)
            with self._measured(len(micro.input_ids), max(tokens), len(tokens)):
                outputs, entropies = self._run(micro, temperature, entropy=entropy)
                value, measured = loss(outputs, entropies, micro)
                (spread(value) + 0.0 * outputs.sum()).backward()  # empty micro-batches take part in the collectives
            metrics.append(measured if len(rows) else {})
        lr = learning_rate(self._spec.optimizer, self._num_updates)
        grad_norm = self._clip(self._spec.optimizer.clip_grad)
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            begin_state(self._optimizer)
            self._optimizer.step()
        self._optimizer.zero_grad()
        self._num_updates += 1
        return StepResult(reduce_metrics(metrics, self._group), grad_norm, lr, skipped)

    def update_wants(self, batch: Batch, update: Update) -> int:
        """Bytes an optimizer step wants to find free besides weights and optimizer state, to recompute nothing.

        Parameters that stay gathered are not among them.
        """
        tokens = [batch.packed_tokens(rows, share_prompt=self._spec.share_prompt) for rows in update.micro_batches]
        activations = self._recompute.whole_bytes(max(tokens, default=0))
        return int(activations) + self._gradient_bytes(len(tokens)) + self._root_bytes()

    def forward_wants(self, batch: Batch, micro_batches: MicroBatches) -> int:
        """Bytes a forward pass wants to find free besides the weights."""
        tokens = [batch.packed_tokens(rows, share_prompt=self._spec.share_prompt) for rows in micro_batches]
        return int(self._recompute.working_bytes(max(tokens, default=0))) + self._root_bytes()

    def export_weights(self) -> Iterator[Shard]:
        """This rank's rows of every parameter under its Hugging Face name; dim 0 is what FSDP2 shards."""
        for name, parameter in self._module.named_parameters():
            data = parameter.data
            assert isinstance(data, DTensor)
            local = data.to_local()
            shard = math.ceil(data.shape[0] / data.device_mesh.size())
            first_row = min(shard * data.device_mesh.get_local_rank(), data.shape[0])
            yield _hf_name(name), local, tuple(data.shape), first_row, 0

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
            self._pretrained.save_pretrained(directory, state_dict=weights)
        dist.barrier(self._group)

    def _state(self) -> dict[str, Any]:
        if self._optimizer:
            begin_state(self._optimizer)
        optimizers = [self._optimizer] if self._optimizer else []
        model, optimizer = get_state_dict(self._module, optimizers, options=_STATE_OPTIONS)
        state: dict[str, Any] = {"model": model, "num_updates": torch.tensor(self._num_updates)}
        return state | ({"optimizer": optimizer} if optimizers else {})

    def _fit(self, tokens: int, num_micro_batches: int, *, begun: bool) -> None:
        """Decides what is recomputed and what stays gathered in an optimizer step; collective.

        tokens: of the largest micro-batch. begun: gradients are allocated already.
        """
        free = free_bytes(self._device)
        if free is None:
            return
        gathered = self._num_elements * getattr(torch, self._spec.sharding.dtype).itemsize
        room = free - self._root_bytes() - self._missing_state_bytes()
        room -= 0 if begun else self._gradient_bytes(num_micro_batches)
        room -= gathered if self._spec.sharding.reshard_after_forward is False else 0
        self._recompute.fit(tokens, room, self._group)
        if self._can_stay_gathered and not self._recompute.needs_measuring:
            lacks = self._recompute.activation_bytes(tokens) + gathered > room
            self._keep_gathered(not largest([float(lacks)], self._group)[0])

    def _keep_gathered(self, keep: bool) -> None:
        """Whether parameters stay gathered until the last micro-batch of an optimizer step is done."""
        self._stays_gathered = keep
        for part in _sharded_parts(self._module):
            if part is not self._module:  # the root's own are needed again at once, by the backward pass
                part.set_reshard_after_forward(not keep, recurse=False)

    @property
    def _can_stay_gathered(self) -> bool:
        """PyTorch 2.8 and later can change it."""
        return self._spec.sharding.reshard_after_forward == "auto" and hasattr(FSDPModule, "set_reshard_after_forward")

    @contextmanager
    def _measured(self, tokens: int, most_tokens: int, num_micro_batches: int) -> Iterator[None]:
        """Around the forward and backward pass of one micro-batch of so many tokens; of `most_tokens` at most."""
        if not self._recompute.needs_measuring:
            yield
            return
        with self._recompute.measure(tokens, most_tokens, self._group):
            yield
        self._fit(most_tokens, num_micro_batches, begun=True)

    def _gradient_bytes(self, num_micro_batches: int) -> int:
        return gradient_bytes(self._num_elements, self._num_ranks, num_micro_batches, self._device_bytes)

    @property
    def _adds_up_whole(self) -> bool:
        return adds_up_whole(self._num_elements, self._num_ranks, self._device_bytes)

    def _missing_state_bytes(self) -> int:
        """Of the optimizer's state that the first step makes."""
        return 0 if self._optimizer is None or self._optimizer.state else 2 * self._shard_bytes

    def _root_bytes(self) -> int:
        """What is outside the layers: their parameters, gathered; of log-probs, chunks of logits and the gradient of
        the output layer."""
        gathered = self._num_root_elements * int(getattr(torch, self._spec.sharding.dtype).itemsize)
        if self._spec.head != "logprobs":
            return gathered
        weight: Tensor = self._pretrained.get_output_embeddings().weight
        return gathered + 3 * CHUNK_BYTES[self._device.type] + 6 * weight.numel()

    @property
    def _pretrained(self) -> PreTrainedModel:
        model = self._module.model
        assert isinstance(model, PreTrainedModel)
        return model

    def _pack(self, batch: Batch, rows: Sequence[int], norm: Normalizers) -> MicroBatch:
        return batch.micro_batch(rows, norm, share_prompt=self._spec.share_prompt, device=self._device)

    def _run(
        self, micro: MicroBatch, temperature: float, *, entropy: bool, output: Output = "outputs"
    ) -> tuple[Tensor, Tensor | None]:
        layout = prepare(micro.segments, getattr(torch, self._spec.sharding.dtype))
        outputs, entropies = self._module(micro, layout, temperature, entropy, output)
        return outputs, entropies

    def _clip(self, limit: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self._module.parameters(), limit)
        full = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return float(full)


def load(spec: EngineSpec) -> LogprobModel | ValueModel:
    """The spec's model on the host, the same on every rank: each keeps its own rows of weights made at random too."""
    torch.manual_seed(spec.seed)
    return load_model(spec)


class _ShardedModule(FSDPModule, nn.Module):
    """What fully_shard turns a module into, for type checkers."""

    model: nn.Module


def _shard(module: nn.Module, spec: EngineSpec, mesh: DeviceMesh) -> _ShardedModule:
    """fully_shard on every layer that is large enough, then on the root; gradients are summed over ranks."""
    reshard = spec.sharding.reshard_after_forward is not False
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, spec.sharding.dtype), reduce_dtype=torch.float32)
    for layer in decoder_layers(module):
        if sum(p.numel() for p in layer.parameters()) >= spec.sharding.wrap_min_num_params:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    root = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # backward begins with it
    for part in _sharded_parts(module):  # the module itself: fully_shard changes it in place
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
    return root  # type: ignore[return-value]


def _sharded_parts(module: nn.Module) -> list[FSDPModule]:
    """Every module that gathers parameters of its own, the root first."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _hf_name(name: str) -> str:
    return name.removeprefix("model.")
