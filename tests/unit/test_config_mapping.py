"""Roles on devices: which devices each replica has, what is left over, and what cannot lie as a mapping says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.devices import parse_device_mapping
from trainer.config.errors import UserError
from trainer.config.load import load_config
from trainer.config.mapping import (
    check_shared_devices,
    device_problems,
    is_shared,
    replica_devices,
    show_devices,
    training_devices,
    unused_notice,
    used_devices,
)
from trainer.config.schema import Config

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
BASE = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model"]


def config(*overrides: str, nnodes: int = 1, per_node: int = 8) -> Config:
    return load_config([*BASE, f"trainer.nnodes={nnodes}", f"trainer.n_gpus_per_node={per_node}", *overrides])


@pytest.mark.parametrize(
    ("mapping", "size", "replicas"),
    [
        ("null", 4, ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("list(range(2,8))", 2, ((2, 3), (4, 5), (6, 7))),
        ("6,1,3-4", 2, ((6, 1), (3, 4))),
    ],
)
def test_replicas_take_their_devices_in_the_order_given(
    mapping: str, size: int, replicas: tuple[tuple[int, ...], ...]
) -> None:
    cfg = config(f"{ROLLOUT}.device_mapping={mapping}", f"{ROLLOUT}.tensor_model_parallel_size={size}")
    assert replica_devices(cfg) == replicas
    assert list(device_problems(cfg)) == []


def test_training_on_some_nodes_and_generating_on_others() -> None:
    cfg = config(
        f"{ACTOR}.device_mapping=0-15",
        f"{ROLLOUT}.device_mapping=16-27",
        f"{ROLLOUT}.tensor_model_parallel_size=4",
        f"{ACTOR}.use_kl_loss=true",
        "algorithm.adv_estimator=grpo",
        "actor_rollout_ref.ref.device_mapping=list(range(8,16))",
        nnodes=4,
    )
    assert list(device_problems(cfg)) == []
    assert training_devices(cfg, num_devices=32) == {"actor": tuple(range(16)), "ref": tuple(range(8, 16))}
    assert replica_devices(cfg) == ((16, 17, 18, 19), (20, 21, 22, 23), (24, 25, 26, 27))
    assert used_devices(cfg) == tuple(range(28))
    assert not is_shared(cfg, (16, 17))
    assert is_shared(cfg, (15, 16))
    (notice,) = unused_notice(cfg)
    assert notice.startswith("no role uses devices 28-31 of the 32 (trainer.nnodes=4 x trainer.n_gpus_per_node=8)")


def test_nothing_is_said_where_all_devices_are_used() -> None:
    assert not list(unused_notice(config()))
    (one,) = unused_notice(config(f"{ACTOR}.device_mapping=0-3", f"{ROLLOUT}.device_mapping=4,6-7"))
    assert one.startswith("no role uses device 5 of the 8")


@pytest.mark.parametrize(
    ("mapping", "size", "replica", "remedy"),
    [
        ("null", 16, "0-15", f"set {ROLLOUT}.tensor_model_parallel_size=8, or change {ROLLOUT}.device_mapping"),
        ("4-11", 8, "4-11", f"set {ROLLOUT}.tensor_model_parallel_size=4, or change {ROLLOUT}.device_mapping"),
        ("1-12", 6, "7-12", f"set {ROLLOUT}.tensor_model_parallel_size=1, or change {ROLLOUT}.device_mapping"),
        ("7-8", 2, "7-8", f"set {ROLLOUT}.tensor_model_parallel_size=1, or change {ROLLOUT}.device_mapping"),
        ("0,8,1,9", 2, "0,8", f"set {ROLLOUT}.device_mapping=0-1,8-9"),
    ],
)
def test_a_replica_lies_on_one_node(mapping: str, size: int, replica: str, remedy: str) -> None:
    """Both keys are named, and the proposal is one that works."""
    settings = [f"{ROLLOUT}.device_mapping={mapping}", f"{ROLLOUT}.tensor_model_parallel_size={size}"]
    problems = list(device_problems(config(*settings, nnodes=2)))
    (problem,) = problems
    assert f"tensor_model_parallel_size={size}: replica" in problem
    assert f"would lie on devices {replica}, which are not on one node (trainer.n_gpus_per_node=8); " in problem
    assert problem.endswith(remedy)
    proposal = remedy.removeprefix("set ").partition(", or")[0]
    assert not list(device_problems(config(*settings, proposal, nnodes=2)))


def test_a_mapping_that_cannot_be_read_is_told_once() -> None:
    """By itself, and not again through the replicas on it."""
    settings = [f"{ROLLOUT}.device_mapping=0-99", f"{ROLLOUT}.tensor_model_parallel_size=3"]
    (problem,) = device_problems(config(*settings, nnodes=2))
    assert f"{ROLLOUT}.device_mapping=0-99: rank 99 does not exist, there are 16 devices" in problem


def test_the_same_devices_in_another_order_are_not_the_same_processes() -> None:
    cfg = config(f"{ACTOR}.device_mapping=0-1", "critic.device_mapping=[1,0]", "critic.enable=true")
    with pytest.raises(
        UserError,
        match=r"critic.device_mapping=1,0: has the devices in another order than .*set it to "
        "0-1 as well, or to devices of its own, e.g. 2",
    ):
        check_shared_devices(cfg)


@given(st.lists(st.integers(0, 30), min_size=1, unique=True))
def test_devices_are_shown_as_a_mapping_that_names_them(ranks: list[int]) -> None:
    assert parse_device_mapping(show_devices(ranks), "key") == tuple(ranks)
