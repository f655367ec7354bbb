"""Checks of environment variables: left over, contradictory, unknown to what is installed. Pure: facts to items."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from trainer.diagnosis.facts import Facts
from trainer.diagnosis.items import SHELL, Command, Item, broken, ok, unset, warning

if TYPE_CHECKING:
    from workers.rollout.vllm.capabilities import Capabilities

NAME = "environment"
_READ_ELSEWHERE = frozenset(
    {
        "VLLM_USE_V1",  # these three have checks of their own
        "VLLM_ATTENTION_BACKEND",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_BATCH_INVARIANT",  # these are read by vLLM without being declared
        "VLLM_VERSION_OVERRIDE",
    }
)

_SLOWS = {
    "NCCL_P2P_DISABLE": "GPUs of one machine then talk through host memory",
    "NCCL_SHM_DISABLE": "processes of one machine then talk through the network",
    "NCCL_IB_DISABLE": "machines then talk over TCP where there is InfiniBand",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "TORCHDYNAMO_DISABLE": "vLLM's models are not compiled",
}
_RENAMED = {
    "NCCL_ASYNC_ERROR_HANDLING": "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_BLOCKING_WAIT": "TORCH_NCCL_BLOCKING_WAIT",
    "NCCL_DESYNC_DEBUG": "TORCH_NCCL_DESYNC_DEBUG",
}
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_LONGEST_TEMP = 40
"""Of Ray's temporary directory; its sockets lie some 60 bytes deeper, and a socket's path may have 107."""


def variables(facts: Facts) -> Iterator[Item]:
    """All of them; one line when nothing is wrong."""
    checks: tuple[Callable[[Facts], Iterator[Item]], ...] = (
        _engine_choice,
        _multiprocessing,
        _attention,
        _allocator,
        _unknown,
        _contradictions,
        _devices,
        _threads,
        _ray,
        _slow_and_renamed,
        _interface,
    )
    found = [item for check in checks for item in check(facts)]
    yield from found
    if not found:
        yield ok(NAME, "no variable stands against training")


def _engine_choice(facts: Facts) -> Iterator[Item]:
    """VLLM_USE_V1: gone from 0.11.1; before, only one of the two engines is the one that works."""
    value, can = facts.environ.get("VLLM_USE_V1"), facts.vllm.capabilities
    if value is None or can is None:
        return
    engine = "V0" if can.v0_engine else "V1"
    if "VLLM_USE_V1" not in can.environment:
        reason = f"VLLM_USE_V1={value} is left over: vLLM {can.version} has one engine and does not read it"
    elif value != ("0" if can.v0_engine else "1"):
        reason = f"VLLM_USE_V1={value} is kept from vLLM {can.version}: with Tandem it runs its {engine} engine"
    else:
        return
    yield warning(NAME, reason, "", unset("VLLM_USE_V1"))


def _multiprocessing(facts: Facts) -> Iterator[Item]:
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    if facts.environ.get(name, "0") != "0":
        reason = f"{name}={facts.environ[name]}: Tandem sets it to 0, the engine lives in the replica's own process"
        yield warning(NAME, reason, "", unset(name))


def _attention(facts: Facts) -> Iterator[Item]:
    name = "VLLM_ATTENTION_BACKEND"
    value, can = facts.environ.get(name), facts.vllm.capabilities
    if not value or can is None or name in can.environment:
        return
    reason = f"{name}={value} no longer exists in vLLM {can.version}; Tandem passes it on as an argument"
    remedy = f"say actor_rollout_ref.rollout.engine_kwargs.vllm.attention_backend={value} instead, and"
    yield warning(NAME, reason, remedy, unset(name))


def _allocator(facts: Facts) -> Iterator[Item]:
    """Expandable segments and sleep mode exclude each other before 0.20.1."""
    can = facts.vllm.capabilities
    for name in _ALLOCATOR:
        value = facts.environ.get(name, "")
        asked = "expandable_segments:true" in value.lower().replace(" ", "")
        if asked and facts.device == "cuda" and can is not None and not can.expandable_segments:
            reason = f"{name}={value} excludes sleep mode before vLLM 0.20.1; Tandem keeps it from vLLM {can.version}"
            yield warning(NAME, reason, "take vLLM 0.20.1 or later, or", unset(name))
    old, new = (facts.environ.get(name) for name in _ALLOCATOR)
    if old and new and old != new:
        reason = f"PYTORCH_CUDA_ALLOC_CONF={old} and PYTORCH_ALLOC_CONF={new}: torch reads one of them"
        yield warning(NAME, reason, "keep the newer name", unset("PYTORCH_CUDA_ALLOC_CONF"))


def _unknown(facts: Facts) -> Iterator[Item]:
    """VLLM_* that the installed version does not declare: a typing error, or of another version."""
    can = facts.vllm.capabilities
    if can is None or not can.environment:
        return
    for name in sorted(facts.environ):
        if name.startswith("VLLM_") and name not in can.environment and name not in _READ_ELSEWHERE:
            yield warning(NAME, f"{name}: vLLM {can.version} knows no such variable{_near(name, can)}", "", unset(name))


def _near(name: str, can: Capabilities) -> str:
    near = difflib.get_close_matches(name, sorted(can.environment), n=1, cutoff=0.85)
    return f"; did you mean {near[0]}?" if near else ""


def _contradictions(facts: Facts) -> Iterator[Item]:
    """Variables of AMD's beside NVIDIA's. Only a ROCm torch reads all of them, and so does Ray beside it."""
    said = {name: facts.environ[name] for name in _VISIBLE if name in facts.environ}
    rocm = facts.torch is not None and facts.torch.hip is not None
    amd = [name for name in said if name != _VISIBLE[0]]
    if len(set(said.values())) > 1:
        shown = ", ".join(f"{name}={value}" for name, value in said.items())
        effect = "a role gets GPUs that another one has" if rocm else "AMD's are read by nothing that is installed here"
        yield (broken if rocm else warning)(NAME, f"{shown} contradict each other: {effect}", "", unset(*amd))
    elif rocm and amd == ["ROCR_VISIBLE_DEVICES"]:
        swap = Command(SHELL, f"export HIP_VISIBLE_DEVICES={said[amd[0]]}; unset {amd[0]}")
        yield broken(NAME, f"{amd[0]} is set, and Ray refuses it without HIP_VISIBLE_DEVICES", "", swap)


def _devices(facts: Facts) -> Iterator[Item]:
    """Which GPUs are visible."""
    name = _VISIBLE[0]
    value = facts.environ.get(name)
    if value is None or facts.device != "cuda":
        return
    indices = [part.strip() for part in value.split(",")]
    numbered = [str(gpu.index) for gpu in facts.gpus.devices]
    if value.strip() in ("", "-1"):
        reason = f'{name}="{value}" hides all GPUs: a CUDA job cannot start'
        yield broken(NAME, reason, "", unset(name))
    elif numbered and any(index.isdigit() and index not in numbered for index in indices):
        yield broken(NAME, f"{name}={value}, and there are GPUs {', '.join(numbered)} only", "", unset(name))
    elif len(set(indices)) < len(indices):
        once = Command(SHELL, f"export {name}={','.join(dict.fromkeys(indices))}")
        yield broken(NAME, f"{name}={value} names a GPU twice", "", once)


def _threads(facts: Facts) -> Iterator[Item]:
    name = "OMP_NUM_THREADS"
    value, cores = facts.environ.get(name), facts.host.cores
    if value is None:
        return
    first = value.split(",")[0].strip()
    if not first.isdigit():
        yield warning(NAME, f"{name}={value} is not a number", "", unset(name))
    elif int(first) > cores:
        reason = f"{name}={value} on {cores} cores: the threads wait for each other, up to ten times slower"
        yield warning(NAME, reason, "", unset(name))


def _ray(facts: Facts) -> Iterator[Item]:
    name = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
    if _is_on(facts, name) and facts.device == "cuda":
        reason = f"{name}: Ray leaves all GPUs visible; Tandem sets those of each role itself, other code may not"
        yield warning(NAME, reason, "", unset(name))
    temp = facts.environ.get("RAY_TMPDIR", "")
    if len(temp) > _LONGEST_TEMP:
        reason = f"RAY_TMPDIR={temp} is long: the paths of Ray's sockets below it may pass 107 bytes"
        yield warning(NAME, reason, "name a shorter place", Command(SHELL, "export RAY_TMPDIR=/tmp"))


def _slow_and_renamed(facts: Facts) -> Iterator[Item]:
    for name, effect in _SLOWS.items():
        if facts.device == "cuda" and _is_on(facts, name):
            yield warning(NAME, f"{name}={facts.environ[name]}: {effect}", "unless it is needed here", unset(name))
    for old, new in _RENAMED.items():
        if old in facts.environ:
            swap = Command(SHELL, f"unset {old}; export {new}={facts.environ[old]}")
            yield warning(NAME, f"{old}: torch reads {new} instead", "", swap)


def _interface(facts: Facts) -> Iterator[Item]:
    """A network interface that NCCL is told to use, and that this machine lacks."""
    name, there = "NCCL_SOCKET_IFNAME", facts.host.interfaces
    wanted = facts.environ.get(name, "")
    prefixes = tuple(part for part in wanted.lstrip("=").split(",") if part)
    if not prefixes or not there or wanted.startswith("^") or any(i.startswith(prefixes) for i in there):
        return
    reason = f"{name}={wanted} names no network interface of this machine ({', '.join(there)})"
    yield (broken if facts.device == "cuda" else warning)(NAME, reason, "", unset(name))


def _is_on(facts: Facts, name: str) -> bool:
    return facts.environ.get(name, "").lower() not in ("", "0", "false")
