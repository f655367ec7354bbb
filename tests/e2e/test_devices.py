"""Roles on devices of several nodes: two Ray nodes on this machine, which share its address and name but no memory."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import NO_VALIDATION, ROOT, Outcome, Record, end_processes, launch, read_jsonl, run, started_by, wait_until

PER_NODE = 2
NODES = f"""
import sys
from ray.cluster_utils import Cluster
common = {{"num_cpus": {PER_NODE}, "include_dashboard": False, "min_worker_port": 0, "max_worker_port": 0}}
cluster = Cluster(initialize_head=True, head_node_args=common | {{"temp_dir": sys.argv[1]}})
cluster.add_node(**common)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
PLACED = f"""
import json, sys
import ray
from trainer import placement
from trainer.config.load import load_config
from trainer.nodes import living_nodes

class Here:
    def node(self):
        return ray.get_runtime_context().get_node_id()

base = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model", "algorithm.adv_estimator=grpo",
        "trainer.device=cpu", "trainer.nnodes=2", "trainer.n_gpus_per_node={PER_NODE}"]
cfg = load_config([*base, "actor_rollout_ref.actor.device_mapping=3,0", "actor_rollout_ref.rollout.device_mapping=0-1"])
placement.connect(cfg)
cluster = placement.reserve(cfg)
used = [device for device in cluster.devices if device.bundle is not None]
places = []
for _ in range(2):
    actors = [placement.start(Here, device) for device in used]
    places.append(ray.get([actor.node.remote() for actor in actors]))
    for actor in actors:
        ray.kill(actor)
free = {{node.node_id: node.free for node in living_nodes("CPU")}}
told = {{"driver": ray.get_runtime_context().get_node_id(), "nodes": [device.node for device in cluster.devices],
         "used": [cluster.devices.index(device) for device in used], "places": places, "free": free}}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """Two nodes of two CPUs, guarded by a token: the environment in which a user joins them."""
    token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory(prefix="tray") as directory:
        cluster = subprocess.Popen(
            [sys.executable, "-c", NODES, directory],
            env={**os.environ, **token, "RAY_AUTH_MODE": "token", "RAY_raylet_start_wait_time_s": "120"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert cluster.stdin is not None and cluster.stdout is not None
        try:
            address = cluster.stdout.readline().strip()
            assert address, "the cluster did not start"
            yield {"RAY_ADDRESS": address, **token}
            assert cluster.poll() is None, "the cluster must outlive the runs that joined it"
            cluster.stdin.close()
            cluster.wait(20)
        finally:
            end_processes(started_by(cluster.pid, "no run"))


def test_bundles_lie_where_the_numbers_say(nodes: dict[str, str]) -> None:
    """Node 0 is the driver's; an actor that is started again comes back to its device; what is unused stays free."""
    environment = {**os.environ, **nodes, "RAY_AUTH_MODE": "token"}
    command = [sys.executable, "-c", PLACED]
    looked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert looked.returncode == 0, looked.stderr
    told: dict[str, Any] = json.loads(looked.stdout.splitlines()[-1])
    assert told["nodes"] == [0, 0, 1, 1]
    assert told["used"] == [0, 1, 3]
    (other,) = told["free"].keys() - {told["driver"]}
    assert told["places"] == [[told["driver"], told["driver"], other]] * 2
    assert told["free"] == {told["driver"]: 0, other: 1}


@pytest.fixture(scope="module")
def overlapping(runs: Path, nodes: dict[str, str]) -> Outcome:
    """The main run's work and a reference: training ranks on both nodes, replicas on the second, one device shared."""
    outcome = run(
        runs / "overlapping",
        *NO_VALIDATION,
        "trainer.total_training_steps=2",
        "trainer.full_determinism=true",
        "trainer.nnodes=2",
        f"trainer.n_gpus_per_node={PER_NODE}",
        "actor_rollout_ref.actor.device_mapping=1-2",
        "actor_rollout_ref.rollout.device_mapping=2-3",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.ref.device_mapping=list(range(0,1))",
        "actor_rollout_ref.rollout.update_weights_bucket_megabytes=1",
        environment=nodes,
    )
    assert outcome.status == 0, outcome.told
    return outcome


def test_several_nodes_train_as_one_does(overlapping: Outcome, main_run: Outcome) -> None:
    """Same seeds, same prompts for each replica: same responses. The reference, the same model, changes nothing yet."""
    mine, theirs = overlapping.steps(), main_run.steps()[:2]
    assert [record["step"] for record in mine] == [1, 2]
    assert [record["reward/mean"] for record in mine] == [record["reward/mean"] for record in theirs]
    for name in ("actor/pg_loss", "actor/grad_norm", "advantage/std", "response_length/mean"):
        assert mine[0][name] == pytest.approx(theirs[0][name], rel=1e-5), name


def test_half_of_the_weights_cross_to_the_other_node_once(overlapping: Outcome) -> None:
    """From the training rank on the first node, to two replicas; several buckets. What arrives is what was sent."""
    for record in overlapping.steps():
        assert record["sync/bytes_between_nodes"] == pytest.approx(record["sync/bytes"] / 2, rel=0.05)
        assert record["sync/bytes"] > 3 << 20
        assert record["mismatch/logprob_abs_diff_mean"] < 1e-4


@pytest.fixture(scope="module")
def apart(runs: Path, nodes: dict[str, str]) -> Outcome:
    """Training on the first node, generation on the second, where the replica is killed after step 1."""
    with launch(
        runs / "apart",
        *NO_VALIDATION,
        "trainer.total_training_steps=2",
        "trainer.nnodes=2",
        f"trainer.n_gpus_per_node={PER_NODE}",
        "actor_rollout_ref.actor.device_mapping=0",
        "actor_rollout_ref.rollout.device_mapping=2",
        "data.train_batch_size=16",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.max_num_seqs=16",  # so that generation takes a while
        "data.max_response_length=128",
        "actor_rollout_ref.rollout.ignore_eos=true",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        environment=nodes,
    ) as process:
        process.wait_for_step(1)
        readings = process.directory / "rollout.jsonl"
        before = len(read_jsonl(readings))

        def at_work() -> list[Record]:
            return [reading for reading in read_jsonl(readings)[before:] if reading["running"]]

        os.kill(wait_until(at_work, 60, "the replica at work on step 2")[0]["pid"], signal.SIGKILL)
        return process.wait()


def test_training_and_generation_on_different_nodes(apart: Outcome) -> None:
    assert apart.status == 0, apart.told
    assert "no role uses devices 1,3 of the 4" in apart.stdout.replace("\n", " ")
    for record in apart.steps():
        assert record["sync/bytes_between_nodes"] == record["sync/bytes"] > 0
        assert record["mismatch/logprob_abs_diff_mean"] < 1e-4


def test_a_lost_replica_is_replaced_on_its_own_node(apart: Outcome) -> None:
    """Its successor has the weights of now, which come from the first node again."""
    assert [record["rollout/replaced"] for record in apart.steps()] == [0, 1], apart.told
    assert apart.steps()[-1]["sync/weight_version"] == 3
