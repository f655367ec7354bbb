"""Roles, devices and strategies: `actor_train`, `reference`, `critic`, `actor_infer` and their `strategy_config`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.config.devices import parse_device_mapping
from trainer.config.errors import UserError, show
from trainer.config.roll.check import check_strategy
from trainer.config.roll.table_strategies import SAME_NAMES, VLLM
from trainer.config.roll.tree import Options, Translation

SECTIONS = {"actor_train": "actor_rollout_ref.actor", "reference": "actor_rollout_ref.ref", "critic": "critic"}
"""Role -> our section."""

_ROLLOUT = "actor_rollout_ref.rollout"
_STRATEGIES = {
    "megatron_train": "megatron",
    "megatron_infer": "megatron",
    "fsdp2_train": "fsdp",
    "fsdp2_infer": "fsdp",
    "hf_infer": "fsdp",
    "deepspeed_train": "fsdp",
    "deepspeed_infer": "fsdp",
}
_RANGE = re.compile(r"list\s*\(\s*range\s*\([^()]*\)\s*\)|range\s*\([^()]*\)")
_RANKS = "write list(range(0,8)), [0,1] or 0-7"
_PARALLEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
_FORMATS = {"dummy": "dummy", "auto": "auto", "safetensors": "auto", None: "auto"}
_TRAINING_DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}


def translate_roles(into: Translation, roles: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Translate devices and engines of the training roles in use and of the rollout; return each role's devices."""
    devices = {}
    for role in (*roles, "actor_infer"):
        ranks = role_ranks(into, role)
        if ranks is not None:
            devices[role] = ranks
            section = _ROLLOUT if role == "actor_infer" else SECTIONS[role]
            into.put(f"{section}.device_mapping", show_ranks(ranks), f"{role}.device_mapping")
    _cluster(into, devices)
    for role in roles:
        _training_role(into, role)
    _rollout(into, devices)
    return devices


def role_ranks(into: Translation, role: str) -> tuple[int, ...] | None:
    """The devices that a role's `device_mapping` names, read without `eval`; None, and perhaps a problem, without."""
    path = f"{role}.device_mapping"
    value = into.roll.value(path)
    if value is None:
        return None
    try:
        return read_mapping(value, f"roll.{path}")
    except UserError as error:
        into.problems.append(str(error))
        return None


def read_mapping(value: object, key: str) -> tuple[int, ...]:
    """Ranks of `list(range(0,8))`, `list([0,1])`, `[0, 1]`, `0-7`, and of sums of these. Raises UserError."""
    if isinstance(value, list) and all(type(rank) is int for rank in value):
        return parse_device_mapping(value, key)
    number = str(value).strip()
    if number.isdecimal():
        many = f"list(range(0,{number})) for {number} devices, " if int(number) else ""
        raise UserError(f"{key}={show(value)}: one number; write {many}[{number}] for the one of this rank")
    if not isinstance(value, str):
        raise UserError(f"{key}={show(value)}: no list of whole numbers; {_RANKS}")
    ranks: list[int] = []
    for part in value.split("+"):
        listed = re.fullmatch(r"list\s*\(\s*(\[.*\])\s*\)", part.strip(), flags=re.DOTALL)
        if listed is None and "(" in part and _RANGE.fullmatch(part.strip()) is None:
            raise UserError(
                f"{key}={value}: {part.strip()} is neither a list nor a range, and nothing else is evaluated; {_RANKS}"
            )
        ranks += parse_device_mapping(listed.group(1) if listed else part.strip(), key)
    return parse_device_mapping(ranks, key)


def show_ranks(ranks: Sequence[int]) -> str:
    """Ranks as our keys take them: `0-7`, `0-3,8-11`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def _cluster(into: Translation, devices: dict[str, tuple[int, ...]]) -> None:
    """Nodes by the highest rank, as ROLL counts them; on one node no more devices than are used."""
    if not devices:
        return
    count, per_node = max(max(ranks) for ranks in devices.values()) + 1, into.roll.value("num_gpus_per_node")
    nodes, named = -(-count // per_node), into.roll.value("num_nodes")
    if named not in (None, nodes):
        text = f"the device mappings reach rank {count - 1}: {nodes} x {per_node} devices"
        counted = "counted from the device_mapping, as ROLL does"
        into.tell(f"roll.num_nodes={show(named)}: {text}, {counted}", "trainer.nnodes")
    paths = ("num_gpus_per_node", *(f"{role}.device_mapping" for role in devices))
    into.put("trainer.nnodes", nodes, *paths)
    into.put("trainer.n_gpus_per_node", min(count, per_node), *paths)


def _training_role(into: Translation, role: str) -> None:
    section, path = SECTIONS[role], f"{role}.strategy_args.strategy_name"
    reason = "no such strategy trains or infers log-probs here"
    strategy = into.choose(path, _STRATEGIES, reason, f"{section}.strategy")
    if strategy is None:
        return
    into.put(f"{section}.strategy", strategy, path)
    config, name = into.roll.strategy_config(role), str(into.roll.value(path))
    check_strategy(role, name, config.given, into)
    engine = f"{section}.megatron" if strategy == "megatron" else f"{section}.{_fsdp_name(role)}"
    source = f"{role}.strategy_args.strategy_config"
    if strategy == "megatron":
        _megatron(into, role, engine, config, source)
    elif name.startswith("fsdp2"):
        _fsdp2(into, role, engine, config, source)
    dtype = f"{source}.param_dtype" if "param_dtype" in config.given else f"{role}.model_args.dtype"
    value = into.choose(dtype, _TRAINING_DTYPES, "trainers compute in bfloat16 or float32", f"{engine}.dtype")
    into.put(f"{engine}.dtype", value, dtype)
    if name.startswith("deepspeed"):
        text = f"roll.{path}={name}: trained with FSDP; ROLL has no DeepSpeed since 0.3 either"
        into.tell(text, f"{section}.strategy")


def _fsdp_name(role: str) -> str:
    return "fsdp" if role == "critic" else "fsdp_config"


def _megatron(into: Translation, role: str, engine: str, config: Options, source: str) -> None:
    for name in _PARALLEL:
        into.put(f"{engine}.{name}", config.either(name, 1), f"{source}.{name}")
    virtual = "virtual_pipeline_model_parallel_size"
    chunks = config.either(virtual, 1)
    into.put(f"{engine}.{virtual}", None if chunks == 1 else chunks, f"{source}.{virtual}")
    if role == "actor_train" and "sequence_parallel" in config.given:
        into.put(f"{engine}.sequence_parallel", config.given["sequence_parallel"], f"{source}.sequence_parallel")
    if config.either("optimizer_cpu_offload"):
        into.put(f"{engine}.optimizer_offload", True, f"{source}.optimizer_cpu_offload")


def _fsdp2(into: Translation, role: str, engine: str, config: Options, source: str) -> None:
    if config.either("reshard_after_forward") is not None:
        into.put(
            f"{engine}.reshard_after_forward", config.given["reshard_after_forward"], f"{source}.reshard_after_forward"
        )
    if config.either("offload_policy"):
        into.put(f"{engine}.param_offload", True, f"{source}.offload_policy")
        if role != "reference":
            into.put(f"{engine}.optimizer_offload", True, f"{source}.offload_policy")


def _rollout(into: Translation, devices: dict[str, tuple[int, ...]]) -> None:
    config, source = into.roll.strategy_config("actor_infer"), "actor_infer.strategy_args.strategy_config"
    name = str(into.roll.value("actor_infer.strategy_args.strategy_name") or "vllm")
    if name != "vllm":
        return  # refused by the table
    check_strategy("actor_infer", name, config.given, into)
    into.put(
        f"{_ROLLOUT}.tensor_model_parallel_size",
        config.either("tensor_parallel_size", 1),
        f"{source}.tensor_parallel_size",
    )
    for key in SAME_NAMES:
        if key in config.given:
            into.put(f"{_ROLLOUT}.{key}", config.given[key], f"{source}.{key}")
    for key, value in config.given.items():
        if key not in VLLM:
            into.put(f"{_ROLLOUT}.engine_kwargs.vllm.{key}", value, f"{source}.{key}")
    dtypes = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    path = "actor_infer.model_args.dtype"
    ours = f"{_ROLLOUT}.dtype"
    into.put(ours, into.choose(path, dtypes, "vLLM computes in none such", ours), path)
    if "load_format" in config.given:
        path, ours = f"{source}.load_format", f"{_ROLLOUT}.load_format"
        into.put(ours, into.choose(path, _FORMATS, "weights are read from safetensors files", ours), path)
    _sleep(into, devices, config, source)


def _sleep(into: Translation, devices: dict[str, tuple[int, ...]], config: Options, source: str) -> None:
    """The engine sleeps where it shares devices with training, as in ROLL; what the levels mean is said."""
    rollout = set(devices["actor_infer"]) if "actor_infer" in devices else set()
    shared = any(rollout & set(ranks) for role, ranks in devices.items() if role != "actor_infer")
    if rollout:
        into.put(f"{_ROLLOUT}.free_cache_engine", shared, *(f"{role}.device_mapping" for role in devices))
    level, path = config.either("sleep_level"), f"{source}.sleep_level"
    ours = (f"{_ROLLOUT}.sleep_level", f"{_ROLLOUT}.free_cache_engine")
    if level is None:
        return
    if not shared:
        into.tell(f"roll.{path}={level}: no effect: the rollout shares no device, so it never sleeps", *ours)
        return
    into.put(f"{_ROLLOUT}.sleep_level", level, path)
    if level == 1:
        into.tell(
            f"roll.{path}=1: level 1 copies the weights to host memory, level 2 drops them; the next publication "
            "writes all of them again in both cases, so 2 (or leaving it out: auto) saves the copy",
            *ours,
        )
    if level == 2:
        into.tell(
            f"roll.{path}=2: weights and KV cache are dropped while the policy is trained; the next publication writes "
            "every weight again",
            *ours,
        )
