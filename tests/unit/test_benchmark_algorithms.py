"""Learning curves of algorithms side by side: what is run, what is kept of it, and the picture. Nothing is trained."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from argparse import ArgumentParser
from pathlib import Path

import pytest
from rich.console import Console

from scripts.benchmarks import algorithms, launch
from trainer.algorithms.estimators.catalog import ESTIMATORS
from trainer.algorithms.policy.build import OBJECTIVES
from trainer.config.load import load_config
from trainer.config.validate import validate
from trainer.tracking.run_data import History

ACCURACY = {1: [0.3, 0.6, 0.9], 2: [0.3, 0.8, 0.96], 3: [0.36, 0.7, 0.9]}
"""Of each seed, after 0, 5 and 10 steps."""


class Launches:
    """Stands for launch.run: a run of each seed goes as above."""

    def __init__(self) -> None:
        self.overrides: dict[str, list[str]] = {}

    def __call__(self, console: Console, name: str, overrides: list[str], *, recipe: str) -> launch.Finished:
        self.overrides[name] = overrides
        values = ACCURACY[int(name[-1])]
        history = History({algorithms.METRIC: list(zip((0, 5, 10), values, strict=True))})
        return launch.Finished(f"run {name}", Path(), history, {"seconds_total": 50.0, "versions": {}}, 0.1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    stand_in = Launches()
    monkeypatch.setattr(launch, "run", stand_in)
    return stand_in


def call(*arguments: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    parser = ArgumentParser()
    algorithms.add_options(parser)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    return algorithms.run(parser.parse_args(arguments), console), console.export_text()


def test_curves_are_kept_drawn_and_gone_on_with(launches: Launches, tmp_path: Path) -> None:
    out, svg = tmp_path / "out.json", tmp_path / "curves.svg"
    common = ["--out", str(out), "--svg", str(svg), "--steps", "10"]
    status, text = call("--estimators", "rloo,gdpo", "--set", "a.b=c", *common)
    assert status == 0 and "92.0%" in text and "90.0% to 96.0%" in text
    assert sorted(launches.overrides) == [f"algorithms-{e}-seed{s}" for e in ("gdpo", "rloo") for s in (1, 2, 3)]
    assert {"algorithm.adv_estimator=rloo", "data.seed=2", "a.b=c"} <= set(launches.overrides["algorithms-rloo-seed2"])
    curve = json.loads(out.read_text())["curves"]["gdpo"]
    assert (curve["at"], curve["low"], curve["high"]) == ([0, 5, 10], [0.3, 0.6, 0.9], [0.36, 0.8, 0.96])
    assert curve["mean"] == pytest.approx([0.32, 0.7, 0.92]) and curve["gain"] == pytest.approx(0.6)
    drawn = svg.read_text()
    assert ET.fromstring(drawn) is not None and drawn.count('class="band"') == 2
    assert drawn.count('class="other"') == 1, "the first is what the second is compared with"
    launches.overrides.clear()
    call("--estimators", "rloo,grpo", "--resume", *common)
    assert {name.split("-")[1] for name in launches.overrides} == {"grpo"}
    assert set(json.loads(out.read_text())["curves"]) == {"rloo", "gdpo", "grpo"}
    with pytest.raises(launch.RunFailed, match="other steps or seeds"):
        call("--estimators", "rloo", "--resume", *common, "--seeds", "2")


def test_what_does_not_learn_is_told(launches: Launches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACCURACY, 1, [0.3, 0.3, 0.31])
    monkeypatch.setattr(algorithms.floors, "ALGORITHMS", (algorithms.floors.Floor("gain", at_least=0.1, min_steps=10),))
    arguments = ["--losses", "ppo", "--seeds", "1", "--steps", "10", "--out", str(tmp_path / "out.json")]
    assert call(*arguments)[0] == 0
    status, text = call(*arguments, "--check")
    assert status == 1 and "ppo: gain = 0.01" in text


@pytest.mark.parametrize(("estimators", "losses"), [("", ""), ("grpo", "ppo"), ("grpo,greedy", ""), ("", "hinge")])
def test_what_cannot_be_compared(estimators: str, losses: str) -> None:
    with pytest.raises(launch.RunFailed):
        algorithms.chosen(estimators, losses)


@pytest.mark.parametrize(
    ("estimators", "losses", "names"), [("all", "", ESTIMATORS), ("", "all", OBJECTIVES)], ids=["estimators", "losses"]
)
def test_all_of_a_kind_can_be_run(estimators: str, losses: str, names: list[str], task: Path) -> None:
    wanted = algorithms.chosen(estimators, losses)
    assert sorted(wanted) == sorted(names)
    assert next(iter(wanted)) in ("grpo", "ppo")
    for overrides in wanted.values():
        validate(load_config([*algorithms.BASE, *overrides], "quickstart"))
