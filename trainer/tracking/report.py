"""One HTML file that tells how a run went: no network, no server, safe to send to somebody.

    python -m trainer.tracking.report runs/tandem/quickstart

Made from metrics.jsonl, completions.jsonl, summary.json and config.yaml; whatever is missing is left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from trainer.tracking.curve import learning_curve_svg
from trainer.tracking.figures import figures
from trainer.tracking.run_data import History, read_completions, read_history, read_summary
from trainer.tracking.scales import readable
from trainer.tracking.summary import write_atomically
from trainer.tracking.text import duration, score, shorten, size, visible

__all__ = ["learning_curve_svg", "write_report"]

REPORT_FILE = "report.html"
MAX_TEXT = 4000
"""Characters kept of a prompt or a response."""
MAX_SAMPLE_CHARACTERS = 4_000_000
"""Characters kept of all completions; beyond that, steps are left out evenly."""

_ASSETS = Path(__file__).parent / "assets"


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html`, replacing an earlier one, and return its path.

    Raises ValueError if the directory has no metrics.
    """
    run = read_history(run_dir)
    if not run.series:
        raise ValueError(f"no report for {run_dir}: metrics.jsonl is missing or empty; give the directory of a run")
    summary = read_summary(run_dir)
    samples, note = _samples(run_dir)
    config = run_dir / "config.yaml"
    page = Template((_ASSETS / "report.html").read_text(encoding="utf-8")).substitute(
        name=escape(visible(run_dir.resolve().name)),
        css=(_ASSETS / "report.css").read_text(encoding="utf-8"),
        js=(_ASSETS / "report.js").read_text(encoding="utf-8"),
        command=_command(summary),
        tiles=_tiles(run, summary),
        figures=figures(run),
        samples=_as_script(samples),
        samples_hidden="" if samples else "hidden",
        no_samples_hidden="hidden" if samples else "",
        samples_note=escape(note),
        facts=_facts(summary),
        config=escape(visible(config.read_text(encoding="utf-8"), keep="\n")) if config.exists() else "not kept",
    )
    path = run_dir / REPORT_FILE
    write_atomically(path, page)
    return path


def _tiles(run: History, summary: Mapping[str, Any]) -> str:
    """The headline numbers, from the metrics where summary.json is not there yet."""
    tiles = []
    if run.of("val/accuracy"):
        before, after = run.before("val/accuracy"), run.last("val/accuracy")
        tiles.append(_change("Held-out accuracy", before, after, "before and after training", "wide hero"))
    elif run.of("reward/mean"):
        before, after = run.first("reward/mean"), run.last("reward/mean")
        tiles.append(_change("Training reward", before, after, "first and last step", "wide hero"))
    if run.of("val/greedy_accuracy"):
        before, after = run.before("val/greedy_accuracy"), run.last("val/greedy_accuracy")
        tiles.append(_change("Greedy", before, after, "the likeliest token each time", "wide"))
    tiles.append(
        _tile("Steps", f"{run.last_step:,}", f"in {duration(summary['seconds_total'])}" if summary else "not finished")
    )
    training = [seconds for step, seconds in run.of("time/step") if step > 0]
    if training:
        tiles.append(_tile("Step", f"{readable(median(training))} s", "median"))
    speed = summary["tokens_per_second"] if summary else run.last("perf/tokens_per_second")
    if speed is not None:
        tiles.append(_tile("Tokens", f"{speed:,.0f}", "per second"))
    if summary and summary["peak_memory_bytes"] is not None:
        tiles.append(_tile("Peak memory", size(summary["peak_memory_bytes"]), "most in use"))
    return "".join(tiles)


def _tile(name: str, value: str, note: str, kind: str = "") -> str:
    return f'<div class="card tile {kind}"><dt>{name}</dt><dd>{value}<small>{escape(note)}</small></dd></div>'


def _change(name: str, before: float | None, after: float | None, note: str, kind: str) -> str:
    value = f'<span class="from">{score(before)} &rarr;</span> <span class="to">{score(after)}</span>'
    return _tile(name, value, note, kind)


def _command(summary: Mapping[str, Any]) -> str:
    return f'<pre class="command">$ {escape(visible(str(summary["command"])))}</pre>' if summary else ""


def _facts(summary: Mapping[str, Any]) -> str:
    """Versions, and the times that no chart shows."""
    if not summary:
        return "<div><dd>The run has not ended: there is no summary.json yet.</dd></div>"
    facts = dict(summary["versions"])
    if summary["seconds_to_first_step"] is not None:
        facts["first step after"] = duration(summary["seconds_to_first_step"])
    facts["total"] = duration(summary["seconds_total"])
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())


def _samples(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """Completions for the page, made safe to look at, and a remark if there were too many for all to be there."""
    rows = [_readable_row(row) for row in read_completions(run_dir)]
    sizes: dict[int, int] = {}
    for row in rows:
        sizes[row["step"]] = sizes.get(row["step"], 0) + len(row["prompt"]) + len(row["response"]) + 150
    if sum(sizes.values()) <= MAX_SAMPLE_CHARACTERS:
        return rows, ""
    kept = set(_evenly(sorted(sizes), len(sizes) * MAX_SAMPLE_CHARACTERS // sum(sizes.values())))
    note = f"{len(kept):,} of {len(sizes):,} steps are shown; completions.jsonl has them all."
    return [row for row in rows if row["step"] in kept], note


def _readable_row(row: Mapping[str, Any]) -> dict[str, Any]:
    texts = ("prompt", "response", "ground_truth")
    return {**row, **{key: visible(shorten(str(row[key]), MAX_TEXT), keep="\n") for key in texts}}


def _evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` (and at least two) of the steps, evenly spaced, the first and the last among them."""
    count = min(len(steps), max(2, count))
    return (
        [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)] if count > 1 else list(steps)
    )


def _as_script(rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(rows, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: write the report of a run directory and print its path."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m trainer.tracking.report RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(arguments[0])))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
