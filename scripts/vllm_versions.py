"""Check Tandem against many versions of vLLM:  python scripts/vllm_versions.py matrix|contract|... [VERSION ...]

    python scripts/vllm_versions.py contract          # what the seam assumes, against the sources of every release
    python scripts/vllm_versions.py matrix            # the seam's tests, with CPU builds of other releases
    python scripts/vllm_versions.py own-environment 0.18.1   # the same with an older build, and the PyTorch it needs
    python scripts/vllm_versions.py sources 0.33.0    # only download what `contract` reads
    python scripts/vllm_versions.py arguments         # write the table of engine arguments, from the sources

Everything that is downloaded goes to .cache/vllm and stays there. docs/vllm_versions.md shows the results.

A new subcommand is a module in scripts/versions/ with a `COMMAND`, and a line in COMMANDS.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from subcommands import run_one
from versions import arguments as argument_table
from versions import contract, matrix, own_environment, sources
from versions.command import VersionsError

COMMANDS = (
    sources.COMMAND,
    contract.COMMAND,
    matrix.COMMAND,
    own_environment.COMMAND,
    argument_table.COMMAND,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0 all well, 1 a version failed, 2 nothing could be done."""
    return run_one(COMMANDS, arguments, description=__doc__, error=VersionsError, status=2)


if __name__ == "__main__":
    sys.exit(main())
