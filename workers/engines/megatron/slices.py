"""State in pieces: rectangles of tensors that are whole nowhere, saved and loaded by torch.distributed.checkpoint.

DTensors cannot say it: tensor parallelism cuts a tensor along one dimension, and the distributed optimizer cuts what
is left of it anywhere. torch's planners are asked instead, in its own format: any other rectangles of the same tensors
can be read from what was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


class Slice(NamedTuple):
    """A rectangle of a tensor. local: its elements, in memory of this rank's; first: index of its first element in the
    whole tensor; shape: of the whole tensor."""

    name: str
    local: Tensor
    first: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> tuple[slice, ...]:
        """Where the rectangle is in the whole tensor."""
        return tuple(slice(first, first + size) for first, size in zip(self.first, self.local.shape, strict=True))


def part_of(whole: Slice, within: int, elements: Tensor, first: int) -> Iterator[Slice]:
    """What some consecutive elements of a parameter are of a tensor: at most three rectangles, as the first and the
    last row may be incomplete.

    whole: all that the parameter has of the tensor, a view of it; within: where in the parameter the view begins.
    elements: [num_elements] of the parameter or of something that has its shape, `first` the first of them.
    """
    if not whole.local.numel():
        return
    rows, columns = whole.local.shape if whole.local.ndim == 2 else (1, whole.local.shape[0])
    stride = whole.local.stride(0) if whole.local.ndim == 2 else columns
    assert whole.local.stride(-1) == 1, "rows of parameters lie in one piece"
    start, end = first - within, first - within + len(elements)
    for row, num_rows, column, num_columns in _rectangles(rows, columns, stride, start, end):
        size, place = ((num_rows, num_columns), (row, column)) if whole.local.ndim == 2 else ((num_columns,), (column,))
        offset = int(elements.storage_offset()) + row * stride + column - start
        local = elements.detach().as_strided(size, (stride, 1)[-len(size) :], offset)
        yield Slice(whole.name, local, tuple(a + b for a, b in zip(whole.first, place, strict=True)), whole.shape)


def _rectangles(rows: int, columns: int, stride: int, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, first column, columns) of what lies between two elements, where each row begins `stride`
    elements after the one before."""
    row = max(0, start // stride)
    while row < rows and row * stride < end:
        left, right = max(0, start - row * stride), min(columns, end - row * stride)
        num_rows = 1
        if (left, right) == (0, columns):
            num_rows = min(rows, (end - columns) // stride + 1) - row
        if left < right:
            yield row, num_rows, left, right - left
        row += num_rows


def write(directory: Path, slices: Sequence[Slice], group: dist.ProcessGroup) -> None:
    """Writes every rank's slices, which together are whole tensors; collective. What several ranks give is written by
    one of them."""
    save({}, checkpoint_id=directory, planner=_Save(slices), process_group=group)


def read(directory: Path, slices: Sequence[Slice], group: dist.ProcessGroup) -> None:
    """Fills in slices of what was written, however that was cut; collective.

    Raises torch's CheckpointException naming a tensor that is not there or has another shape.
    """
    load({}, checkpoint_id=directory, planner=_Load(slices), process_group=group)


def _by_index(slices: Sequence[Slice]) -> dict[tuple[str, torch.Size], Slice]:
    found = {(s.name, torch.Size(s.first)): s for s in slices if s.local.numel()}
    assert len(found) == sum(1 for s in slices if s.local.numel()), "a slice twice"
    return found


def _chunk(part: Slice) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(part.first), part.local.shape)


class _Save(DefaultSavePlanner):
    def __init__(self, slices: Sequence[Slice]) -> None:
        super().__init__(flatten_state_dict=False)
        self._slices = _by_index(slices)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(part) for part in self._slices.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._slices[index.fqn, index.offset].local

    @staticmethod
    def _item(part: Slice) -> WriteItem:
        data = TensorWriteData(_chunk(part), TensorProperties.create_from_tensor(part.local), torch.Size(part.shape))
        return WriteItem(MetadataIndex(part.name, part.first), WriteItemType.SHARD, tensor_data=data)


class _Load(DefaultLoadPlanner):
    def __init__(self, slices: Sequence[Slice]) -> None:
        super().__init__(flatten_state_dict=False)
        self._slices = _by_index(slices)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for part in self._slices.values():
            known = self.metadata.state_dict_metadata.get(part.name)
            if not isinstance(known, TensorStorageMetadata):
                raise ValueError(f"the checkpoint has no tensor {part.name}")
            if tuple(known.size) != part.shape:
                raise ValueError(f"{part.name} has shape {tuple(known.size)} in the checkpoint, expected {part.shape}")
            items += create_read_items_for_chunk_list(part.name, known, [_chunk(part)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._slices[index.fqn, index.offset].local
