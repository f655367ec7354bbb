"""The plan of a run: made from its configuration and inputs, shown to people, and written for programs as plan.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer._version import __version__
from trainer.adaptation import Adaptation
from trainer.assembly import annotates_actor
from trainer.config.errors import UserError
from trainer.config.keys import known_keys
from trainer.config.roles import RoleName, training_roles
from trainer.config.schema import Config
from trainer.inputs import Inputs, read_config
from trainer.plan.batches import batch_record, warmup_problems
from trainer.plan.devices import Devices
from trainer.plan.layout import layout_of
from trainer.plan.memory import PhaseMemory
from trainer.plan.origins import UNKNOWN, Origin, Origins, leaves
from trainer.plan.predict import DeviceMemory, Models, predict_devices
from trainer.plan.replica import cache_bytes_per_token
from trainer.plan.roles import role_records
from trainer.plan.verdict import Verdict, judge, longest_cache
from trainer.specs import Sizes, sampling_spec
from trainer.tracking.summary import write_atomically

PLAN = "plan.json"
VERSION = 1
"""Of the file's form; it grows where something is renamed or taken away."""


@dataclass(frozen=True, slots=True)
class Plan:
    """config: key to (value, where it comes from). memory: empty on CPUs. cache: of a replica's KV cache."""

    config: Mapping[str, tuple[Any, Origin]]
    devices: Devices
    num_devices: int
    roles: Sequence[Mapping[str, object]]
    batch: Mapping[str, object]
    memory: Sequence[DeviceMemory]
    cache: Mapping[str, object]
    vllm: Mapping[str, object]
    notices: tuple[str, ...]
    verdict: Verdict

    def record(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "version": VERSION,
            "tandem": __version__,
            "config": {key: _value_record(value, origin) for key, (value, origin) in self.config.items()},
            "devices": {
                "type": self.devices.kind,
                "number": self.num_devices,
                "memory_bytes": self.devices.total_bytes,
                "known_from": self.devices.told_by,
            },
            "roles": list(self.roles),
            "batch": dict(self.batch),
            "memory": [_memory_record(each) for each in self.memory],
            "kv_cache": dict(self.cache),
            "vllm": dict(self.vllm),
            "notices": list(self.notices),
            "warnings": list(self.verdict.warnings),
            "problems": list(self.verdict.problems),
        }

    def write(self, run_dir: Path) -> Path:
        """Writes plan.json into a run directory, which is made if it is not there.

        Raises UserError if that cannot be: nothing of the run could be written.
        """
        path = run_dir / PLAN
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(self.record(), indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"trainer.default_local_dir={run_dir}: cannot be written to ({error.strerror}); name a directory of "
                "yours with room in it"
            ) from error
        return path


def make_plan(
    cfg: Config,
    inputs: Inputs,
    sizes: Sizes,
    adaptation: Adaptation,
    devices: Devices,
    *,
    origins: Origins | None = None,
    notices: Sequence[str] = (),
) -> Plan:
    """Everything that can be said before a run starts. It reads configs of models; no weights, no device."""
    models = _models(cfg)
    total = devices.total_bytes
    annotates = annotating_roles(cfg, sizes)
    memory = predict_devices(cfg, models, total, annotates=annotates) if devices.kind == "cuda" else ()
    per_token = cache_bytes_per_token(cfg.actor_rollout_ref.rollout, models.language)
    validation = 0 if inputs.validation is None else len(inputs.validation)
    return Plan(
        config=_with_origins(cfg, {**(origins or {}), **_adapted(cfg, inputs, adaptation)}),
        devices=devices,
        num_devices=cfg.num_devices,
        roles=role_records(cfg),
        batch=batch_record(cfg, sizes, train=len(inputs.train), validation=validation),
        memory=memory,
        cache=_cache_record(cfg, memory, per_token, on_cpu=devices.kind == "cpu"),
        vllm={"version": adaptation.version, "choices": {what: value for what, value, _ in adaptation.choices}},
        notices=tuple(notices),
        verdict=_verdict(cfg, sizes, judge(cfg, memory, total, longest_cache(cfg, per_token))),
    )


def _verdict(cfg: Config, sizes: Sizes, of_memory: Verdict) -> Verdict:
    """Of memory, and of what the number of steps shows."""
    problems, warnings = warmup_problems(cfg, sizes)
    return Verdict((*problems, *of_memory.problems), (*warnings, *of_memory.warnings))


def annotating_roles(cfg: Config, sizes: Sizes) -> tuple[RoleName, ...]:
    """Roles with a pass over the batch before the update."""
    has: dict[RoleName, bool] = {"actor": annotates_actor(cfg, sizes), "ref": True, "critic": True}
    return tuple(role.name for role in training_roles(cfg) if has[role.name])


def _models(cfg: Config) -> Models:
    model = cfg.actor_rollout_ref.model
    language = layout_of(read_config(model, model.path, "actor_rollout_ref.model.path"), "logprobs")
    if not cfg.use_critic:
        return Models(language, None)
    return Models(language, layout_of(read_config(model, cfg.critic.model.path, "critic.model.path"), "values"))


def _with_origins(cfg: Config, origins: Origins) -> dict[str, tuple[Any, Origin]]:
    values = dict(leaves(cfg.model_dump(mode="json")))
    return {key: (value, origins.get(key, UNKNOWN)) for key, value in values.items()}


def _adapted(cfg: Config, inputs: Inputs, adaptation: Adaptation) -> Origins:
    """Keys that mean something else on the installed vLLM than they say."""
    found = {}
    for notice in adaptation.notices:
        key = notice.partition("=")[0]
        if key in known_keys().leaves:
            found[key] = Origin("adapted", notice)
    if adaptation.sampling.logprobs != sampling_spec(cfg, inputs).logprobs:
        why = next((notice for notice in adaptation.notices if "log-probs" in notice), "")
        found["actor_rollout_ref.rollout.calculate_log_probs"] = Origin("adapted", why)
    return found


def _cache_record(cfg: Config, memory: Sequence[DeviceMemory], per_token: int, *, on_cpu: bool) -> dict[str, object]:
    """Of one replica: bytes on each of its devices, tokens, and sequences of the greatest length; None: not known."""
    rollout = cfg.actor_rollout_ref.rollout
    length = rollout.max_model_len or cfg.max_sequence_length
    replica = next((each.replica for each in memory if each.replica is not None), None)
    num_bytes = replica.kv_cache if replica is not None and replica.kv_cache else None
    if on_cpu:
        num_bytes = int((rollout.kv_cache_gb or 1.0) * (1 << 30))
    return {
        "bytes": num_bytes,
        "bytes_per_token": per_token,
        "tokens": None if num_bytes is None else num_bytes // per_token,
        "sequence_tokens": length,
        "max_concurrency": None if num_bytes is None else round(num_bytes / per_token / length, 2),
        "max_num_seqs": rollout.max_num_seqs,
    }


def _value_record(value: Any, origin: Origin) -> dict[str, Any]:
    return {"value": value, "from": origin.source, "detail": origin.detail, "key": origin.key}


def _memory_record(memory: DeviceMemory) -> dict[str, Any]:
    return {
        "devices": list(memory.devices),
        "roles": list(memory.roles),
        "phases": {phase: _phase_record(found) for phase, found in memory.phases.items()},
        "replica": None if memory.replica is None else asdict(memory.replica),
    }


def _phase_record(found: PhaseMemory) -> dict[str, Any]:
    return {
        "bytes": found.total,
        **{f"{category}_bytes": size for category, size in found.terms.items()},
        "offloaded_bytes": dict(found.offloaded),
        "least_bytes": found.floor,
        "recomputed_layers": found.recomputed,
    }
