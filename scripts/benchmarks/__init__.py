"""Parts of scripts/benchmark.py: floors, statistics of a run directory, starting runs, and the subcommands."""
