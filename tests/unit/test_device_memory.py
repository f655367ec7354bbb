"""Parts that leave a device and come back, and who leaves when: real tensors, a device that is a number."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workers.engines.megatron.optimizer import Gradients
from workers.engines.residency import Part
from workers.memory import DeviceMemory, HostMeter
from workers.rollout.vllm.engine import given_back
from workers.settings import Auto
from workers.shortage import OutOfMemory, peak_resident_bytes

KIB = 1024
ROOT = Path(__file__).parents[2]


def tensors(*sizes: int, seed: int = 0) -> list[Tensor]:
    """Random bytes, sizes in KiB."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (size * KIB,), dtype=torch.uint8, generator=generator) for size in sizes]


@dataclass
class FakeDevice:
    """A device of `total` KiB on which these tensors lie, beside what other processes use."""

    total: int
    tensors: list[Tensor] = field(default_factory=list)
    others: int = 0
    peak: int = 0

    def memory(self) -> tuple[int, int]:
        used = sum(t.untyped_storage().nbytes() for t in self.tensors)
        return (self.total - self.others) * KIB - used, self.total * KIB

    def begin(self) -> None:
        self.peak = 0

    def peak_bytes(self) -> int:
        return self.peak

    def own_peak_bytes(self) -> int:
        return 0


class World:
    """An actor (weights 40, optimizer 80), a critic (20 and 40) and a reference (20) on one device, in KiB."""

    def __init__(self, total: int, **offload: Auto) -> None:
        sizes = {"actor": ((10, 30), (20, 60)), "critic": ((20,), (40,)), "ref": ((5, 15),)}
        self.tensors: dict[str, list[Tensor]] = {}
        self.device = FakeDevice(total)
        self.memory = DeviceMemory(self.device, spare_bytes=0, start_bytes=3 * KIB)
        self.before: dict[str, list[Tensor]] = {}
        for role, parts in sizes.items():
            named = dict(zip(("weights", "optimizer"), parts, strict=False))
            for name, part in named.items():
                self.tensors[f"{role}_{name}"] = tensors(*part, seed=len(self.tensors))
                self.before[f"{role}_{name}"] = [t.clone() for t in self.tensors[f"{role}_{name}"]]
                self.device.tensors += self.tensors[f"{role}_{name}"]
            when = {name: offload.get(f"{role}_{name}", "auto") for name in named}
            self.memory.add(role, {name: self._part(f"{role}_{name}") for name in named}, when)

    def _part(self, name: str) -> Part:
        return Part(lambda: self.tensors[name])

    def away(self) -> dict[str, int]:
        """KiB of each part that are not on the device now."""
        sizes = {n: sum(len(t) - t.untyped_storage().nbytes() for t in found) for n, found in self.tensors.items()}
        return {name: size // KIB for name, size in sizes.items() if size}

    def assert_intact(self, names: Sequence[str]) -> None:
        for name in names:
            assert all(torch.equal(a, b) for a, b in zip(self.tensors[name], self.before[name], strict=True)), name


def test_a_part_comes_back_bit_for_bit_to_everyone_who_has_a_view() -> None:
    weight = torch.randn(6, 4)
    flat, row, half = weight.view(-1), weight[2], torch.randn(8).to(torch.bfloat16)
    before = weight.clone(), half.clone()
    part = Part(lambda: [weight, row, half, torch.empty(0)])
    assert part.resident_bytes == 96 + 16, "a storage counts once"
    assert part.evict(1 << 30) == part.away_bytes == 112
    assert part.resident_bytes == weight.untyped_storage().nbytes() == 0
    assert part.evict(1) == 0
    part.restore()
    assert torch.equal(weight, before[0]) and torch.equal(half, before[1])
    assert torch.equal(flat, before[0].view(-1)) and torch.equal(row, before[0][2])
    flat[0] = 7.0
    assert weight[0, 0] == 7.0, "they still share it"


def test_a_part_goes_storage_by_storage_and_keeps_its_buffers() -> None:
    held = tensors(1, 2, 4)
    part = Part(lambda: held)
    assert part.evict(1) == KIB
    assert part.evict(KIB + 1) == 2 * KIB
    assert (part.away_bytes, part.resident_bytes) == (3 * KIB, 4 * KIB)
    buffers = {id(buffer) for _, buffer in part._away}
    part.restore()
    held[0].fill_(3)
    part.evict(3 * KIB)
    assert {id(buffer) for _, buffer in part._away} == buffers
    part.restore()
    assert bool((held[0] == 3).all())


def test_tensors_made_later_belong_to_the_part() -> None:
    held: list[Tensor] = []
    part = Part(lambda: held)
    assert part.evict(KIB) == part.resident_bytes == 0
    held += tensors(2)
    assert part.evict(KIB) == 2 * KIB


def test_what_fits_stays() -> None:
    world = World(total=300)
    with world.memory.use("update", "actor", ("weights", "optimizer"), wanted_bytes=100 * KIB):
        assert world.away() == {}
    assert world.memory.report(take=True).offloaded == {}


def test_room_is_made_as_far_as_needed_frozen_weights_first() -> None:
    """200 KiB are held; a replica wants more and more."""
    world = World(total=220)
    for room, away in (
        (20, {}),
        (24, {"ref_weights": 5}),
        (41, {"ref_weights": 20, "actor_optimizer": 20}),
        (160, {"ref_weights": 20, "actor_optimizer": 80, "critic_optimizer": 40}),
        (161, {"ref_weights": 20, "actor_optimizer": 80, "critic_optimizer": 40, "actor_weights": 10}),
        (
            999,
            {
                "ref_weights": 20,
                "actor_optimizer": 80,
                "critic_optimizer": 40,
                "actor_weights": 40,
                "critic_weights": 20,
            },
        ),
    ):
        world.memory.make_room(room * KIB)
        assert world.away() == away
    for role, names in (
        ("ref", ("weights",)),
        ("critic", ("weights", "optimizer")),
        ("actor", ("weights", "optimizer")),
    ):
        with world.memory.use("forward", role, names):
            world.assert_intact([f"{role}_{name}" for name in names])


def test_a_use_brings_back_what_it_needs_and_evicts_what_it_does_not() -> None:
    world = World(total=220)
    world.device.others = 100
    world.memory.make_room(0)
    assert world.away() == {"ref_weights": 20, "actor_optimizer": 80}
    world.device.others = 30  # the replica sleeps, but not all of it
    with world.memory.use("update", "actor", ("weights", "optimizer"), wanted_bytes=15 * KIB):
        assert world.away() == {"ref_weights": 20, "critic_optimizer": 40}, "what is required is not what goes"
        world.assert_intact(["actor_weights", "actor_optimizer"])
    assert world.memory.report(take=True).offloaded == {
        "ref_weights": 20 * KIB,
        "actor_optimizer": 80 * KIB,
        "critic_optimizer": 40 * KIB,
    }
    assert world.memory.report(take=True).offloaded == {"ref_weights": 20 * KIB, "critic_optimizer": 40 * KIB}


def test_parts_that_never_leave_and_parts_that_always_do() -> None:
    world = World(total=220, ref_weights=False, actor_optimizer=True)
    assert world.away() == {"actor_optimizer": 80}, "before the first use too"
    with world.memory.use("update", "actor", ("weights", "optimizer")):
        assert world.away() == {}
    assert world.away() == {"actor_optimizer": 80}
    with world.memory.use("update", "actor", ("weights", "optimizer"), keep=True):
        pass
    assert world.away() == {}, "used again at once"
    world.memory.make_room(1 << 40)
    assert "ref_weights" not in world.away()


def test_the_first_update_finds_room_for_the_state_it_makes() -> None:
    device = FakeDevice(100)
    weights, idle, state = tensors(20), tensors(50), list[Tensor]()
    device.tensors = [*weights, *idle]
    memory = DeviceMemory(device, spare_bytes=0)
    memory.add(
        "actor",
        {"weights": Part(lambda: weights), "optimizer": Part(lambda: state, lambda: 40 * KIB)},
        dict(weights="auto", optimizer="auto"),
    )
    memory.add("ref", {"weights": Part(lambda: idle)}, {"weights": "auto"})
    with memory.use("update", "actor", ("weights", "optimizer")):
        assert device.memory()[0] == 80 * KIB, "two moments of 20 KiB did not fit beside the reference"


def test_a_process_that_starts_wants_a_share_of_the_device_at_least() -> None:
    """220 KiB, of which 200 are held; 3 more for what a process takes besides."""
    for num_bytes, share, away in ((0, 0.05, 0), (0, 0.1, 5), (40, 0.1, 20 + 20), (40, 0.0, 20), (0, 1.0, 200)):
        world = World(total=220)
        world.memory.make_room(num_bytes * KIB, share)
        assert sum(world.away().values()) == away, (num_bytes, share)


def test_optimizer_state_that_a_save_would_make_is_missed_if_there_is_no_room() -> None:
    """20 KiB of weights, of a trained role and of a frozen one."""
    device, weights, state = FakeDevice(100), tensors(20), list[Tensor]()
    device.tensors = [*weights]
    memory = DeviceMemory(device, spare_bytes=0)
    memory.add("ref", {"weights": Part(lambda: weights)}, {"weights": "auto"})
    device.others = 80
    assert memory.report(take=False).lacking_bytes == 0
    parts = {
        "weights": Part(lambda: weights),
        "optimizer": Part(lambda: state, lambda: 40 * KIB - sum(map(len, state))),
    }
    memory.add("actor", parts, {"weights": "auto", "optimizer": "auto"})
    for others, lacking in ((0, 0), (40, 0), (41, 1), (80, 40)):
        device.others = others
        assert memory.report(take=False).lacking_bytes == lacking * KIB
    state += tensors(40)
    assert memory.report(take=False).lacking_bytes == 0, "it was made"


def test_peaks_are_kept_by_call() -> None:
    world = World(total=300)
    for peak in (5, 7, 6):
        with world.memory.use("forward", "ref", ("weights",)):
            world.device.peak = peak
    with world.memory.use("update", "actor", ("weights",)):
        world.device.peak = 3
    assert world.memory.report(take=False).peaks == {"forward": 7, "update": 3}
    assert world.memory.report(take=True).peaks == {"forward": 7, "update": 3}
    report = world.memory.report(take=True)
    assert (report.peaks, report.total_bytes) == ({}, 300 * KIB)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.00 GiB"),
        (RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62"), ""),
    ],
)
def test_out_of_memory_has_figures_whoever_says_it(error: Exception, asked: str) -> None:
    world = World(total=300)
    with pytest.raises(OutOfMemory) as caught, world.memory.use("update", "actor", ("weights",)):
        raise error
    shortage = caught.value.shortage
    assert (shortage.call, shortage.role, shortage.asked) == ("update", "actor", asked)
    assert (shortage.free_bytes, shortage.total_bytes) == (100 * KIB, 300 * KIB)


def test_a_host_that_has_no_room_for_what_leaves_the_device_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """When room is made for a replica, and after a use."""

    def full(part: Part, num_bytes: int) -> int:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes.")

    world = World(total=300, ref_weights=True)
    monkeypatch.setattr(Part, "evict", full)
    with pytest.raises(OutOfMemory) as making_room:
        world.memory.make_room(300 * KIB)
    with pytest.raises(OutOfMemory) as after_use, world.memory.use("forward", "ref", ("weights",)):
        pass
    calls = [(error.value.shortage.call, error.value.shortage.role) for error in (making_room, after_use)]
    assert calls == [("make_room", ""), ("forward", "ref")]
    for error in (making_room, after_use):
        shortage = error.value.shortage
        assert (shortage.where, shortage.asked) == ("host", "80 bytes")
        assert shortage.total_bytes == HostMeter().memory()[1]


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="a mistake"), World(total=300).memory.use("update", "actor", ()):
        raise ValueError("a mistake")


def test_a_cpu_has_readings_too() -> None:
    free, total = HostMeter().memory()
    assert 0 < free <= total
    assert 1 << 20 < HostMeter().peak_bytes() < total


def test_what_a_sleeping_replica_gave_back() -> None:
    """(free, parameters) of each worker; a CPU's are zeros, and what others took meanwhile is no gift."""
    two = [[10, 30], [10, 30]], [[100, 30], [120, 30]]
    assert given_back(*two, by_tag=True) == {"weights": 30, "kv_cache": 80}
    assert given_back(*two, by_tag=False) == {"weights": 110, "kv_cache": 0}, "all wakes with the weights"
    assert given_back([[0, 0]], [[0, 0]], by_tag=True) == {"weights": 0, "kv_cache": 0}
    assert given_back([[10, 30]], [[25, 30]], by_tag=True) == {"weights": 15, "kv_cache": 0}
    assert given_back([[10, 30]], [[5, 30]], by_tag=True) == {"weights": 0, "kv_cache": 0}


def test_a_process_does_not_inherit_its_parents_peak() -> None:
    program = "from workers.shortage import peak_resident_bytes; print(peak_resident_bytes())"
    ours = bytearray(b"x" * (300 << 20))
    found = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, cwd=ROOT).stdout)
    assert peak_resident_bytes() > len(ours) > 2 * found > 10 << 20


def test_gradient_buffers_that_do_not_all_fit_take_nothing() -> None:
    class Full:
        """A storage on a device without room."""

        def nbytes(self) -> int:
            return KIB

        def resize_(self, size: int) -> None:
            if size:
                raise RuntimeError("out of memory")

    gradients = Gradients([])
    first = torch.empty(0, dtype=torch.uint8).untyped_storage()
    gradients._storages, gradients._sizes = [first, Full()], [KIB, KIB]  # type: ignore[list-item]
    with pytest.raises(RuntimeError, match="out of memory"), gradients:
        pass
    assert first.nbytes() == 0
