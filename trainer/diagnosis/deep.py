"""--deep: a tiny model through the installed vLLM, in a child process: generate, sleep, wake, new weights, compare."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from trainer.diagnosis.facts import Facts
from trainer.diagnosis.items import Item, broken, ok, warning
from trainer.diagnosis.probes import Child

DEADLINE_S = 600.0
COMMAND = ("-m", "workers.rollout.vllm.selfcheck", "--json")
NOT_RUN = warning("deep", "not run", "first repair what is broken")
_SHOWN = 300


def run(facts: Facts, deadline: float = DEADLINE_S) -> list[Item]:
    """Run the self-check and read what it found. Its working directory is Tandem's."""
    started = time.monotonic()
    child = Child([sys.executable, *COMMAND, "--device", facts.device], started + deadline, directory=facts.root)
    status, output = child.finish()
    return read(status, output, time.monotonic() - started)


def read(status: int | None, output: str, seconds: float) -> list[Item]:
    """Items of the child's last line, {"checks": [{"name", "ok", "detail"}, ...]}, or of its end without one."""
    if status is None:
        reason = f"not finished within {seconds:.0f} s; it last said: {_tail(output)}"
        return [broken("deep", reason, "try again on a quieter machine")]
    checks = _checks(output)
    if checks is None:
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        reason = f"the self-check ended with {how}, without a result: {_tail(output)}"
        return [broken("deep", reason, "read the whole of it: python -m workers.rollout.vllm.selfcheck")]
    return [_item(str(c["name"]), bool(c["ok"]), str(c["detail"])) for c in checks]


def _item(name: str, passed: bool, detail: str) -> Item:
    if passed:
        return ok(f"deep: {name}", detail)
    return broken(f"deep: {name}", detail, "python -m workers.rollout.vllm.selfcheck shows the whole of it")


def _checks(output: str) -> Sequence[dict[str, object]] | None:
    last = output.strip().rpartition("\n")[2]
    try:
        found = json.loads(last)["checks"]
        return found if all({"name", "ok", "detail"} <= set(check) for check in found) else None
    except (ValueError, KeyError, TypeError):
        return None


def _tail(output: str) -> str:
    return " ".join(output.split())[-_SHOWN:] or "nothing"
