"""The command line of `scripts/diagnose.py`: take the picture, run the checks, print, and say by the exit status.

0: training could start; 1: it could not, or a repair failed; 2: the command line is wrong.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.diagnosis import checks, deep, fix, versions
from trainer.diagnosis.adaptation import choices, nearest
from trainer.diagnosis.check_vllm import fault_list
from trainer.diagnosis.facts import Facts
from trainer.diagnosis.gather import ROOT, gather
from trainer.diagnosis.items import PIP
from trainer.diagnosis.report import SCHEMA, Report, as_json, as_text, wants_colour

DEADLINE_S = 4.0
"""Of child processes, from the start, so that the whole stays below 5 s; --deep gives them a minute."""

_PATIENT_S = 60.0


class _Parser(argparse.ArgumentParser):
    """Mistakes are told with the nearest option; as an object where one was asked for."""

    as_object = False

    def error(self, message: str) -> NoReturn:
        """Print the mistake and leave with status 2."""
        words = [word for word in message.split() if word.startswith("--")]
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(words[-1], known, n=1) if words else []
        message += f" (did you mean {near[0]}?)" if near else ""
        if self.as_object:
            print(json.dumps({"schema": SCHEMA, "error": message}))
        else:
            print(f"error: {message}; --help lists the options", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (None: that of this process) and return the exit status."""
    options = _options(argv)
    started = time.monotonic()
    facts = gather(started + (_PATIENT_S if options.deep else DEADLINE_S))
    report = _report(facts, options, started)
    if options.fix and options.yes:
        return _repair(report, facts, options, started)
    _show(report, options)
    return report.status


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="diagnose.py",
        description="Say what is wrong with this installation and machine, and what to type.",
        allow_abbrev=False,
    )
    only_vllm = "only vLLM and what goes with it, and how Tandem adapts to it"
    parser.add_argument("--check-vllm-compatibility", action="store_true", help=only_vllm)
    parser.add_argument("--deep", action="store_true", help="run a tiny model through vLLM too: a minute or two")
    parser.add_argument("--fix", action="store_true", help="print the commands that would repair it; change nothing")
    parser.add_argument("--yes", action="store_true", help="with --fix: run those of them that are pip's")
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs (docs/diagnose.md)")
    parser.as_object = "--json" in (sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(argv)
    if options.yes and not options.fix:
        parser.error("--yes goes with --fix")
    return options


def _report(facts: Facts, options: argparse.Namespace, started: float) -> Report:
    only_vllm = options.check_vllm_compatibility
    items = checks.run(checks.OF_VLLM if only_vllm else checks.ALL, facts)
    if options.deep:
        items += deep.run(facts) if checks.can_start(items) else [deep.NOT_RUN]
    return Report(
        device=facts.device,
        items=items,
        nearest=nearest(facts) if versions.available() else None,
        seconds=time.monotonic() - started,
        adaptation=choices(facts) if only_vllm else (),
        faults=fault_list(facts) if only_vllm else (),
        fixes=fix.commands(items) if options.fix else None,
    )


def _show(report: Report, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(as_json(report), indent=2))
    else:
        print(as_text(report, colour=wants_colour(sys.stdout)), flush=True)


def _repair(report: Report, facts: Facts, options: argparse.Namespace, started: float) -> int:
    """Print what would be done, do pip's part of it, and look again."""
    assert report.fixes is not None
    lines, refusal = report.fixes.get(PIP, []), fix.refusal(facts)
    if not options.json:
        _show(report, options)
    if refusal and lines:
        print(f"error: {refusal}", file=sys.stderr)
    ran = [] if refusal else fix.run_pip(lines, facts)
    failed = bool(refusal and lines) or any(status for _, status in ran)
    if options.json:
        seconds = time.monotonic() - started
        _show(Report(**{**vars(report), "ran": ran, "seconds": seconds}), options)
        return int(failed) if ran or refusal else report.status
    if failed:
        return 1
    return _look_again(options) if ran else report.status


def _look_again(options: argparse.Namespace) -> int:
    """A fresh process, as modules found before the repair are remembered."""
    print("\nLooking again:\n", flush=True)
    command = [sys.executable, str(Path(ROOT) / "scripts" / "diagnose.py")]
    flags = ["--check-vllm-compatibility"] if options.check_vllm_compatibility else []
    return subprocess.run([*command, *flags], check=False).returncode
