"""The training roles of a configuration, and where the settings of each one's engine lie: FSDP's, or Megatron's.

What is asked of every role alike (devices, parallelism, precision, offloading) is asked here once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainer.config.schema import (
    ActorConfig,
    Config,
    CriticConfig,
    RefConfig,
    RefFsdpConfig,
    RefMegatronConfig,
    Strategy,
    TrainedFsdpConfig,
    TrainedMegatronConfig,
)
from workers.settings import Auto

RoleName = Literal["actor", "ref", "critic"]


@dataclass(frozen=True, slots=True)
class TrainingRole:
    """One role that a run has. key: its section; engine_key: the section of the engine that its strategy names.
    actor: the actor's section, some of whose keys hold for every role.
    """

    name: RoleName
    key: str
    engine_key: str
    config: ActorConfig | RefConfig | CriticConfig
    engine: TrainedFsdpConfig | RefFsdpConfig | TrainedMegatronConfig | RefMegatronConfig
    actor: ActorConfig

    @property
    def strategy(self) -> Strategy:
        """Which engine."""
        return self.config.strategy

    @property
    def megatron(self) -> RefMegatronConfig | None:
        """Megatron's settings, where it is the engine."""
        return self.engine if isinstance(self.engine, RefMegatronConfig) else None

    @property
    def model_dtype(self) -> Literal["fp32", "bf16"] | None:
        """Of the master weights; None: it is not trained."""
        if isinstance(self.engine, TrainedMegatronConfig):
            return self.actor.megatron.model_dtype
        return self.engine.model_dtype if isinstance(self.engine, TrainedFsdpConfig) else None

    @property
    def ranks_per_model(self) -> int:
        """Training ranks that hold one copy of the model between them, and get the same batch. FSDP's ranks do not."""
        megatron = self.megatron
        return megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size if megatron else 1

    @property
    def offloads(self) -> dict[str, Auto]:
        """Key of the engine's section -> when that part of the model leaves the device."""
        found: dict[str, Auto] = {"param_offload": self.engine.param_offload}
        if isinstance(self.engine, TrainedFsdpConfig | TrainedMegatronConfig):
            found["optimizer_offload"] = self.engine.optimizer_offload
        return found


def training_roles(cfg: Config) -> tuple[TrainingRole, ...]:
    """The actor, and the reference and the critic where there is one."""
    family, critic = cfg.actor_rollout_ref, cfg.critic
    actor, ref = family.actor, family.ref
    roles = [_role("actor", "actor_rollout_ref.actor", "fsdp_config", actor, actor.fsdp_config, actor)]
    if cfg.use_reference:
        roles.append(_role("ref", "actor_rollout_ref.ref", "fsdp_config", ref, ref.fsdp_config, actor))
    if cfg.use_critic:
        roles.append(_role("critic", "critic", "fsdp", critic, critic.fsdp, actor))
    return tuple(roles)


def _role(
    name: RoleName,
    key: str,
    fsdp_name: str,
    config: ActorConfig | RefConfig | CriticConfig,
    fsdp: TrainedFsdpConfig | RefFsdpConfig,
    actor: ActorConfig,
) -> TrainingRole:
    if config.strategy == "megatron":
        return TrainingRole(name, key, f"{key}.megatron", config, config.megatron, actor)
    return TrainingRole(name, key, f"{key}.{fsdp_name}", config, fsdp, actor)
