"""Weights & Biases. Works without an account: the run is then kept offline, for `wandb sync` later."""

from __future__ import annotations

import hashlib
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from trainer.tracking.records import CompletionRow, Metrics, json_number

_COLUMNS = ("phase", "prompt", "response", "reward", "advantage", "finish_reason", "ground_truth")


class WandbSink:
    """Logs to one wandb run per run directory; a resumed run continues it under the same id.

    WANDB_MODE is respected. Without it and without an API key the mode is offline, which `notice` is told once.
    Raises ValueError if the package is not installed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Any],
        notice: Callable[[str], None],
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "trainer.logger has wandb, which is not installed: pip install wandb, or remove it there"
            ) from error
        mode = choose_mode()
        if mode == "offline" and "WANDB_MODE" not in os.environ:
            notice(
                f"wandb: no API key found, keeping the run offline (later: wandb sync {run_dir}/wandb/offline-run-*)"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        self._table = wandb.Table
        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(run_dir),
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Our own step as the x axis: wandb's counter must never go back, and a resumed run repeats steps.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        """All metrics of the step; those that are not finite are left out."""
        finite = {name: number for name, value in metrics.items() if (number := json_number(value)) is not None}
        self._run.log({"step": step, **finite})

    def completions(self, step: int, rows: Sequence[CompletionRow]) -> None:
        """A wandb table `completions/<phase>` for each phase among the rows."""
        for phase in sorted({row.phase for row in rows}):
            records = [row.as_json(step) for row in rows if row.phase == phase]
            table = self._table(columns=list(_COLUMNS), data=[[record[key] for key in _COLUMNS] for record in records])
            self._run.log({"step": step, f"completions/{phase}": table})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Put the numbers of summary.json into wandb's summary and close the run."""
        for key, value in summary.items():
            if not isinstance(value, Mapping):
                self._run.summary[f"final/{key}"] = value
        self._run.finish()


def choose_mode() -> str | None:
    """ "offline" where wandb would ask for an API key, else None: wandb decides (WANDB_MODE, a key, a login)."""
    if "WANDB_MODE" in os.environ:
        return None
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    return None if _has_netrc_entry() else "offline"


def _has_netrc_entry() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
