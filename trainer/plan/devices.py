"""What kind of devices a run would have, and how much memory each: asked of this machine, of Ray, or told.

A plan for GPUs that are not here needs to be told what they are. That is a fact about another machine and not a setting
of the run, so it is an environment variable and no key, which would be saved with the run and be wrong elsewhere:

    TANDEM_GPU=H100 python -m trainer.main ... trainer.dry_run=true      a name of KNOWN_GIB
    TANDEM_GPU=80GiB python -m trainer.main ... trainer.dry_run=true     or just the size
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config.errors import UserError
from trainer.config.schema import Config
from trainer.placement import DeviceType

VARIABLE = "TANDEM_GPU"
_GIB = 1 << 30
_ACCELERATOR = "accelerator_type:"
"""How Ray names the resource that says what a node's GPUs are."""

KNOWN_GIB = {
    "B200": 178.4,
    "H200": 139.8,
    "H100": 79.1,
    "H100-NVL": 93.1,
    "H800": 79.1,
    "H20": 95.1,
    "A100": 79.1,
    "A100-80G": 79.1,
    "A100-40G": 39.4,
    "A800": 79.1,
    "L40S": 44.4,
    "L40": 44.4,
    "A40": 44.4,
    "A6000": 47.4,
    "L4": 22.0,
    "A10G": 22.0,
    "A10": 22.0,
    "RTX4090": 23.5,
    "V100": 31.7,
    "V100-16G": 15.8,
    "T4": 14.6,
}
"""GiB that CUDA gives out on a GPU of that name. A name alone means the larger of two that share it."""


@dataclass(frozen=True, slots=True)
class Devices:
    """kind: of the run's devices. total_bytes: of the smallest GPU's memory; None: not known, or a CPU.

    told_by: where that comes from, for people.
    """

    kind: DeviceType
    total_bytes: int | None
    told_by: str


def planned_devices(cfg: Config, environ: Mapping[str, str]) -> Devices:
    """Of a plan without a cluster: what TANDEM_GPU says, else what is here.

    Raises UserError for a TANDEM_GPU that names no GPU.
    """
    if cfg.trainer.device == "cpu":
        return Devices("cpu", None, "trainer.device=cpu")
    told = environ.get(VARIABLE, "").strip()
    if told:
        return Devices("cuda", parse_gpu(told), f"{VARIABLE}={told}")
    here = local_gpu_bytes()
    if here is not None:
        return Devices("cuda", here, "this machine's GPUs")
    if cfg.trainer.device == "cuda":
        return Devices("cuda", None, f"no GPU here; {VARIABLE}=H100 or {VARIABLE}=80GiB would tell its memory")
    return Devices("cpu", None, f"no GPU here; trainer.device=cuda and {VARIABLE}=H100 plan for GPUs")


def real_devices(kind: DeviceType, nodes: Iterable[Mapping[str, Any]], environ: Mapping[str, str]) -> Devices:
    """Of a run on a cluster. nodes: as Ray lists them. What is not known here or by Ray may be told."""
    if kind == "cpu":
        return Devices("cpu", None, "CPUs")
    here = local_gpu_bytes()
    if here is not None:
        return Devices("cuda", here, "this machine's GPUs")
    sizes = [size for node in nodes if (size := _known_to_ray(node)) is not None]
    if sizes:
        return Devices("cuda", min(sizes), "the types of GPU that Ray names")
    told = environ.get(VARIABLE, "").strip()
    if told:
        return Devices("cuda", parse_gpu(told), f"{VARIABLE}={told}")
    return Devices("cuda", None, f"not known; {VARIABLE}=80GiB would tell")


def parse_gpu(told: str) -> int:
    """Bytes of a GPU named as in KNOWN_GIB, or given as a size: 80, 80GB, 79.1GiB (in GiB, all of them).

    Raises UserError for anything else.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GiB|GB|G)?", told, flags=re.IGNORECASE)
    if size and float(size.group(1)) > 0:
        return int(float(size.group(1)) * _GIB)
    names = {_plain(name): gib for name, gib in KNOWN_GIB.items()}
    if _plain(told) in names:
        return int(names[_plain(told)] * _GIB)
    raise UserError(f"{VARIABLE}={told}: no such GPU; name one of {', '.join(KNOWN_GIB)}, or its memory, e.g. 80GiB")


def local_gpu_bytes() -> int | None:
    """Memory of this machine's smallest GPU; None where nvidia-smi is missing or finds none.

    The driver of a run must not open a CUDA context itself: that would take memory of the GPU.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (subprocess.TimeoutExpired, OSError):
        return None
    sizes = [int(line) << 20 for line in done.stdout.split() if line.isdigit()] if done.returncode == 0 else []
    return min(sizes, default=None)


def _known_to_ray(node: Mapping[str, Any]) -> int | None:
    names = [name[len(_ACCELERATOR) :] for name in node["Resources"] if name.startswith(_ACCELERATOR)]
    known = {_plain(name): gib for name, gib in KNOWN_GIB.items()}
    return next((int(known[_plain(name)] * _GIB) for name in names if _plain(name) in known), None)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper().removeprefix("NVIDIA"))
