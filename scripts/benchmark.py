"""Measure Tandem:  python scripts/benchmark.py quickstart [--check] [--steps 40] [--repeat 3] [--ranks 1] [--set k=v]

    python scripts/benchmark.py quickstart --check          # seconds per step, where they go, start-up: 1-2 minutes
    python scripts/benchmark.py rollout --check             # generation against a bare LLM.generate: 1 minute
    python scripts/benchmark.py logprobs --check            # memory of log-probs over a large vocabulary: 1 minute
    python scripts/benchmark.py w1                          # real scale on one GPU; w1 --help tells its parts
    python scripts/benchmark.py memory                      # predicted memory of a GPU against what runs measure
    python scripts/benchmark.py quickstart-seeds --svg docs/images/learning_curve.svg    # three seeds
    python scripts/benchmark.py algorithms --estimators all --svg docs/images/estimators.svg        # 39 runs

Run it from the installed environment, on a machine with nothing else to do. Each subcommand starts the program as a
user would, in a fresh run directory, reads what the run wrote, and writes JSON (--out); --check ends with status 1
where a floor (scripts/benchmarks/floors.py) is missed. docs/benchmarks.md shows the results.

A new subcommand is a module in scripts/benchmarks/ with a `COMMAND`, and a line in COMMANDS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

os.environ["KINETO_LOG_LEVEL"] = "99"  # read when PyTorch is imported: its profiler counts memory here, quietly

from benchmarks import algorithms, logprobs, memory, quickstart, rollout, seeds, w1
from benchmarks.launch import RunFailed
from subcommands import run_one

COMMANDS = (
    quickstart.COMMAND,
    seeds.COMMAND,
    algorithms.COMMAND,
    rollout.COMMAND,
    logprobs.COMMAND,
    w1.COMMAND,
    memory.COMMAND,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 done, 1 a run failed or, with --check, a floor was missed."""
    return run_one(COMMANDS, arguments, description=__doc__, error=RunFailed, status=1)


if __name__ == "__main__":
    sys.exit(main())
