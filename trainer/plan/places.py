"""Which training rank and which replica is on which device, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.config.mapping import check_shared_devices, role_devices
from trainer.config.roles import TrainingRole, training_roles
from trainer.config.schema import Config, DeviceMapping
from trainer.placement import Cluster, Device, DeviceType


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One training rank of a role: its device, and which of how many ranks it is."""

    role: TrainingRole
    device: int
    rank: int
    num_ranks: int

    @property
    def data_size(self) -> int:
        """Data-parallel ranks of the role."""
        return self.num_ranks // self.role.ranks_per_model

    @property
    def stage(self) -> int:
        """Which pipeline stage it holds; ranks run tensor first, then data, then pipeline."""
        megatron = self.role.megatron
        return self.rank // (megatron.tensor_model_parallel_size * self.data_size) if megatron else 0


def ranks_of(role: TrainingRole, num_devices: int) -> tuple[int, ...]:
    """Global devices of a training role, in the order of its ranks."""
    return role_devices(role.config.device_mapping, f"{role.key}.device_mapping", num_devices=num_devices)


def training_places(cfg: Config) -> list[RankPlace]:
    """Every training rank of every role."""
    places = []
    for role in training_roles(cfg):
        devices = ranks_of(role, cfg.num_devices)
        places += [RankPlace(role, device, rank, len(devices)) for rank, device in enumerate(devices)]
    return places


def named(mapping: DeviceMapping, num_devices: int) -> object:
    """A mapping for people: as it was given, or all devices."""
    if mapping is not None:
        return mapping
    return f"0-{num_devices - 1}" if num_devices > 1 else 0


def planned_cluster(cfg: Config, kind: DeviceType) -> Cluster:
    """The devices that a configuration asks for, on no cluster: nothing can be started there.

    Raises ValueError for roles that could not share their devices.
    """
    if kind == "cuda":
        check_shared_devices(cfg)
    nowhere: Any = None
    per_node = cfg.trainer.n_gpus_per_node
    devices = tuple(Device(nowhere, n % per_node, n // per_node, n % per_node) for n in range(cfg.num_devices))
    return Cluster(kind, devices, 1, ())
