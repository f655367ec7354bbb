"""What measuring a part of w1 starts from: the program's own steps from a configuration to reserved devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from trainer import placement
from trainer.adaptation import adapt
from trainer.config.errors import UserError, user_errors
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.inputs import Inputs, load_inputs
from workers.group import WorkerError
from workers.rollout.spec import SamplingSpec

from . import launch


@dataclass(frozen=True, slots=True)
class Bench:
    """Inputs read, devices reserved, no actor started. sampling: of training, as the installed vLLM can do it."""

    cfg: Config
    inputs: Inputs
    cluster: placement.Cluster
    sampling: SamplingSpec


@contextmanager
def bench(name: str, overrides: Sequence[str]) -> Iterator[Bench]:
    """A bench, and an end of everything that is started on it. name: of the run directories.

    Raises RunFailed for a configuration that cannot be used, and when a worker fails inside.
    """
    run_dir = launch.ROOT / launch.new_run_dir(name)
    try:
        with user_errors():
            cfg = load_config([*overrides, f"trainer.default_local_dir={run_dir}"])
            placement.connect(cfg)
            inputs = load_inputs(cfg)
            cluster = placement.reserve(cfg)
            sampling = adapt(cfg, inputs, cluster).sampling
        yield Bench(cfg, inputs, cluster, sampling)
    except (UserError, WorkerError) as error:
        raise launch.RunFailed("\n".join([str(error), *getattr(error, "__notes__", ())])) from error
    finally:
        ray.shutdown()
