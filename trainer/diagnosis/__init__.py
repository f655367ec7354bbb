"""Diagnosis: what is wrong with an installation or a machine, and what to type. `python scripts/diagnose.py`.

One picture is taken (`gather.py`: versions, files, environment, machine; children in parallel), pure checks turn it
into items with a verdict (`check_*.py`), `report.py` prints them. Standard library only, and a copy of `packaging`
wherever one is found: it is run where nothing works. What goes with which vLLM is data: `compatibility.json`.
"""

from __future__ import annotations

from trainer.diagnosis.items import BROKEN, OK, WARNING, Command, Item

__all__ = ["BROKEN", "OK", "WARNING", "Command", "Item", "startup_items"]


def startup_items(device: str) -> list[Item]:
    """What makes a run impossible, or is worth a warning before it starts; the same words as diagnose.

    device: "cpu" or "cuda", what the run will use. Takes 0.2 s: no child process is started.
    """
    from trainer.diagnosis import checks
    from trainer.diagnosis.gather import gather_at_start

    return checks.run(checks.AT_START, gather_at_start(device))
