"""Hugging Face copies of the model, which is whole nowhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from workers.sync.buckets import Shard

MAX_FILE_BYTES = 5 << 30


def save_copy(directory: Path, config: PreTrainedConfig, source: Path, parts: Iterable[Shard]) -> None:
    """Writes a Hugging Face checkpoint on rank 0; collective. parts: every rank's, one parameter at a time is whole."""
    writer = _Writer(directory) if dist.get_rank() == 0 else None
    dtype = None
    for name, part, shape, first, dim in parts:
        whole, dtype = _joined(part, shape, first, dim), part.dtype
        if writer is not None:
            writer.add(name, whole)
    if writer is not None:
        writer.finish()
        config.update({"dtype": dtype})
        config.save_pretrained(directory)
        if (generation := source / "generation_config.json").exists():
            shutil.copy(generation, directory)
    dist.barrier()


def _joined(part: Tensor, shape: tuple[int, ...], first: int, dim: int) -> Tensor:
    """The whole of a parameter on rank 0, in host memory. Where one rank has its part others have zero bytes, so that
    sums are exact."""
    whole = torch.zeros(shape, dtype=part.dtype, device=part.device)
    whole.narrow(dim, first, part.shape[dim]).copy_(part)
    dist.reduce(whole.view(-1).view(torch.uint8), dst=0)
    return whole.cpu()


class _Writer:
    """Safetensors files of limited size and their index, as Hugging Face lays them out."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._num_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor; what is in memory is written when it has become too much."""
        if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > MAX_FILE_BYTES:
            self._flush()
        self._pending[name] = tensor
        self._num_bytes += tensor.nbytes

    def finish(self) -> None:
        """Names the files by their number, which is known now."""
        self._flush()
        names = list(self._names())
        for number, name in enumerate(names):
            self._part(number).rename(self._directory / name)
        if len(names) > 1:
            weight_map = {tensor: name for name, held in zip(names, self._files, strict=True) for tensor in held}
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
            (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._pending))
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number}.tmp"

    def _names(self) -> Iterator[str]:
        count = len(self._files)
        if count == 1:
            yield "model.safetensors"
            return
        for number in range(1, count + 1):
            yield f"model-{number:05d}-of-{count:05d}.safetensors"
