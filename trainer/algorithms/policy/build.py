"""From actor_rollout_ref.actor.policy_loss to an objective: by name, or a function of one's own by import path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor

from trainer.algorithms.custom import FORMS, check_params, is_path, load
from trainer.algorithms.policy.base import (
    ACTOR,
    PARAMS,
    Objective,
    ObjectiveInput,
    PolicyObjective,
    unclipped,
)
from trainer.algorithms.policy.clipped import Cispo, Gmpo, Gspo, Ppo
from trainer.algorithms.policy.covariance import ClipCov, KlCov
from trainer.algorithms.policy.divergence import DppoKl, DppoTv
from trainer.algorithms.policy.weighted import Dro, Gpg, Sapo, Topr

MODE = f"{ACTOR}.policy_loss.loss_mode"

OBJECTIVES: Mapping[str, type[PolicyObjective]] = MappingProxyType(
    {
        "ppo": Ppo,
        "gspo": Gspo,
        "sapo": Sapo,
        "cispo": Cispo,
        "gmpo": Gmpo,
        "gpg": Gpg,
        "clip_cov": ClipCov,
        "kl_cov": KlCov,
        "dppo_tv": DppoTv,
        "dppo_kl": DppoKl,
        "dro": Dro,
        "topr": Topr,
    }
)
ALIASES: Mapping[str, str] = MappingProxyType({"vanilla": "ppo", "geo_mean": "gmpo"})
"""verl's other names."""


@dataclass(frozen=True, slots=True)
class ClipRange:
    """clip_ratio_low, clip_ratio_high and clip_ratio_c, for the objectives that have such bounds."""

    clip_low: float
    clip_high: float
    clip_c: float


CLIPS = tuple(field.name for field in fields(ClipRange))


@dataclass(frozen=True, slots=True)
class CustomObjective(PolicyObjective):
    """A function of one's own: `f(x: ObjectiveInput, **params) -> Tensor [R] | Objective`; a tensor is the loss.

    It is kept by its import path and loaded where it runs. Raises ValueError for a result of another kind or length.
    """

    path: str
    params: tuple[tuple[str, Any], ...] = ()

    def __call__(self, x: ObjectiveInput) -> Objective:
        """See the class."""
        result = load(self.path, MODE)(x, **dict(self.params))
        if isinstance(result, Tensor):
            result = unclipped(result)
        if not isinstance(result, Objective) or result.loss.shape != x.mask.shape:
            got = list(result.loss.shape) if isinstance(result, Objective) else type(result).__name__
            raise ValueError(
                f"{MODE}={self.path}: returned {got} for {len(x.mask)} tokens; return one loss per token, a tensor "
                f"[{len(x.mask)}] or an Objective"
            )
        return result


def policy_objective(loss_mode: str, params: Mapping[str, Any], clips: ClipRange) -> PolicyObjective:
    """The objective of that name with these parameters, its own defaults for the others.

    Raises ValueError naming key, value and remedy: unknown name or parameter (listing the known ones), bad value, a
    function that cannot be imported.
    """
    if is_path(loss_mode):
        check_params(load(loss_mode, MODE), params, key=PARAMS, owner=f"{MODE}={loss_mode}")
        return CustomObjective(_absolute(loss_mode), tuple(sorted(params.items())))
    name = ALIASES.get(loss_mode, loss_mode)
    if name not in OBJECTIVES:
        known = ", ".join([*OBJECTIVES, *ALIASES])
        raise ValueError(f"{MODE}={loss_mode}: unknown; choose one of {known}, or a function of your own as {FORMS}")
    kind = OBJECTIVES[name]
    check_params(kind.__init__, params, key=PARAMS, owner=f"{MODE}={loss_mode}", taken=CLIPS)
    return kind(**{name: value for name, value in asdict(clips).items() if name in _fields(kind)}, **params)


def parameters(name: str) -> tuple[str, ...]:
    """The names of an objective's parameters (policy_loss.params)."""
    return tuple(field for field in _fields(OBJECTIVES[ALIASES.get(name, name)]) if field not in CLIPS)


def _fields(kind: type[PolicyObjective]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cast(Any, kind)))


def _absolute(path: str) -> str:
    """A file's path as it is here: training workers may have another working directory."""
    place, _, name = path.rpartition(":")
    return f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else path
