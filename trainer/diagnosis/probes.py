"""Child processes that find out what reading cannot: whether compiled code loads, and what nvidia-smi says.

Each is started at once and asked for its answer at the end, so that it runs beside the other checks. One that has not
answered by its deadline is killed and counts as late.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trainer.diagnosis.facts import Extension, Gpu, Gpus, Torch, Vllm

_LOADER = Path(__file__).with_name("load_libraries.py")
_MIB = 1 << 20


class Child:
    """One command under way, with what it writes kept in a file: a full pipe cannot stop it."""

    def __init__(self, command: Sequence[str], end: float, directory: str | None = None) -> None:
        """end: on the monotonic clock. directory: to run in."""
        self._end = end
        self._output: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def finish(self) -> tuple[int | None, str]:
        """(exit status, output); the status is None where it was too late."""
        try:
            status: int | None = self._process.wait(max(0.01, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # with what it started itself
            self._process.wait()
            status = None
        with self._output:
            self._output.seek(0)
            return status, self._output.read()


@dataclass
class ExtensionProbe:
    """The child that loads vLLM's compiled libraries. end: on the monotonic clock."""

    command: tuple[str, ...]
    child: Child | None
    started: float
    end: float

    @classmethod
    def start(cls, vllm: Vllm, torch: Torch | None, end: float) -> ExtensionProbe:
        """Started only where there are both a torch and a vLLM; flash-attn's library is looked at with them."""
        if torch is None or vllm.root is None or vllm.hollow:
            return cls((), None, 0.0, end)
        command = (sys.executable, str(_LOADER), str(vllm.root))
        return cls(command, Child(command, end), time.monotonic(), end)

    def finish(self) -> Extension:
        """What it found. A child that crashed is tried again with the whole of torch, before torch is blamed."""
        if self.child is None:
            return Extension()
        status, output = self.child.finish()
        if status is not None and status < 0:
            status, output = Child((*self.command, "--whole-torch"), self.end).finish()
        seconds = time.monotonic() - self.started
        return Extension("late", seconds) if status is None else read_extension(status, output, seconds)


def read_extension(status: int, output: str, seconds: float) -> Extension:
    """The child's last line, or what its end without one means."""
    last = output.strip().rpartition("\n")[2]
    try:
        told: dict[str, Any] = json.loads(last)
    except ValueError:
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return Extension("failed", seconds, torch_error=f"the loading process ended with {how}: {last[:200]}")
    failed = told["torch_error"] or told["errors"] or told["missing"] or not told["operators"]
    return Extension(
        state="failed" if failed else "loaded",
        seconds=seconds,
        torch_error=told["torch_error"],
        errors=told["errors"],
        operators=told["operators"],
        missing=tuple(told["missing"]),
        flash_attn=told["flash_attn"],
    )


@dataclass
class GpuProbe:
    """nvidia-smi, asked four things at once."""

    children: dict[str, Child]

    @classmethod
    def start(cls, end: float) -> GpuProbe:
        """Nothing is started where the driver's tools are not installed."""
        tool = shutil.which("nvidia-smi")
        if tool is None:
            return cls({})
        gpus = "--query-gpu=index,name,memory.total,memory.free,driver_version"
        users = "--query-compute-apps=process_name,pid,used_memory"
        plain = "--format=csv,noheader,nounits"
        questions = {"gpus": [gpus, plain], "users": [users, plain], "header": [], "links": ["topo", "-m"]}
        return cls({name: Child([tool, *arguments], end) for name, arguments in questions.items()})

    def finish(self) -> Gpus:
        """What it said."""
        if not self.children:
            return Gpus()
        answers = {name: child.finish() for name, child in self.children.items()}
        if answers["gpus"][0] is None:
            return Gpus("late")
        return read_gpus({name: output if status == 0 else "" for name, (status, output) in answers.items()}, answers)


def read_gpus(told: dict[str, str], raw: dict[str, tuple[int | None, str]]) -> Gpus:
    """nvidia-smi's answers. told: output of the questions that succeeded; raw: (status, output) of all."""
    header = re.search(r"CUDA Version: *([\d.]+)", told.get("header", ""))
    rows = [[cell.strip() for cell in line.split(",")] for line in told.get("gpus", "").splitlines()]
    rows = [row for row in rows if len(row) == 5 and row[0].isdigit()]
    if not rows:
        said = " ".join(raw["gpus"][1].split())[:200]
        none = "no devices" in said.lower()
        return Gpus("none" if none else "failed", said)
    return Gpus(
        state="found",
        driver=rows[0][4],
        cuda=header.group(1) if header else "",
        devices=tuple(Gpu(int(r[0]), r[1], _mib(r[2]), _mib(r[3])) for r in rows),
        users=tuple(_users(told.get("users", ""))),
        links=_links(told.get("links", "")),
    )


def _users(text: str) -> list[str]:
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in text.splitlines()]
    return [f"{Path(r[0]).name} (pid {r[1]}): {_mib(r[2]) / 2**30:.1f} GiB" for r in rows if len(r) == 3]


def _links(text: str) -> dict[str, int]:
    """How often each kind of link joins two GPUs in `nvidia-smi topo -m`: NV18, PIX, SYS, ..."""
    table = re.sub(r"\x1b\[[0-9;]*m", "", text)
    rows = [line.split() for line in table.splitlines() if re.match(r"GPU\d+\s", line)]
    found: dict[str, int] = {}
    for place, row in enumerate(rows):
        for link in row[place + 2 : len(rows) + 1]:  # right of the diagonal
            found[link] = found.get(link, 0) + 1
    return found


def _mib(text: str) -> int:
    return int(text) * _MIB if text.isdigit() else 0
