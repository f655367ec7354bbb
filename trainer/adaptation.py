"""What the installed vLLM can do with this configuration, found out before any actor starts."""

from __future__ import annotations

import os
from dataclasses import dataclass

from trainer.config.errors import raise_problems
from trainer.config.mapping import is_shared, replica_devices
from trainer.config.schema import Config
from trainer.inputs import Inputs
from trainer.placement import Cluster
from trainer.specs import rollout_spec, sampling_spec
from workers.rollout.spec import SamplingSpec
from workers.rollout.vllm.arguments import fit_sampling, plan_engine
from workers.rollout.vllm.capabilities import NEWEST, of_installed


@dataclass(frozen=True, slots=True)
class Adaptation:
    """sampling: of training, as this vLLM can do it. choices: (what, value, why). notices: what was changed to fit."""

    version: str
    sampling: SamplingSpec
    choices: tuple[tuple[str, str, str], ...]
    notices: tuple[str, ...]


def adapt(cfg: Config, inputs: Inputs, cluster: Cluster) -> Adaptation:
    """Fits the rollout's settings to the installed vLLM.

    Raises ValueError for what cannot work on it, naming the key, the version that has it, and what to do.
    """
    can = of_installed(cluster.device_type)
    devices = [rank for replica in replica_devices(cfg) for rank in replica]
    spec = rollout_spec(cfg, inputs, cluster.device_type, [cluster.devices[0]], shared=is_shared(cfg, devices))
    plan = plan_engine(spec, can, os.environ)
    sampling, notice, problem = fit_sampling(sampling_spec(cfg, inputs), can, auto_adapt=spec.auto_adapt)
    problems = [*plan.problems, *([problem] if problem else [])]
    raise_problems(problems)
    notices = [*plan.notices, *([notice] if notice else [])]
    if not can.known:
        notices.append(f"vLLM {can.version} is newer than {NEWEST}, the last one Tandem was checked against")
    return Adaptation(str(can.version), sampling, plan.choices, tuple(notices))
