"""TrainEngine on Megatron-core: decoders cut by tensor, pipeline, expert and sequence, packed micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from workers.batch import Batch, MicroBatch
from workers.engines.base import EngineSpec, Loss, MicroBatches, Output, StepResult, Update
from workers.engines.flash import use_installed
from workers.engines.megatron import groups, shim, slices
from workers.engines.megatron.architectures import check, experts_of, items
from workers.engines.megatron.checkpoint import save_copy
from workers.engines.megatron.convert import Checkpoint, Place, fill_gaps, held, owned, parameters_of, parts
from workers.engines.megatron.model import Stage, padded, transformer_config
from workers.engines.megatron.optimizer import Gradients, ShardedAdamW, clip_scale, gradient_norm
from workers.engines.megatron.room import Room, world
from workers.engines.megatron.slices import Slice
from workers.engines.models import hf_config
from workers.engines.optimizer import learning_rate
from workers.engines.reduction import reduce_metrics, spread
from workers.engines.residency import Part
from workers.normalizers import Normalizers
from workers.sync.buckets import Shard

_NO_NORM = Normalizers(1.0, 1.0)
Finish = Callable[[MicroBatch, Tensor, Tensor | None], Any]
"""What becomes of a micro-batch's outputs and entropies, on the last stage."""


class MegatronEngine:
    """See `workers.engines.base.TrainEngine`. All ranks of the default process group take part; `spec.parallel` says
    how. Weights are read from `spec.model_path` slice by slice, straight into the parameters.

    Exports and copies show the weights the model computes with; master weights are the optimizer's.
    holds_outputs: of its data-parallel share: on the last stage's first tensor-parallel rank.

    Raises ValueError for a model that is not known or cannot be cut so (`architectures.check`).
    """

    def __init__(self, spec: EngineSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._hf = hf_config(
            spec.model_path, trust_remote_code=spec.trust_remote_code, override_config=spec.override_config
        )
        if problems := check(self._hf, spec.parallel):
            raise ValueError("; ".join(problems))
        shim.install(device)
        if device.type == "cuda":
            use_installed()
        groups.use(spec.parallel)
        self._config = transformer_config(self._hf, spec, device)
        virtual = spec.parallel.virtual_pipeline
        chunks = range(virtual) if virtual else (None,)
        stages = [Stage(self._hf, self._config, spec.head, chunk).to(device) for chunk in chunks]
        self._chunks: Sequence[nn.Module] = [stage.train(spec.optimizer is not None) for stage in stages]
        self._room = Room(self._hf, spec, device, [layer for stage in stages for layer in stage.decoder.layers])
        self._place, experts = _place(), experts_of(self._hf)
        per_rank = experts.number // spec.parallel.expert if experts else 0
        self._parameters = parameters_of(stages, self._place.expert_rank * per_rank)
        self._items = list(items(self._hf, spec.head))
        is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        self.holds_outputs = is_last_stage and self._place.tensor_rank == 0
        self.parts = {"weights": Part(lambda: [p.detach() for p in self._parameters.values()])}
        self._training = _Training(self._config, stages, self._parameters, spec) if spec.optimizer else None
        self._num_updates = 0
        if self._training is not None:
            self._chunks = self._training.chunks
            self.parts["optimizer"] = Part(self._training.optimizer.tensors, self._training.optimizer.missing_bytes)
        fill_gaps(self._parameters)
        self._held = held(self._items, self._parameters, self._place)
        Checkpoint(Path(spec.model_path)).read(self._weights())
        # views are made once, as none can be made of weights that are away
        self._exported = tuple(parts(self._items, self._held, self._place))
        self._publish()

    def forward(
        self, batch: Batch, micro_batches: MicroBatches, *, temperature: float, output: Output = "outputs"
    ) -> Tensor:
        """Log-probs, values or `output` of every response token, float32 [batch.num_tokens] on the host; zeros on all
        stages but the last."""
        result = torch.zeros(batch.num_tokens, dtype=torch.float32)

        def keep(rows: Sequence[int], _: MicroBatch, outputs: Tensor, __: Tensor | None) -> None:
            result[torch.from_numpy(batch.token_index(rows))] = outputs.cpu()

        todo = [(rows, partial(keep, rows)) for rows in self._room.even(micro_batches)]
        with torch.no_grad():
            self._run(batch, todo, _NO_NORM, temperature, entropy=False, forward_only=True, output=output)
        return result

    def train_step(self, batch: Batch, update: Update, loss: Loss, *, temperature: float, entropy: bool) -> StepResult:
        """Forward, backward and one optimizer step; a non-finite loss or gradient on any rank skips it on all."""
        training, settings = self._training, self._spec.optimizer
        assert training is not None and settings is not None
        metrics: list[dict[str, Tensor]] = []

        def lose(micro: MicroBatch, outputs: Tensor, entropies: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
            value, measured = loss(outputs, entropies, micro)
            if micro.num_sequences and self.holds_outputs:
                metrics.append(measured)
            total = spread(value) + 0.0 * outputs.sum()  # empty micro-batches take part in the collectives
            return total, torch.zeros((), dtype=torch.int), {}

        todo = [(rows, lose) for rows in self._room.even(update.micro_batches)]
        self._room.fit(batch, update, training.gradients.num_bytes + training.optimizer.missing_bytes())
        with training.gradients:
            with self._room.measured(batch, update):
                self._run(batch, todo, update.norm, temperature, entropy=entropy, forward_only=False)
            grad_norm = gradient_norm(self._own_gradients(), world(), self._device)
            skipped = not math.isfinite(grad_norm)
            lr = learning_rate(settings, self._num_updates)
            if not skipped:
                training.optimizer.step(lr, clip_scale(grad_norm, settings.clip_grad))
        self._num_updates += 1
        return StepResult(reduce_metrics(metrics, world()), grad_norm, lr, skipped)

    def update_wants(self, batch: Batch, update: Update) -> int:
        """Bytes an optimizer step wants to find free besides weights and optimizer state, to recompute nothing."""
        assert self._training is not None
        return self._room.update_wants(batch, update, self._training.gradients.num_bytes)

    def forward_wants(self, batch: Batch, micro_batches: MicroBatches) -> int:
        """Bytes a forward pass wants to find free besides the weights."""
        return self._room.forward_wants(batch, micro_batches)

    def export_weights(self) -> Iterator[Shard]:
        """This rank's part of every parameter under its Hugging Face name; data-parallel replicas divide theirs."""
        return iter(self._exported)

    def save(self, directory: Path) -> None:
        """Model, optimizer and update counter under Hugging Face names; each rank writes what its optimizer owns."""
        groups.use(self._spec.parallel)
        slices.write(directory, [*self._state(), *self._counts().values()], world())

    def load(self, directory: Path) -> None:
        """Takes back what `save` wrote, under any number of ranks and however the model is cut."""
        groups.use(self._spec.parallel)
        counts = self._counts()
        slices.read(directory, [*self._state(), *counts.values()], world())
        self._num_updates = int(counts["num_updates"].local)
        if self._training is not None:
            self._training.optimizer.num_steps = int(counts["num_steps"].local)
        self._publish()

    def save_hf(self, directory: Path) -> None:
        """Hugging Face checkpoint (config and safetensors) in the dtype the model computes in, written by rank 0."""
        save_copy(directory, self._hf, Path(self._spec.model_path), self.export_weights())

    def _publish(self) -> None:
        if self._training is not None:
            self._training.optimizer.publish()

    def _weights(self) -> Iterator[Slice]:
        """Where weights are kept to full precision: by this rank's optimizer, or in the parameters."""
        if self._training is None:
            return (part.slice for part in self._held)
        return self._owned(self._training.optimizer.masters)

    def _owned(self, tensors: Sequence[Tensor]) -> Iterator[Slice]:
        assert self._training is not None
        return owned(self._held, self._parameters, self._training.optimizer.segments, tensors)

    def _state(self) -> Iterator[Slice]:
        """Shares memory with the engine: loading into it is loading."""
        found = {"model": self._weights()}
        if self._training is not None:
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"optimizer.{moment}"] = self._owned(self._training.optimizer.state(moment))
        return (part._replace(name=f"{key}.{part.name}") for key, parts in found.items() for part in parts)

    def _counts(self) -> dict[str, Slice]:
        counts = {"num_updates": self._num_updates}
        if self._training is not None:
            counts["num_steps"] = self._training.optimizer.num_steps
        return {name: Slice(name, torch.tensor([count]), (0,), (1,)) for name, count in counts.items()}

    def _run(
        self,
        batch: Batch,
        todo: Sequence[tuple[Sequence[int], Finish]],
        norm: Normalizers,
        temperature: float,
        *,
        entropy: bool,
        forward_only: bool,
        output: Output = "outputs",
    ) -> None:
        """Micro-batches through Megatron's schedule, each packed when the first chunk of this rank asks for it."""

        def step(data: Iterator[tuple[MicroBatch, Finish]], chunk: nn.Module) -> tuple[Tensor, Finish | None]:
            micro, finish = next(data)
            result = chunk(micro, temperature, entropy, output)
            if isinstance(result, Tensor):
                return result, None
            outputs, entropies = result
            return outputs, lambda outputs, **_: finish(micro, outputs, entropies)

        groups.use(self._spec.parallel)
        packed = ((self._pack(batch, rows, norm), finish) for rows, finish in todo)
        with shim.schedule_devices(self._device):
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=list(tee(packed, len(self._chunks))),
                model=list(self._chunks),
                num_microbatches=len(todo),
                seq_length=1,  # they tell each other
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _pack(self, batch: Batch, rows: Sequence[int], norm: Normalizers) -> MicroBatch:
        micro = batch.micro_batch(rows, norm, share_prompt=self._spec.share_prompt, device=self._device)
        return padded(micro, self._config.tensor_model_parallel_size) if self._config.sequence_parallel else micro

    def _own_gradients(self) -> list[Tensor]:
        """Those that no other rank has."""
        assert self._training is not None
        own = {i.parameter for i in self._items if not i.is_copy and (i.cut is not None or not self._place.tensor_rank)}
        return [s.gradient for s in self._training.optimizer.segments if s.parameter in own]


class _Training:
    """What a model needs to be trained. chunks: the stages inside Megatron's gradient reduction."""

    def __init__(
        self,
        config: TransformerConfig,
        stages: Sequence[Stage],
        parameters: Mapping[str, nn.Parameter],
        spec: EngineSpec,
    ) -> None:
        assert spec.optimizer is not None
        _release(parameters.values())
        for stage in stages:
            if stage.share_embeddings_and_output_weights and (stage.pre_process or stage.post_process):
                # a bucket by itself, which is divided alike on first and last stage: their gradients are added up
                stage.shared_embedding_or_output_weight().shared_embedding = True  # type: ignore[attr-defined]
        reduction = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=True
        )
        config.finalize_model_grads_func = _sum_gradients
        self.chunks = [DistributedDataParallel(config, reduction, stage) for stage in stages]
        self.optimizer = ShardedAdamW(
            self.chunks, parameters, spec.optimizer, getattr(torch, spec.sharding.master_dtype)
        )
        self.gradients = Gradients(self.chunks)


def _release(parameters: Iterable[nn.Parameter]) -> None:
    """Leaves one zero for all elements: Megatron copies parameters into its buffers, and nothing is in them yet."""
    for parameter in parameters:
        shape = parameter.shape
        parameter.data = torch.empty_strided(shape, [0] * len(shape), dtype=parameter.dtype, device=parameter.device)
        parameter.data.zero_()


def _sum_gradients(chunks: list[nn.Module], _: Tensor | None, **options: Any) -> None:
    """Over ranks, not divided by a number of tokens: the loss has been divided already."""
    finalize_model_grads(chunks, None, **options)


def _place() -> Place:
    return Place(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
