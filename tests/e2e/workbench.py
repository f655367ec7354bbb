"""One set of real workers (Ray, vLLM, two training ranks, scorers) that takes steps with one algorithm after another.

    with workbench(directory, task) as bench:
        first, second = bench.steps("algorithm.adv_estimator=rloo", number=2)

Starting takes twenty seconds and a step a fraction of one. Actor, reference and critic are there, whether or not a
configuration uses them; a driver for each configuration is put together as a run does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray

from trainer import placement
from trainer.actors import start_workers
from trainer.adaptation import adapt
from trainer.assembly import Running, assemble
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.config.validate import validate
from trainer.driver import Driver
from trainer.inputs import Inputs, load_inputs
from trainer.measure import Metrics
from trainer.placement import Cluster
from trainer.samples import Samples
from trainer.setup import build
from trainer.specs import sizes
from trainer.state import TrainState
from trainer.tracking.phases import Phases
from workers.group import WorkerGroup
from workers.train_worker import TrainWorker

PROMPTS, RESPONSES, MINI_BATCH = 8, 4, 4
UPDATES = PROMPTS // MINI_BATCH
"""Optimizer steps of a training step, unless a configuration says otherwise: the second meets a ratio that is not 1."""
REWARD = '''"""In parts: whether the answer is right, and the share of its characters that are. Never negative."""


def compute_score(data_source, solution_str, ground_truth, extra_info):
    right = float(solution_str == ground_truth)
    near = sum(a == b for a, b in zip(solution_str, ground_truth)) / max(len(solution_str), len(ground_truth))
    return {"score": (right + near) / 2, "right": right, "near": near}
'''
EVERY_ROLE = ("critic.enable=true", "actor_rollout_ref.actor.use_kl_loss=true")


@dataclass(frozen=True, slots=True)
class Taken:
    """A step that was taken. moved: whether it left the actor with other weights."""

    samples: Samples
    metrics: Metrics
    moved: bool


class Workbench:
    """See the module. base: overrides of the quick start that are the same for every algorithm."""

    def __init__(self, base: tuple[str, ...]) -> None:
        self._base = base
        cfg = self._config(EVERY_ROLE)
        placement.connect(cfg)
        self._inputs: Inputs = load_inputs(cfg)
        self._cluster: Cluster = placement.reserve(cfg)
        workers = start_workers(cfg, self._inputs, self._cluster)
        sampling = adapt(cfg, self._inputs, self._cluster).sampling
        driver = build(cfg, self._inputs, workers, sizes(cfg, self._inputs), Phases(), sampling)
        driver.publish()
        self._running = Running(workers.train, driver.source, driver.sync, driver.phases)
        self._state = driver.state

    def driver(self, *overrides: str) -> Driver:
        """A driver for the configuration with these overrides, which goes on where the last one was."""
        cfg, inputs = self._config(overrides), self._inputs
        sampling = adapt(cfg, inputs, self._cluster).sampling
        driver = assemble(cfg, inputs, self._running, sizes(cfg, inputs), sampling)
        begun = self._state  # another batch has another name, and other weights another version
        self._state = TrainState(begun.order, driver.state.kl, begun.step, begun.weight_version)
        return replace(driver, state=self._state)

    def steps(self, *overrides: str, number: int = 1) -> list[Taken]:
        """So many training steps with these overrides."""
        driver = self.driver(*overrides)
        taken, before = [], self._weights()
        for _ in range(number):
            samples, metrics = driver.step()
            after = self._weights()
            taken.append(Taken(samples, metrics, moved=before != after))
            before = after
        return taken

    def _config(self, overrides: tuple[str, ...]) -> Config:
        """Checked, as every run checks its own."""
        cfg = load_config([*self._base, *overrides], "quickstart")
        validate(cfg)
        return cfg

    def _weights(self) -> tuple[int, ...]:
        """Checksums of what each rank holds of the actor's; all of it is in the first bucket."""
        ranks: WorkerGroup = self._running.train["actor"]
        return tuple(bucket.checksum for bucket in ranks.broadcast(TrainWorker.publish_bucket, 0).result(60.0))


@contextmanager
def workbench(directory: Path, task: Path) -> Iterator[Workbench]:
    """The workers of a small quick start: 8 prompts, 4 responses to each, a learning rate that changes little."""
    reward = directory / "reward_in_parts.py"
    reward.write_text(REWARD)
    base = (
        f"trainer.default_local_dir={directory}",
        "trainer.test_freq=-1",
        "data.val_files=null",
        f"data.train_files={task / 'train.parquet'}",
        f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.model.path={task / 'model'}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={MINI_BATCH}",
        "actor_rollout_ref.actor.optim.lr=1e-6",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        "actor_rollout_ref.rollout.device_mapping=[0]",
        f"reward.custom_reward_function.path={reward}",
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        try:
            yield Workbench(base)
        finally:
            ray.shutdown()
