"""Memory of one device, shared by the training roles of this process and by others (vLLM replicas).

What fits stays on the device. What does not is evicted to host memory, only when somebody needs the room, and only as
far as that: what is free is measured, not predicted. Every use of an engine says what of it must be there:

    with memory.use("update", "actor", ("weights", "optimizer"), wanted_bytes=...):
        ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from workers.engines.residency import Part
from workers.settings import Auto
from workers.shortage import host_memory, out_of_memory_explained, peak_resident_bytes

SPARE_BYTES = 512 << 20
"""Room besides what is asked for: what allocators round up, and libraries take for themselves."""
START_BYTES = 2 << 30
"""What a process that starts takes besides its share: its CUDA context, kernels, graphs."""


class Meter(Protocol):
    """Readings of one device, of all processes that use it."""

    def memory(self) -> tuple[int, int]:
        """Free and total bytes, after this process has given back what it only caches."""
        ...

    def begin(self) -> None:
        """From here on `peak_bytes` counts."""
        ...

    def peak_bytes(self) -> int:
        """Most bytes in use by all processes, as far as this one can tell: what others take and give back meanwhile
        is not seen."""
        ...

    def own_peak_bytes(self) -> int:
        """Most bytes that this process has held."""
        ...


class CudaMeter:
    """The current CUDA device."""

    def memory(self) -> tuple[int, int]:
        """From the driver."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()

    def begin(self) -> None:
        """Forgets the allocator's peaks."""
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """In use now, with this process at its peak."""
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()

    def own_peak_bytes(self) -> int:
        """Allocated."""
        return torch.cuda.max_memory_allocated()


class HostMeter:
    """A CPU's memory; the peak is this process's since it started."""

    def memory(self) -> tuple[int, int]:
        """Of the machine."""
        return host_memory()

    def begin(self) -> None:
        """Nothing: a resident set has no peak that could be forgotten."""

    def peak_bytes(self) -> int:
        """This process's own."""
        return self.own_peak_bytes()

    def own_peak_bytes(self) -> int:
        """Resident."""
        return peak_resident_bytes()


def meter_of(device_type: str) -> Meter:
    """Of "cpu" or "cuda"."""
    return CudaMeter() if device_type == "cuda" else HostMeter()


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """One device: the peak of each kind of call, the most that was away of each part ("actor_optimizer"), its size.

    lacking_bytes: what is not free of what optimizer state will take that was not made yet, by an update or a save.
    """

    peaks: dict[str, int]
    offloaded: dict[str, int]
    total_bytes: int
    lacking_bytes: int


@dataclass(frozen=True, slots=True)
class _Tenant:
    """A part, whose it is, and when it leaves the device.

    offload: "auto": for room that somebody needs; True: after each use; False: never. turn: the lowest goes first.
    """

    role: str
    name: str
    part: Part
    offload: Auto
    turn: int


class DeviceMemory:
    """Knows every part of every role on a device; brings in what is used, and makes room. spare_bytes: more of it;
    start_bytes: still more, for a process that starts."""

    def __init__(self, meter: Meter, *, spare_bytes: int = SPARE_BYTES, start_bytes: int = START_BYTES) -> None:
        self.meter = meter
        self._spare_bytes = spare_bytes
        self._start_bytes = start_bytes
        self._tenants: list[_Tenant] = []
        self._peaks: dict[str, int] = {}
        self._offloaded: dict[str, int] = {}

    def add(self, role: str, parts: Mapping[str, Part], offload: Mapping[str, Auto]) -> None:
        """Takes charge of a role's parts, "weights" and, of a trained one, "optimizer", as after a use. offload: of
        each."""
        for name, part in parts.items():
            turn = _turn(name, is_trained="optimizer" in parts)
            self._tenants.append(_Tenant(role, name, part, offload[name], turn))
        self._tenants.sort(key=lambda tenant: tenant.turn)
        with out_of_memory_explained("place", role, self.meter.memory):
            self._settle(role)

    @contextmanager
    def use(
        self, call: str, role: str, names: Sequence[str], *, wanted_bytes: int = 0, keep: bool = False
    ) -> Iterator[None]:
        """Inside, these parts of a role are on the device, with `wanted_bytes` free if that can be had.

        keep: the same is used again at once. Raises OutOfMemory with the figures if memory runs out inside.
        """
        self.meter.begin()
        with out_of_memory_explained(call, role, self.meter.memory):
            self._ensure([t for t in self._tenants if t.role == role and t.name in names], wanted_bytes)
            yield
            self._peaks[call] = max(self._peaks.get(call, 0), self.meter.peak_bytes())
            if not keep:
                self._settle(role)

    def make_room(self, num_bytes: int, share: float = 0.0) -> None:
        """Evicts until `num_bytes` are free for another process, or nothing more can go.

        share: if not 0, that process starts, and wants at least this share of the device.
        """
        if share:
            num_bytes = max(num_bytes, int(share * self.meter.memory()[1])) + self._start_bytes
        with out_of_memory_explained("make_room", "", self.meter.memory):
            self._evict_for(num_bytes, ())

    def report(self, *, take: bool) -> MemoryReport:
        """What happened since the last report that was taken."""
        offloaded = {name: size for name, size in self._offloaded.items() if size}
        free, total = self.meter.memory()
        unmade = sum(tenant.part.unmade_bytes for tenant in self._tenants)
        lacking = max(0, unmade + self._spare_bytes - free) if unmade else 0
        report = MemoryReport(dict(self._peaks), offloaded, total, lacking)
        if take:
            self._peaks, self._offloaded = {}, {}
            self._note()
        return report

    def _ensure(self, required: Sequence[_Tenant], wanted_bytes: int) -> None:
        wanted = wanted_bytes + sum(tenant.part.unmade_bytes for tenant in required)
        away = sum(tenant.part.away_bytes for tenant in required)
        if wanted or away:
            self._evict_for(wanted + away, required)
        for tenant in required:
            tenant.part.restore()

    def _evict_for(self, num_bytes: int, required: Sequence[_Tenant]) -> None:
        for tenant in self._tenants:
            if tenant.offload is False or tenant in required:
                continue
            while (missing := num_bytes + self._spare_bytes - self.meter.memory()[0]) > 0:
                if not tenant.part.evict(missing):
                    break
        self._note()

    def _settle(self, role: str) -> None:
        """After a use: what is offloaded always goes, and what is cached is given back: others see what is free."""
        for tenant in self._tenants:
            if tenant.role == role and tenant.offload is True:
                tenant.part.evict(tenant.part.resident_bytes)
        self.meter.memory()
        self._note()

    def _note(self) -> None:
        for tenant in self._tenants:
            name = f"{tenant.role}_{tenant.name}"
            self._offloaded[name] = max(self._offloaded.get(name, 0), tenant.part.away_bytes)


def _turn(name: str, *, is_trained: bool) -> int:
    """Optimizer state is used once a step, as frozen weights are, and trained weights for each sync besides."""
    if name == "weights":
        return 2 if is_trained else 0
    return 1
