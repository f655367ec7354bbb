"""How workers are put to work: which ranks are beside which replica, and when models are read into host memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainer import actors
from trainer.actors import _channel, _ranks_on, _routes
from trainer.config.load import load_config
from trainer.inputs import Inputs
from trainer.placement import Cluster, Device
from trainer.setup import check_paths, place_engines, prepare_engines, read_ahead
from trainer.specs import rollout_spec
from workers.group import WorkerError, WorkerGroup

ROLES = ("actor", "ref", "critic")


class FakeGroup:
    """Notes each call to its ranks, and its role."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def broadcast(self, method: Any, role: str, *args: object) -> FakeGroup:
        """A call."""
        self.calls.append(f"{method.__name__} {role}")
        return self

    def result(self, timeout_s: float) -> list[None]:
        """Of the last call."""
        return []


def _specs(strategy: str) -> dict[str, Any]:
    return {role: SimpleNamespace(strategy=strategy) for role in ROLES}


def test_what_reads_nothing_is_prepared_ahead_on_many_ranks_too() -> None:
    assert read_ahead(_specs("megatron"), 8) == ROLES
    assert read_ahead(_specs("fsdp"), 8) == ("actor",)
    assert read_ahead(_specs("fsdp") | {"ref": SimpleNamespace(strategy="megatron")}, 8) == ("actor", "ref")


@pytest.mark.parametrize(("num_ranks", "most"), [(1, 3), (2, 1), (8, 1)])
def test_one_rank_reads_all_models_ahead_and_many_hold_one_each(num_ranks: int, most: int) -> None:
    fake = FakeGroup()
    train = cast("dict[str, WorkerGroup]", dict.fromkeys(ROLES, fake))
    specs, offload = _specs("fsdp"), cast("dict[str, Any]", {role: {} for role in ROLES})
    ahead = read_ahead(specs, num_ranks)
    prepare_engines(train, {role: specs[role] for role in ahead}, 1.0)
    assert fake.calls[0] == "prepare actor"
    place_engines(train, specs, offload, prepared=ahead, timeout_s=1.0)
    held: set[str] = set()
    largest = 0
    for call in fake.calls:
        what, role = call.split()
        held = held | {role} if what == "prepare" else held - {role}
        largest = max(largest, len(held))
    assert sorted(fake.calls) == sorted(f"{what} {role}" for what in ("prepare", "place") for role in ROLES)
    assert (largest, held) == (most, set())


def test_a_node_without_the_models_or_the_run_directory_is_named(tmp_path: Path) -> None:
    """By key and path, before anything is built; a name on the hub is nobody's path."""
    asked: list[list[str]] = []
    for name in ("model", "run"):
        (tmp_path / name).mkdir()

    class Blind(WorkerGroup):
        def broadcast(self, method: Any, *args: Any) -> Any:
            asked.append(args[0])
            return SimpleNamespace(result=lambda timeout_s: [[], [path for path in args[0] if path.endswith("run")]])

    required = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model", "critic.model.path=org/model"]
    cfg = load_config([*required, f"trainer.default_local_dir={tmp_path / 'run'}"])
    inputs = cast(Inputs, SimpleNamespace(model_path=str(tmp_path / "model")))
    with pytest.raises(
        WorkerError, match=r"^trainer.default_local_dir=.*/run: training rank 1 is on a node that does not"
    ):
        check_paths(cfg, inputs, [Blind("training", ["a", "b"])])
    assert asked == [[str(tmp_path / "model"), str(tmp_path / "run")]]


def test_the_ranks_on_the_devices_of_a_replica() -> None:
    groups = {
        (0, 1, 2, 3): WorkerGroup("training", ["a0", "a1", "a2", "a3"]),
        (4, 5): WorkerGroup("training", ["c0", "c1"]),
    }
    found = {devices: _ranks_on(groups, devices) for devices in ((2, 3), (3, 5), (6,))}
    assert [(group.actors, group.ranks) for group in found[2, 3]] == [(("a2", "a3"), (2, 3))]
    assert [(group.actors, group.ranks) for group in found[3, 5]] == [(("a3",), (3,)), (("c1",), (1,))]
    assert found[6,] == ()


def _cluster(kind: str, num_devices: int, per_node: int) -> Cluster:
    devices = [Device(cast(Any, None), i, i // per_node, i % per_node) for i in range(num_devices)]
    return Cluster(cast(Any, kind), tuple(devices), 8, ())


@pytest.mark.parametrize(
    ("kind", "training", "replicas", "channel"),
    [
        ("cuda", (0,), ((0,),), "cuda_ipc"),
        ("cpu", (0,), ((0,),), "shared_memory"),
        ("cuda", (0,), ((1,),), "shared_memory"),
        ("cuda", (0,), ((0,), (1,)), "shared_memory"),
        ("cuda", (0, 1), ((0,), (1,)), "shared_memory"),
    ],
)
def test_one_gpu_is_shared_by_one_rank_and_all_replicas(
    kind: str, training: tuple[int, ...], replicas: tuple[tuple[int, ...], ...], channel: str
) -> None:
    assert _channel(_cluster(kind, 2, 2), training, replicas) == channel


def test_relays_run_beside_replicas_that_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices a node; a replica is where its first device is."""
    started: list[Device] = []
    monkeypatch.setattr(actors, "start", lambda actor, device: started.append(device) or f"relay {device.node}")
    cluster = _cluster("cpu", 6, 2)
    routes = _routes(cluster, (0, 1, 2), ((4, 5), (2,), (3,)))
    assert (routes.trainers, routes.replicas) == ((0, 0, 1), (2, 1, 1))
    assert routes.relays == {1: "relay 1", 2: "relay 2"}
    assert [cluster.devices.index(device) for device in started] == [2, 4]
    assert _routes(cluster, (0, 1), ((0,), (1,))).relays == {}


@pytest.mark.parametrize(
    ("level", "shared", "gives_back"), [("auto", True, True), ("auto", False, False), ("2", False, True)]
)
def test_a_replica_that_has_its_devices_alone_stays_awake(level: str, shared: bool, gives_back: bool) -> None:
    """Unless a sleep level is asked for."""
    required = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model"]
    cfg = load_config([*required, f"actor_rollout_ref.rollout.sleep_level={level}"])
    inputs = cast(Inputs, SimpleNamespace(model_path="m", tokenizer_path="m", override_config={}))
    spec = rollout_spec(cfg, inputs, "cuda", list(_cluster("cuda", 1, 1).devices), shared=shared)
    assert spec.free_cache_engine is gives_back
