"""Engines are built in two steps: read what can be read while others take stock of the device, then settle on it."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from workers.engines.base import EngineSpec, TrainEngine
from workers.imports import big_imports


class Prepared(Protocol):
    """An engine that is about to be built. num_bytes: what that takes of this rank's device."""

    num_bytes: int

    def build(self, device: torch.device) -> TrainEngine:
        """The engine, on all ranks of the default process group; collective."""
        ...


def prepare(spec: EngineSpec) -> Prepared:
    """The first step, for the engine that `spec.strategy` names. Nothing of Megatron is imported for another's sake."""
    return _Megatron(spec) if spec.strategy == "megatron" else _Fsdp(spec)


class _Fsdp:
    """Reads the whole model into host memory."""

    def __init__(self, spec: EngineSpec) -> None:
        with big_imports():
            from workers.engines.fsdp import load

        self._spec = spec
        self._model = load(spec)
        self.num_bytes = sum(p.nbytes for p in self._model.parameters()) // dist.get_world_size()

    def build(self, device: torch.device) -> TrainEngine:
        from workers.engines.fsdp import FSDPEngine

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        return FSDPEngine(self._spec, mesh, device, self._model)


class _Megatron:
    """Reads nothing yet, but imports Megatron, which takes seconds: the engine takes its slices from the files."""

    def __init__(self, spec: EngineSpec) -> None:
        _silence_megatron()
        with big_imports():
            from workers.engines.megatron.architectures import items
            from workers.engines.megatron.engine import MegatronEngine
            from workers.engines.models import hf_config

        config = hf_config(
            spec.model_path, trust_remote_code=spec.trust_remote_code, override_config=spec.override_config
        )
        there = [item for item in items(config, spec.head) if not item.is_copy]
        size = sum(math.prod(item.shape) // (spec.parallel.expert if item.is_expert else 1) for item in there)
        self.num_bytes = size // (spec.parallel.tensor * spec.parallel.pipeline) * _bytes_per_parameter(spec)
        self._spec, self._engine = replace(spec, model_path=_local(spec.model_path)), MegatronEngine

    def build(self, device: torch.device) -> TrainEngine:
        return self._engine(self._spec, device)


def _bytes_per_parameter(spec: EngineSpec) -> int:
    """Of weights, and of one that trains gradients in float32 (while it is built) and, divided, master weights."""
    itemsize: int = getattr(torch, spec.sharding.dtype).itemsize
    if spec.optimizer is None:
        return itemsize
    master = 0 if spec.sharding.master_dtype == spec.sharding.dtype else 4
    return itemsize + 4 + -(-master // spec.parallel.data_size(dist.get_world_size()))


def _local(path: str) -> str:
    """The directory of a model that may be named as on the hub; its files are fetched unless they are there already."""
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    return snapshot_download(path, allow_patterns=["*.json", "*.safetensors"])


def _silence_megatron() -> None:
    """It warns at length of Transformer Engine and Apex, which it does without, and calls what torch has renamed."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
