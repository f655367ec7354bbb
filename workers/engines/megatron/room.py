"""Memory that a Megatron engine wants free on its device, and how many layers it recomputes to get by with less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn
from transformers import PreTrainedConfig

from workers.batch import Batch
from workers.engines.base import EngineSpec, MicroBatches, Update
from workers.engines.logprobs import CHUNK_BYTES
from workers.engines.megatron.architectures import experts_of
from workers.engines.recompute import LayerBytes, Recompute, free_bytes


class Room:
    """Plans for one engine, made while its groups are in place. layers: of this rank."""

    def __init__(
        self, hf: PreTrainedConfig, spec: EngineSpec, device: torch.device, layers: Sequence[nn.Module]
    ) -> None:
        self._hf, self._spec, self._device = hf, spec, device
        # asked once: later on the groups in place may be another engine's
        self._has_logits = spec.head == "logprobs" and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        itemsize: int = getattr(torch, spec.sharding.dtype).itemsize
        per_token = itemsize * max(self._row_size(layer) for layer in layers)
        setting = spec.gradient_checkpointing if spec.optimizer else False
        self.recompute = Recompute(layers, setting, device, LayerBytes(float(per_token), 0.0))

    def update_wants(self, batch: Batch, update: Update, gradient_bytes: int) -> int:
        """Bytes an optimizer step wants to find free besides weights and optimizer state, to recompute nothing."""
        tokens = self._tokens_in_flight(batch, update.micro_batches)
        return int(self.recompute.whole_bytes(tokens)) + gradient_bytes + self._logits_bytes()

    def forward_wants(self, batch: Batch, micro_batches: MicroBatches) -> int:
        """Bytes a forward pass wants to find free besides the weights."""
        return int(self.recompute.working_bytes(max(self._tokens(batch, micro_batches)))) + self._logits_bytes()

    def fit(self, batch: Batch, update: Update, state_bytes: int) -> None:
        """Decides which layers are recomputed in an optimizer step; collective. state_bytes: of gradients, and of
        optimizer state that the step makes."""
        free = free_bytes(self._device)
        if free is not None:
            tokens = self._tokens_in_flight(batch, update.micro_batches)
            self.recompute.fit(tokens, free - state_bytes - self._logits_bytes(), world())

    @contextmanager
    def measured(self, batch: Batch, update: Update) -> Iterator[None]:
        """Around the first optimizer step, whose first micro-batch shows what activations take."""
        if not self.recompute.needs_measuring:
            yield
            return
        tokens = self._tokens(batch, update.micro_batches)
        with self.recompute.measure(tokens[0], max(tokens), world()):
            yield

    def even(self, micro_batches: MicroBatches) -> list[Sequence[int]]:
        """At least one, and for the interleaved schedule a multiple of the pipeline's length: empty ones fill it up."""
        multiple = self._spec.parallel.pipeline if self._spec.parallel.virtual_pipeline else 1
        missing = -len(micro_batches) % multiple if micro_batches else multiple
        return [*micro_batches, *[()] * missing]

    def _tokens(self, batch: Batch, micro_batches: MicroBatches) -> list[int]:
        """Rows of each micro-batch."""
        share_prompt = self._spec.share_prompt
        return [batch.packed_tokens(rows, share_prompt=share_prompt) for rows in self.even(micro_batches)]

    def _tokens_in_flight(self, batch: Batch, micro_batches: MicroBatches) -> int:
        """Most rows whose activations this rank keeps at a time, as if each passed all of its layers.

        Warm-up of the schedule on the first stage and the micro-batch at work (https://arxiv.org/abs/2104.04473,
        section 2.2).
        """
        parallel, tokens = self._spec.parallel, self._tokens(batch, micro_batches)
        stages, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
        passes = stages if chunks == 1 else 2 * (stages - 1) + (chunks - 1) * stages + 1
        return max(tokens) * min(len(tokens) * chunks, passes) // chunks

    def _row_size(self, layer: nn.Module) -> int:
        """Numbers that go into matrix products and come out of them, per token, which goes through some of the experts;
        those are all of one size."""
        size = {name: sum(p.shape) for name, p in layer.named_parameters() if p.ndim == 2}
        one_expert = sum(n for name, n in size.items() if ".local_experts.0." in name)
        rest = sum(n for name, n in size.items() if ".local_experts." not in name)
        experts = experts_of(self._hf)
        return rest + one_expert * (experts.per_token if experts else 0)

    def _logits_bytes(self) -> int:
        """What log-probs take: chunks of logits, and the gradient of the output layer."""
        if not self._has_logits:
            return 0
        weight: int = self._hf.vocab_size * self._hf.hidden_size // self._spec.parallel.tensor
        return 3 * CHUNK_BYTES[self._device.type] + 6 * weight


def world() -> dist.ProcessGroup:
    """All training ranks."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD
