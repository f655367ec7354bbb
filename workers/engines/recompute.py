"""Activations are kept where they fit, and recomputed in the backward pass where they do not.

One layer that keeps its activations and one that does not are measured in the first micro-batch of a run. From then on
every optimizer step keeps as many layers' as the memory that is free allows, for its largest micro-batch. All ranks do
the same: recomputing gathers parameters, and collectives have to match.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from workers.settings import Auto

MARGIN = 0.03
"""Share of the device's memory that plans leave free: fragments, what libraries allocate for themselves."""
WORKING_LAYERS = 2.0
"""What the backward pass of one layer needs besides, in activations of one layer."""
MIN_SHARE = 0.25
"""A micro-batch with fewer tokens than this share of the largest tells too little about memory per token."""


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Activations of one layer per token, in bytes: kept whole, and with only the layer's input kept."""

    whole: float
    input_only: float


def num_recomputed(num_layers: int, layer: LayerBytes, tokens: int, room: float) -> int:
    """How many layers have to be recomputed so that the activations of `tokens` tokens fit into `room` bytes."""
    spent = tokens * (num_layers + WORKING_LAYERS) * layer.whole
    saved = tokens * (layer.whole - layer.input_only)
    if spent <= room:
        return 0
    return num_layers if saved <= 0 else min(num_layers, int(-(-(spent - room) // saved)))


def estimate(layers: Sequence[nn.Module], itemsize: int) -> LayerBytes:
    """Before it was measured: what goes into the matrix products of a layer and comes out of them.

    itemsize: of the compute dtype, bytes.
    """
    products = [part for part in layers[0].modules() if isinstance(part, nn.Linear)] if layers else []
    return LayerBytes(float(itemsize * sum(part.in_features + part.out_features for part in products)), 0.0)


def free_bytes(device: torch.device) -> int | None:
    """What this process can still allocate without asking anyone to make room; None on a CPU, which is not planned."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + unused - MARGIN * total)


def total_bytes(device: torch.device) -> int | None:
    """Memory of a GPU, used or not; None for a CPU."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


def smallest_total(device: torch.device, group: dist.ProcessGroup) -> int | None:
    """The same of the smallest GPU among the ranks: what hangs on it has to be the same on all; collective."""
    total = total_bytes(device)
    return None if total is None else int(-largest([-float(total)], group)[0])


class Recompute:
    """Which layers of one model recompute their activations: the first so many.

    layers: the decoder's, in order. setting: True: all, False: none, "auto": as many as have to. estimated: what counts
    until a layer was measured.
    """

    def __init__(self, layers: Sequence[nn.Module], setting: Auto, device: torch.device, estimated: LayerBytes) -> None:
        self._layers = [layer for layer in layers if hasattr(layer, "gradient_checkpointing")]
        self._is_planned = setting == "auto" and free_bytes(device) is not None
        self.layer_bytes: LayerBytes | None = None
        self._estimated = estimated
        self._depth = len(layers)
        self.num_recomputed = 0
        self._recompute(len(self._layers) if setting is True else 0)

    @property
    def num_layers(self) -> int:
        """Layers that can be recomputed."""
        return len(self._layers)

    @property
    def needs_measuring(self) -> bool:
        """Whether the next micro-batch must be one that `measure` watches."""
        return self._is_planned and self.layer_bytes is None and len(self._layers) > 1

    def whole_bytes(self, tokens: int) -> float:
        """Activations of a micro-batch of so many tokens if nothing is recomputed."""
        return tokens * (self._depth + WORKING_LAYERS) * (self.layer_bytes or self._estimated).whole

    def activation_bytes(self, tokens: int) -> float:
        """The same with what is recomputed now."""
        layer = self.layer_bytes or self._estimated
        return self.whole_bytes(tokens) - tokens * self.num_recomputed * (layer.whole - layer.input_only)

    def working_bytes(self, tokens: int) -> float:
        """Of the layer at work."""
        return tokens * WORKING_LAYERS * (self.layer_bytes or self._estimated).whole

    def fit(self, tokens: int, room: float, group: dist.ProcessGroup) -> None:
        """Plans for micro-batches of at most `tokens` tokens; collective. room: bytes for activations, on this rank."""
        if self._is_planned and self.layer_bytes is not None:
            wanted = num_recomputed(len(self._layers), self.layer_bytes, tokens, room)
            self._recompute(int(largest([wanted], group)[0]))

    @contextmanager
    def measure(self, tokens: int, most_tokens: int, group: dist.ProcessGroup) -> Iterator[None]:
        """Around one micro-batch of so many tokens, forward and backward; collective. most_tokens: of the largest.

        A reading that cannot be right is not kept, and the next micro-batch is measured again.
        """
        self._recompute(len(self._layers))
        self._layers[1].gradient_checkpointing = False  # type: ignore[assignment]
        found = [0.0, 0.0]
        hooks = [hook for i, layer in enumerate(self._layers[:2]) for hook in _watch(layer, found, i)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        tells = tokens >= MIN_SHARE * most_tokens and found[0] < found[1]
        thin, whole = largest([x / tokens if tells else 0.0 for x in found], group)
        self.layer_bytes = LayerBytes(whole, thin) if whole else None

    def _recompute(self, count: int) -> None:
        self.num_recomputed = count
        for number, layer in enumerate(self._layers):
            layer.gradient_checkpointing = number < count  # type: ignore[assignment]


def largest(values: Sequence[float], group: dist.ProcessGroup) -> list[float]:
    """Of each value, the largest of all ranks; collective."""
    everyone = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(everyone, dist.ReduceOp.MAX, group=group)
    return everyone.tolist()


def _watch(layer: nn.Module, found: list[float], place: int) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Writes what the first forward pass of a layer leaves allocated. Inside FSDP's hooks, so without parameters."""
    before: list[int] = []

    def start(*_: object) -> None:
        before.append(torch.cuda.memory_allocated())

    def end(*_: object) -> None:
        if len(before) == 1:  # a second pass recomputes
            found[place] = float(torch.cuda.memory_allocated() - before[0])

    yield layer.register_forward_pre_hook(start)
    yield layer.register_forward_hook(end, prepend=True)
