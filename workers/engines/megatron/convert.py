"""Between a Hugging Face checkpoint and what one rank holds, without ever having the whole model in one place."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from workers.engines.megatron.architectures import Item
from workers.engines.megatron.optimizer import Segment
from workers.engines.megatron.slices import Slice, part_of
from workers.sync.buckets import Shard

_LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")
_EXPERT = re.compile(r"(.*\.local_experts\.)(\d+)(\..*)")


class Held(NamedTuple):
    """This rank's part of a tensor. local: a view of the parameter; first: index along the item's `dim`."""

    item: Item
    local: Tensor
    first: int

    @property
    def slice(self) -> Slice:
        """Without what only a model's layout needs."""
        first = [0] * len(self.item.shape)
        first[self.item.dim] = self.first
        return Slice(self.item.name, self.local, tuple(first), self.item.shape)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands. replica: which of the (data-parallel) ranks that hold the same as it.

    expert_size: so many replicas, one after the other, divide the experts instead of all holding them.
    """

    tensor_rank: int
    tensor_size: int
    replica: int
    num_replicas: int
    expert_size: int = 1

    @property
    def expert_rank(self) -> int:
        """Which of those that divide the experts."""
        return self.replica % self.expert_size

    def copies(self, item: Item) -> tuple[int, int]:
        """(which, of how many) ranks that hold the same of this tensor."""
        which, many = self.replica, self.num_replicas
        if item.is_expert:
            which, many = which // self.expert_size, many // self.expert_size
        if item.cut is None:
            which, many = which * self.tensor_size + self.tensor_rank, many * self.tensor_size
        return which, many


def parameters_of(stages: Sequence[nn.Module], first_expert: int) -> dict[str, nn.Parameter]:
    """This rank's parameters by the names tables use: Megatron numbers the layers of each stage from 0, and the experts
    of each rank. first_expert: of this rank's, in every layer."""
    found: dict[str, nn.Parameter] = {}
    for stage in stages:
        first = stage.decoder.layers[0].layer_number - 1  # type: ignore[union-attr,index]
        for name, parameter in stage.named_parameters():
            found[_renumbered(_EXPERT, _renumbered(_LAYER, name, first), first_expert)] = parameter
    return found


def _renumbered(pattern: re.Pattern[str], name: str, first: int) -> str:
    local = pattern.match(name)
    return f"{local[1]}{int(local[2]) + first}{local[3]}" if local else name


def held(items: Sequence[Item], tensors: Mapping[str, Tensor], place: Place) -> list[Held]:
    """What this rank holds of the model, copies too. tensors: by parameter name (weights, or moments of them)."""
    found: list[Held] = []
    filled: dict[str, int] = defaultdict(int)
    for item in items:
        if item.parameter not in tensors:
            continue
        size = 1 if item.cut is None else place.tensor_size
        first, count = item.part(place.tensor_rank if size > 1 else 0, size)
        local = tensors[item.parameter].detach().narrow(item.dim, filled[item.parameter], count)
        filled[item.parameter] += -(-item.shape[item.dim] // size)
        found.append(Held(item, local, first))
    return found


def owned(
    mine: Sequence[Held], parameters: Mapping[str, Tensor], segments: Sequence[Segment], tensors: Sequence[Tensor]
) -> Iterator[Slice]:
    """What of all that this rank holds its optimizer owns. tensors: one for each segment, of its size."""
    by_parameter = {segment.parameter: (segment.first, t) for segment, t in zip(segments, tensors, strict=True)}
    for part in mine:
        if part.item.parameter in by_parameter:
            first, elements = by_parameter[part.item.parameter]
            within = int(part.local.storage_offset() - parameters[part.item.parameter].storage_offset())
            yield from part_of(part.slice, within, elements, first)


def parts(items: Sequence[Item], mine: Sequence[Held], place: Place) -> Iterator[Shard]:
    """What this rank exports of every tensor: replicas divide what they hold, so all of them send."""
    by_parameter = {(h.item.name, h.item.parameter): h for h in mine}
    sample = mine[0].local
    for item in items:
        if item.is_copy:
            continue
        dim, whole = item.dim, by_parameter.get((item.name, item.parameter))
        if whole is None:
            yield (
                item.name,
                sample.new_empty([0 if i == dim else n for i, n in enumerate(item.shape)]),
                item.shape,
                0,
                dim,
            )
            continue
        number, count = place.copies(item)
        total = whole.local.shape[dim]
        width = -(-total // count)
        start = min(number * width, total)
        yield item.name, whole.local.narrow(dim, start, min(width, total - start)), item.shape, whole.first + start, dim


class Checkpoint:
    """The safetensors files of a model's directory, read tensor by tensor and slice by slice.

    Raises ValueError where there are none.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        single = directory / "model.safetensors"
        if index.exists():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.exists():
            with safe_open(single, "pt") as file:
                self._file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise ValueError(f"strategy=megatron reads safetensors, and {directory} has none: save the model as such")
        self._open: dict[str, Any] = {}

    def read(self, slices: Iterable[Slice]) -> None:
        """Fills in what this rank holds. A value head, which no language model has, becomes 0.

        Raises ValueError naming a tensor that is missing or has another shape.
        """
        for part in slices:
            name = self._name(part.name)
            if name is None and part.name == "value_head.weight":
                part.local.zero_()
                continue
            if name is None:
                raise ValueError(f"{self._directory} has no tensor {part.name}")
            tensor = self._file(name).get_slice(name)
            if tuple(tensor.get_shape()) != part.shape:
                raise ValueError(f"{self._directory}: {name} has shape {tensor.get_shape()}, expected {part.shape}")
            part.local.copy_(tensor[part.box])

    def _name(self, name: str) -> str | None:
        """Under which it is stored: models with a head have a prefix that bare ones have not."""
        known = (name, f"model.{name}", name.removeprefix("model."))
        return next((candidate for candidate in known if candidate in self._file_of), None)

    def _file(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = safe_open(self._directory / file, "pt")
        return self._open[file]


def fill_gaps(tensors: Mapping[str, Tensor]) -> None:
    """Zeros, for rows that fill up the last part of a vocabulary and that nothing is ever read into."""
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in tensors:
            tensors[name].detach().zero_()
