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

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True, metavar="|".join(command.name for command in COMMANDS))
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        command.add_options(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options, Console(highlight=False)))
    except VersionsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
