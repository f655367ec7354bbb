"""The contract between the driver and whatever trains: `TrainEngine`, and the settings it is built from.

An engine knows no algorithm. It gets its loss as a function `loss(outputs, entropy, micro_batch) -> (loss, metrics)`,
where outputs are the log-probabilities (or values) of the response tokens. The loss is already divided by global
counts, so gradients and metrics of micro-batches and ranks simply add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from workers.normalizers import Normalizers
from workers.settings import Auto
from workers.sync.buckets import Shard

if TYPE_CHECKING:
    # tensordict and DTensor take a second to import, and the driver has no use for them
    from workers.batch import Batch, MicroBatch
    from workers.engines.residency import Part

Loss = Callable[[Tensor, Tensor | None, "MicroBatch"], tuple[Tensor, dict[str, Tensor]]]
Output = Literal["outputs", "sum_pi_squared"]
"""What a forward pass is for: the head's own outputs; or, of a language model, the sum over the vocabulary of the
squared probabilities at each response token, at the sampling temperature."""
MicroBatches = Sequence[Sequence[int]]
"""Rows of a Batch, one sequence of rows per micro-batch; every rank has the same number of micro-batches."""


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """AdamW and its schedule. total_steps: optimizer steps of the whole run, for the schedule."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip_grad: float
    lr_scheduler_type: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    min_lr_ratio: float
    total_steps: int


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Precision and sharding. dtype, master_dtype: torch dtype names of compute and of the stored weights.

    reshard_after_forward: free gathered parameters between forward and backward; "auto": where there is no room to keep
        them, over all micro-batches of an optimizer step.
    wrap_min_num_params: layers with fewer parameters are gathered together with the rest of the model.
    """

    dtype: str
    master_dtype: str
    reshard_after_forward: Auto
    wrap_min_num_params: int


@dataclass(frozen=True, slots=True)
class ParallelSpec:
    """How Megatron cuts a model: numbers of ranks. Rank order: tensor fastest, then data, then pipeline.

    virtual_pipeline: model chunks per pipeline rank (interleaved schedule); None: one, not interleaved.
    sequence: norms and residuals are cut along tokens over the tensor-parallel ranks.
    expert: ranks that share the experts of a mixture-of-experts layer.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    sequence: bool = False
    expert: int = 1

    def data_size(self, world_size: int) -> int:
        """Data-parallel ranks among so many training ranks."""
        return world_size // (self.tensor * self.pipeline)

    def data_rank(self, rank: int, world_size: int) -> int:
        """Which of them a training rank belongs to; all ranks of one get the same batch."""
        return (rank // self.tensor) % self.data_size(world_size)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How to build one engine.

    strategy: which engine. parallel: how Megatron cuts the model; FSDP shards over all ranks.
    head: "logprobs" (a language model) or "values" (the same body with a scalar head).
    optimizer: None builds an engine that only runs forward (a reference model).
    share_prompt: compute a prompt once for all its responses in a micro-batch.
    gradient_checkpointing: recompute activations in the backward pass; "auto": of as many layers as have to be.
    compile: fuse what surrounds the matrix products of each layer (torch.compile).
    override_config: fields of the Hugging Face config to change.
    """

    model_path: str
    head: Literal["logprobs", "values"]
    sharding: ShardSpec
    optimizer: OptimizerSpec | None
    gradient_checkpointing: Auto
    share_prompt: bool
    compile: bool = False
    trust_remote_code: bool = False
    override_config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    strategy: Literal["fsdp", "megatron"] = "fsdp"
    parallel: ParallelSpec = ParallelSpec()


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step: which rows in which micro-batches on this rank, and the global counts of the loss."""

    micro_batches: MicroBatches
    norm: Normalizers


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did: metrics summed over micro-batches and ranks, gradient norm, whether it was skipped
    because loss or gradient was not finite, and the learning rate used."""

    metrics: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool


class TrainEngine(Protocol):
    """A model on one training rank, sharded over its process group.

    parts: what can leave the device between calls: "weights", and "optimizer" of one that trains.
    holds_outputs: whether `forward` gives this rank's data-parallel share; others of the same share give zeros or the
        same again (Megatron: the last pipeline stage's first tensor-parallel rank holds them).
    """

    parts: dict[str, Part]
    holds_outputs: bool

    def forward(
        self, batch: Batch, micro_batches: MicroBatches, *, temperature: float, output: Output = "outputs"
    ) -> Tensor:
        """Log-probs (or values, or what `output` names) of all response tokens of the rows, float32
        [batch.num_tokens], no gradient."""
        ...

    def train_step(self, batch: Batch, update: Update, loss: Loss, *, temperature: float, entropy: bool) -> StepResult:
        """One optimizer step over the micro-batches."""
        ...

    def forward_wants(self, batch: Batch, micro_batches: MicroBatches) -> int:
        """Bytes a forward pass wants to find free besides the weights."""
        ...

    def update_wants(self, batch: Batch, update: Update) -> int:
        """Bytes an optimizer step wants to find free besides weights and optimizer state."""
        ...

    def export_weights(self) -> Iterator[Shard]:
        """This rank's part of each parameter; tied ones once. The same names in the same order on every rank, and every
        element on exactly one: a rank that has nothing of a parameter gives an empty part."""
        ...

    def save(self, directory: Path) -> None:
        """Writes model and optimizer state (collective); `load` takes it back under any number of ranks."""
        ...

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote."""
        ...

    def save_hf(self, directory: Path) -> None:
        """Writes a Hugging Face copy of the model (collective)."""
        ...
