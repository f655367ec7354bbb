"""Predicted memory of every device in every phase of a step.

What a phase needs is known term by term (`training`, `replica`); what of the rest is on the device meanwhile follows
from the same rules as in a run (`workers.memory`): what fits stays, and parts leave for those who need the room, frozen
weights first, then optimizer state, then trained weights. Two steps are gone through, and the second one, in which
optimizer state exists from the beginning, is what is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trainer.config.roles import RoleName
from trainer.plan.passes import idle_blocks, least_kept, taken_by, wanted_bytes
from trainer.plan.replica import ReplicaTerms, replica_parts
from trainer.plan.training import EngineTerms, Pass
from workers.engines.recompute import MARGIN, num_recomputed
from workers.memory import SPARE_BYTES
from workers.settings import Auto

_CONTEXT_BYTES = 850 << 20
"""Of a process that trains on a GPU: CUDA context, loaded kernels, workspaces of matrix products (on an H200)."""
PHASES = ("start", "generate", "annotate", "update", "sync", "asleep")
"""asleep: between calls, with replicas asleep."""
CATEGORIES = ("weights", "gradients", "optimizer", "activations", "buffers", "kv_cache", "overhead")
"""buffers: chunks of logits, gathered parameters, buckets of the weight sync. overhead: CUDA contexts, graphs, NCCL."""

Terms = dict[str, int]


@dataclass(frozen=True, slots=True)
class Tenant:
    """A role on a device: its terms, and when its parts leave ("weights", "optimizer")."""

    name: RoleName
    terms: EngineTerms
    offload: Mapping[str, Auto]


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Who is on a device. tenants: roles that train there; annotates: those with a pass before the update.

    replica: None: none there. sleeps: whether it gives memory back. sync_buffers: bytes of the device that hold weights
    on their way. collectives: bytes that NCCL takes.
    """

    tenants: tuple[Tenant, ...]
    annotates: tuple[RoleName, ...]
    replica: ReplicaTerms | None
    sleeps: bool
    sync_buffers: int = 0
    collectives: int = 0


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """A phase at its peak. terms: by CATEGORIES, bytes; offloaded: bytes of parts in host memory ("actor_optimizer").

    recomputed: layers whose activations are recomputed; None: the phase has no backward pass. floor: what it takes even
    if all is offloaded and recomputed that may be; firm: of that, what does not depend on lengths. role: at work.
    """

    terms: Terms
    offloaded: Terms
    recomputed: int | None
    floor: int
    firm: int
    role: str = ""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.terms.values())


@dataclass
class _Resident:
    """What of a part is on the device."""

    tenant: Tenant
    name: str
    size: int
    here: int = 0

    @property
    def offload(self) -> Auto:
        return self.tenant.offload.get(self.name, "auto")

    @property
    def turn(self) -> int:
        """The lowest leaves first, as in `workers.memory`."""
        trains = self.tenant.terms.update is not None
        return (2 if trains else 0) if self.name == "weights" else 1


@dataclass
class _State:
    """One device on its way through a step."""

    use: DeviceUse
    total: int | None
    parts: list[_Resident]
    awake: Terms = field(default_factory=dict)
    found: dict[str, PhaseMemory] = field(default_factory=dict)


def predict(use: DeviceUse, total: int | None) -> dict[str, PhaseMemory]:
    """Every phase that the device takes part in. total: bytes of the device; None: as if there were always room."""
    parts = [
        _Resident(tenant, name, size)
        for tenant in use.tenants
        for name, size in (("weights", tenant.terms.weights), ("optimizer", tenant.terms.optimizer))
        if size
    ]
    state = _State(use, total, sorted(parts, key=lambda part: part.turn))
    _start(state)
    for _ in range(2):
        _step(state)
    return {phase: state.found[phase] for phase in PHASES if phase in state.found}


def _start(state: _State) -> None:
    """A replica starts on an empty device; models are placed while it sleeps."""
    if state.use.replica is not None:
        state.awake = dict(replica_parts(state.use.replica, awake=True))
        _note(state, "start", {}, _others(state, pinned=False))
    _sleep(state)
    for part in state.parts:
        if part.name == "weights":
            _enter(state, [part], 0)
    if state.parts:
        _note(state, "start", {}, _others(state))


def _step(state: _State) -> None:
    """Annotate, update, sync, generate, in the order in which memory changes hands."""
    for phase in ("annotate", "update", "sync", "generate", "asleep"):
        state.found.pop(phase, None)
    for tenant in state.use.tenants:
        if tenant.name in state.use.annotates:
            _call(state, "annotate", tenant, tenant.terms.forward)
    for tenant in sorted(state.use.tenants, key=lambda each: each.name == "actor"):  # the critic first
        if tenant.terms.update is not None:
            _call(state, "update", tenant, tenant.terms.update)
    _note(state, "asleep", {}, _others(state))
    _sync(state)
    if state.use.replica is not None:
        _note(state, "generate", {}, _others(state))
    _sleep(state)


def _sync(state: _State) -> None:
    """Weights of the replica wake, then come from the actor, then its cache wakes."""
    replica, actor = state.use.replica, [part for part in state.parts if part.tenant.name == "actor"]
    sent = [part for part in actor if part.name == "weights"]
    if replica is not None:
        _make_room(state, replica.weights if state.use.sleeps else 0)
        state.awake = dict(replica_parts(replica, awake=True))
        state.awake["kv_cache"] = state.awake["activations"] = 0
    _enter(state, sent, 0)
    movable = sum(part.size for part in sent if part.offload is not False)
    _note(state, "sync", {}, _others(state) + movable, role="actor")
    if replica is not None:
        _make_room(state, replica.kv_cache if state.use.sleeps else 0)
        state.awake = dict(replica_parts(replica, awake=True))
        _note(state, "sync", {}, _others(state))


def _call(state: _State, phase: str, tenant: Tenant, at_work: Pass) -> None:
    """One pass of a role, with room made for what the engine asks for."""
    terms, trains = tenant.terms, phase == "update"
    needed = [p for p in state.parts if p.tenant is tenant and (trains or p.name == "weights")]
    gradients = terms.gradients if trains else 0
    wanted = wanted_bytes(terms, at_work, trains=trains) + gradients + at_work.reserved
    _enter(state, needed, wanted)
    recomputed, gathered = _decide(state, tenant, at_work, trains=trains)
    found = taken_by(terms, at_work, recomputed, gathered, trains=trains)
    idle = idle_blocks(terms, at_work, recomputed, trains=trains)
    room = idle if state.total is None else state.total - _in_use(state) - sum(found.values())
    found["activations"] += max(0, min(idle, room))
    least = taken_by(terms, at_work, least_kept(terms) if trains else 0, False, trains=trains)
    held = sum(part.size for part in needed if part.offload is not False) + _others(state)
    firm = held + least["gradients"] + least["buffers"]
    _note(
        state,
        phase,
        found,
        held + sum(least.values()),
        firm=firm,
        recomputed=recomputed if trains else None,
        role=tenant.name,
    )
    _settle(state, tenant)


def _decide(state: _State, tenant: Tenant, at_work: Pass, *, trains: bool) -> tuple[int, bool]:
    """Layers that are recomputed, and whether all parameters stay gathered, as the engines decide it."""
    terms = tenant.terms
    always = terms.keep_gathered is True
    if not trains:
        return 0, always and terms.gathered_all > 0
    if state.total is None:
        return (terms.num_layers if terms.recompute is True else 0), terms.keep_gathered is not False
    room = state.total * (1 - MARGIN) - _in_use(state) - at_work.reserved - terms.gradients
    room = room - terms.gathered_all if always else room
    recomputed = terms.num_layers if terms.recompute is True else 0
    if terms.recompute == "auto":
        recomputed = num_recomputed(terms.num_layers, terms.layer, at_work.in_flight, room)
    saved = at_work.in_flight * recomputed * (terms.layer.whole - terms.layer.input_only)
    spent = wanted_bytes(terms, at_work, trains=True) - saved
    keeps = always or (terms.keep_gathered is None and spent + terms.gathered_all <= room)
    return recomputed, keeps and terms.gathered_all > 0


def _enter(state: _State, needed: Sequence[_Resident], wanted: float) -> None:
    """Brings parts in, after making room for them and for what is wanted besides."""
    away = sum(part.size - part.here for part in needed)
    _evict(state, wanted + away, needed)
    for part in needed:
        part.here = part.size


def _make_room(state: _State, num_bytes: int) -> None:
    _evict(state, num_bytes, ())


def _evict(state: _State, num_bytes: float, needed: Sequence[_Resident]) -> None:
    if state.total is None:
        return
    for part in state.parts:
        missing = int(num_bytes + SPARE_BYTES + _in_use(state) - state.total)
        if missing > 0 and part.offload is not False and part not in needed:
            part.here -= min(part.here, missing)


def _settle(state: _State, tenant: Tenant) -> None:
    for part in state.parts:
        if part.tenant is tenant and part.offload is True:
            part.here = 0


def _sleep(state: _State) -> None:
    if state.use.replica is not None and state.use.sleeps:
        state.awake = dict(replica_parts(state.use.replica, awake=False))


def _fixed(state: _State) -> int:
    """Of the process that trains: context, NCCL."""
    return _CONTEXT_BYTES + state.use.collectives if state.parts else 0


def _in_use(state: _State) -> int:
    resident = sum(part.here for part in state.parts)
    return resident + sum(state.awake.values()) + _fixed(state) + (state.use.sync_buffers if state.parts else 0)


def _others(state: _State, *, pinned: bool = True) -> int:
    """What is on the device whoever is at work: the replica, contexts, buffers, parts that may not leave."""
    stays = sum(part.size for part in state.parts if part.offload is False) if pinned else 0
    trains = _CONTEXT_BYTES + state.use.collectives + state.use.sync_buffers if pinned and state.parts else 0
    return sum(state.awake.values()) + stays + trains


def _note(
    state: _State,
    phase: str,
    transient: Mapping[str, int],
    floor: int,
    *,
    firm: int | None = None,
    recomputed: int | None = None,
    role: str = "",
) -> None:
    """Writes down a moment of a phase; the largest of each counts, for memory and for the least it could be."""
    terms = dict.fromkeys(CATEGORIES, 0)
    for source in (state.awake, transient):
        for name, size in source.items():
            terms[name] += size
    for part in state.parts:
        terms[part.name] += part.here
    is_placed = any(part.here for part in state.parts)
    terms["overhead"] += _fixed(state) if is_placed or phase != "start" else 0
    terms["buffers"] += state.use.sync_buffers if state.parts and phase != "start" else 0
    offloaded = {
        f"{part.tenant.name}_{part.name}": part.size - part.here
        for part in state.parts
        if part.here < part.size and phase != "start"
    }
    firmly = floor if firm is None else firm
    new = PhaseMemory(terms, offloaded, recomputed, floor, firmly, role)
    old = state.found.get(phase)
    if old is None:
        state.found[phase] = new
        return
    larger = new if new.total > old.total else old
    tighter = new if new.floor > old.floor else old
    state.found[phase] = replace(larger, floor=tighter.floor, firm=max(old.firm, new.firm), role=tighter.role)
