"""What one training rank of a role takes of its device, term by term, from what the engines do.

FSDP shards weights, optimizer state and summed gradients over its ranks; a pass gathers parameters in the compute
dtype, outside the layers for the whole pass and inside them a layer at a time, or all where they fit. Gradients of
several micro-batches add up in float32, unsharded where that takes little of the device. Megatron holds its part in the
compute dtype, a float32 gradient buffer inside an update, and divides master weights and moments over data-parallel
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainer.config.schema import ActorConfig, Config, CriticConfig
from trainer.engines import shard_spec
from trainer.plan.batches import Micro, forward_micro, update_micro
from trainer.plan.layout import Layout
from trainer.plan.places import RankPlace
from workers.engines.base import ShardSpec
from workers.engines.logprobs import CHUNK_BYTES
from workers.engines.recompute import LayerBytes
from workers.engines.reduction import gradient_bytes
from workers.settings import Auto

_CHUNK = CHUNK_BYTES["cuda"]
_LOGIT = 4
"""Bytes of a logit."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One kind of pass of a role over its micro-batches, bytes on one device.

    in_flight: rows whose activations are kept at a time; tokens: rows of one micro-batch. logits: chunks of them and
    what is made of them. reserved: what the engine sets aside besides activations, where it decides what to recompute.
    """

    tokens: int
    in_flight: int
    logits: int
    reserved: int


@dataclass(frozen=True, slots=True)
class EngineTerms:
    """Bytes of one rank of a role. weights, optimizer: held between passes; gradients: within an update.

    gathered: parameters outside the layers and of two layers; gathered_all: of the whole model, kept where they fit
        (0: the engine gathers nothing). keep_gathered: as configured.
    layer: activations of one layer per token; num_layers: of this rank.
    """

    weights: int
    optimizer: int
    gradients: int
    gathered: int
    gathered_all: int
    keep_gathered: bool | None
    layer: LayerBytes
    num_layers: int
    recompute: Auto
    forward: Pass
    update: Pass | None


def engine_terms(cfg: Config, place: RankPlace, layout: Layout, device_bytes: int | None) -> EngineTerms:
    """Of the role's rank at that place. device_bytes: of its device; None: not known, or a CPU."""
    return _megatron(cfg, place, layout) if place.role.megatron else _fsdp(cfg, place, layout, device_bytes)


def activation_bytes(layout: Layout, itemsize: int, *, tensor: int = 1, sequence: bool = False) -> LayerBytes:
    """Of one layer and token, kept for the backward pass: what goes into every matrix product, the norms and attention.

    tensor: ranks that a layer is cut over; sequence: norms and residuals are cut as well.
    """
    streams = 4 * layout.hidden  # into both norms, and out of them into the matrix products
    attention = 2 * layout.query + 2 * layout.kv  # q, k, v, and what attention gives
    if layout.normalises_qk:
        attention += layout.query + layout.kv
    mlp = 3 * layout.intermediate  # gate, up, and their product
    extra = 4 * layout.heads  # normalisers of attention, float32
    if layout.experts is not None:
        per_token = layout.experts.per_token
        mlp = per_token * (mlp + 2 * layout.hidden)  # rows are copied to their experts, and back
        extra += _LOGIT * layout.experts.number * tensor  # the router's
    cut = tensor if sequence else 1
    whole = itemsize * (streams / cut + (attention + mlp) / tensor) + extra / tensor
    return LayerBytes(whole, itemsize * layout.hidden / cut)


def _fsdp(cfg: Config, place: RankPlace, layout: Layout, device_bytes: int | None) -> EngineTerms:
    sharding, ranks = shard_spec(place.role), place.num_ranks
    itemsize, master = _itemsize(sharding.dtype), _itemsize(sharding.master_dtype)
    shard = -(-layout.total // ranks)
    outside, trains = layout.outside_layers * itemsize, place.role.model_dtype is not None
    reserved = outside + (3 * _CHUNK + 6 * layout.output if layout.has_logits else 0)
    forward = forward_micro(cfg, place.role, place.data_size)
    update = update_micro(cfg, place.role, place.data_size) if trains else None
    return EngineTerms(
        weights=shard * master,
        optimizer=2 * shard * master if trains else 0,
        gradients=gradient_bytes(layout.total, ranks, update.number, device_bytes) if update else 0,
        gathered=outside + 2 * layout.largest_layer * itemsize,
        gathered_all=layout.total * itemsize,
        keep_gathered=None if sharding.reshard_after_forward == "auto" else not sharding.reshard_after_forward,
        layer=activation_bytes(layout, itemsize),
        num_layers=layout.num_layers,
        recompute=_recompute(cfg, place),
        forward=_pass(forward, 1, _chunks(layout, forward, 1), reserved),
        update=_pass(update, 1, _chunks(layout, update, 1, itemsize), reserved) if update else None,
    )


def _megatron(cfg: Config, place: RankPlace, layout: Layout) -> EngineTerms:
    megatron, sharding = place.role.megatron, shard_spec(place.role)
    assert megatron is not None
    tensor, pipeline = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    expert, chunks = megatron.expert_model_parallel_size, megatron.virtual_pipeline_model_parallel_size or 1
    held = layout.held(tensor=tensor, pipeline=pipeline, expert=expert, stage=place.stage)
    itemsize, trains = _itemsize(sharding.dtype), place.role.model_dtype is not None
    is_last = place.stage == pipeline - 1 and layout.has_logits
    reserved = 3 * _CHUNK + 6 * layout.output // tensor if is_last else 0
    forward = forward_micro(cfg, place.role, place.data_size)
    update = update_micro(cfg, place.role, place.data_size) if trains else None
    flight = _in_flight(update.number, pipeline, chunks) if update else 1.0
    logits = _chunks(layout, update, tensor, itemsize) if update and is_last else 0
    return EngineTerms(
        weights=sum(held) * itemsize,
        optimizer=_divided_state(place, layout, sharding) if trains else 0,
        gradients=4 * sum(held) if trains else 0,
        gathered=0,
        gathered_all=0,
        keep_gathered=False,
        layer=activation_bytes(layout, itemsize, tensor=tensor, sequence=_is_sequence_cut(place)),
        num_layers=-(-layout.num_layers // pipeline),
        recompute=_recompute(cfg, place),
        forward=_pass(forward, 1, _chunks(layout, forward, tensor) if is_last else 0, reserved),
        update=_pass(update, flight, logits, reserved) if update else None,
    )


def _divided_state(place: RankPlace, layout: Layout, sharding: ShardSpec) -> int:
    """Moments, and master weights where weights have another dtype.

    An expert is on 1 of `expert` ranks, and its state divided by so much fewer: of all experts as of all else.
    """
    megatron = place.role.megatron
    assert megatron is not None
    tensor, pipeline = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    elements = sum(layout.held(tensor=tensor, pipeline=pipeline, stage=place.stage))
    master = _itemsize(sharding.master_dtype)
    per_element = 2 * master + (0 if sharding.dtype == sharding.master_dtype else master)
    return -(-elements * per_element // place.data_size)


def _is_sequence_cut(place: RankPlace) -> bool:
    megatron = place.role.megatron
    is_cut = megatron is not None and megatron.tensor_model_parallel_size > 1
    return is_cut and place.role.actor.megatron.sequence_parallel


def _recompute(cfg: Config, place: RankPlace) -> Auto:
    if isinstance(place.role.config, CriticConfig):
        return cfg.critic.model.enable_gradient_checkpointing
    trains = isinstance(place.role.config, ActorConfig)
    return cfg.actor_rollout_ref.model.enable_gradient_checkpointing if trains else False


def _in_flight(number: int, stages: int, chunks: int) -> float:
    """Micro-batches whose activations a pipeline's first stage keeps, as in `workers.engines.megatron.room`."""
    passes = stages if chunks == 1 else 2 * (stages - 1) + (chunks - 1) * stages + 1
    return min(number * chunks, passes) / chunks


def _pass(micro: Micro, in_flight: float, logits: int, reserved: int) -> Pass:
    return Pass(micro.tokens, int(micro.tokens * in_flight), logits, reserved)


def _chunks(layout: Layout, micro: Micro, tensor: int, itemsize: int = 0) -> int:
    """A chunk of float32 logits; itemsize: of their gradient, whose sum over chunks is kept in float32 as well."""
    if not layout.has_logits:
        return 0
    chunk = min(_CHUNK, _LOGIT * micro.tokens * layout.vocab // tensor)
    if not itemsize:
        return chunk
    return chunk + chunk * itemsize // _LOGIT + (_LOGIT + itemsize) * layout.output // tensor


def _itemsize(dtype: str) -> int:
    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize
