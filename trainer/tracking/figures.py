"""The figures of the report: which metrics stand together, under which title, in which colour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape

from trainer.tracking.charts import Series, describe, line_chart, off_scale, stacked_chart, step_totals
from trainer.tracking.progress import PHASES
from trainer.tracking.run_data import History
from trainer.tracking.scales import readable

_NARROW, _WIDE, _SLIM = (400, 190), (1140, 300), (400, 230)


@dataclass(frozen=True)
class Figure:
    """A card with lines. lines: metric and its name in the legend; those that a run lacks are left out."""

    title: str
    note: str
    lines: tuple[tuple[str, str], ...]
    wide: bool = False


FIGURES = (
    Figure(
        "Learning curve",
        "",
        (
            ("reward/mean", "training reward"),
            ("val/accuracy", "held-out accuracy"),
            ("val/greedy_accuracy", "held-out, greedy"),
        ),
        wide=True,
    ),
    Figure(
        "KL divergence",
        "nats per token",
        (("actor/ppo_kl", "PPO"), ("actor/kl_loss", "reference (loss)"), ("kl/reward_kl", "reference (reward)")),
    ),
    Figure("Entropy", "of the policy, nats per token", (("actor/entropy", "entropy"),)),
    Figure(
        "Sampler-trainer mismatch",
        "mean difference of token log-probabilities",
        (("mismatch/logprob_abs_diff_mean", "difference"),),
    ),
    Figure("Response length", "tokens", (("response_length/mean", "mean"), ("response_length/max", "max"))),
    Figure("Gradient norm", "before clipping", (("actor/grad_norm", "policy"), ("critic/grad_norm", "critic"))),
    Figure(
        "Groups that teach nothing",
        "share of prompts whose responses all tie",
        (("reward/frac_zero_std_groups", "share"),),
    ),
    Figure("Value loss", "of the critic", (("critic/value_loss", "loss"),)),
    Figure("Explained variance", "of the returns, by the critic", (("critic/explained_variance", "share"),)),
)
FILLERS = (
    Figure(
        "Rollout engines",
        "sequences of the fullest replica",
        (("rollout/running_max", "running"), ("rollout/waiting_max", "waiting")),
    ),
    Figure("Throughput", "tokens per second", (("perf/tokens_per_second", "tokens/s"),)),
    Figure(
        "Memory",
        "most in use on a device, bytes",
        (
            ("memory/generate_peak_bytes", "generate"),
            ("memory/update_peak_bytes", "update"),
            ("memory/sync_peak_bytes", "sync"),
        ),
    ),
    Figure("Clipped", "share of tokens outside the PPO range", (("actor/clip_frac", "share"),)),
)
"""Worth a look, shown where a row would have a gap."""
_ROW = 3
_COLORS = ("var(--c1)", "var(--c2)", "var(--c3)")


def figures(run: History) -> str:
    """HTML of all figures the run has numbers for."""
    x_range = _steps(run)
    drawn = [_lines(figure, run, x_range, key=f"f{index}") for index, figure in enumerate(FIGURES)]
    errors = _lines(_ERRORS, run, x_range, key="errors") if any(run.values("reward/error_rate")) else ""
    cards = [card for card in [*drawn[1:], errors] if card]
    spare = [_lines(figure, run, x_range, key=f"s{index}") for index, figure in enumerate(FILLERS)]
    gap = -len(cards) % _ROW
    return "".join([drawn[0], *cards, *[card for card in spare if card][:gap], _phase_times(run)])


_ERRORS = Figure("Reward errors", "share of responses whose reward function failed", (("reward/error_rate", "failed"),))


def _steps(run: History) -> tuple[float, float]:
    first = min(points[0][0] for points in run.series.values() if points)
    return float(first), float(max(first, run.last_step))


def _lines(figure: Figure, run: History, x_range: tuple[float, float], *, key: str) -> str:
    series = [
        Series(name, [(float(step), value) for step, value in run.of(metric)], color, dots=metric.startswith("val/"))
        for (metric, name), color in zip(figure.lines, _COLORS, strict=False)
        if run.of(metric)
    ]
    if not series:
        return ""
    label = f"{figure.title}. " + "; ".join(describe(one) for one in series)
    draw = partial(line_chart, series, label=label, x_range=x_range)
    legend = [(one.name if len(series) > 1 else "last", one.color, readable(one.points[-1][1])) for one in series]
    note = _join(figure.note, off_scale([value for one in series for _, value in one.points]))
    if figure.wide:
        return _card(figure.title, note, legend, _two_widths(draw, key), kind="wide")
    return _card(figure.title, note, legend, draw(key=key, width=_NARROW[0], height=_NARROW[1]), kind="")


def _phase_times(run: History) -> str:
    columns = {name: [(float(step), value) for step, value in run.of(f"time/{name}") if step > 0] for name in PHASES}
    series = [Series(name, points, f"var(--{name})") for name, points in columns.items() if points]
    if not series:
        return ""
    totals = [sum(seconds for _, seconds in one.points) for one in series]
    shares = [f"{100 * total / (sum(totals) or 1.0):.0f} %" for total in totals]
    steps = [step for one in series for step, _ in one.points]
    label = "Seconds of a step by phase. " + ", ".join(
        f"{one.name} {share}" for one, share in zip(series, shares, strict=True)
    )
    note = _join("seconds of each step; share of all steps", off_scale(step_totals(series), zero=True))
    draw = partial(stacked_chart, series, label=label, x_range=(min(steps) - 0.5, max(steps) + 0.5))
    legend = [(one.name, one.color, share) for one, share in zip(series, shares, strict=True)]
    return _card("Where the time goes", note, legend, _two_widths(draw, "phases"), kind="wide stacked")


def _two_widths(draw: Callable[..., str], key: str) -> str:
    """A wide chart, and the same drawn for a telephone; the style sheet shows one of them."""
    broad = draw(key=key, width=_WIDE[0], height=_WIDE[1])
    slim = draw(key=f"{key}slim", width=_SLIM[0], height=_SLIM[1])
    return f'<div class="broad">{broad}</div><div class="slim">{slim}</div>'


def _join(*remarks: str) -> str:
    return "; ".join(remark for remark in remarks if remark)


def _card(title: str, note: str, legend: Sequence[tuple[str, str, str]], chart: str, *, kind: str) -> str:
    entries = "".join(
        f'<span><i style="background:{color}"></i>{escape(name)} <b>{value}</b></span>' for name, color, value in legend
    )
    remark = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="card figure {kind}"><div class="head"><h3>{escape(title)}</h3>'
        f'<div class="legend">{entries}</div></div>{remark}{chart}</figure>'
    )
