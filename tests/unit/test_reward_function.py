"""Loading reward functions, the built-in scorers, and what counts as a reward."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workers.reward.child import interpret
from workers.reward.function import RewardSpec, load_reward_function
from workers.reward.scorers import compute_score, exact_match, gsm8k

GOOD = "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 7\n"


def write(tmp_path: Path, text: str, name: str = "my_reward.py") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def call(function: Any) -> Any:
    return function(data_source="s", solution_str="x", ground_truth="x", extra_info={})


def test_from_a_file_with_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "VALUE = 3\n", "neighbour_of_reward.py")
    path = write(tmp_path, "import neighbour_of_reward as n\ndef mine(**kwargs):\n    return n.VALUE\n")
    for spelling in (path, f"file://{path}"):
        assert call(load_reward_function(RewardSpec(spelling, "mine"))) == 3


def test_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD, "module_with_reward.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert call(load_reward_function(RewardSpec("module_with_reward"))) == 7
    assert call(load_reward_function(RewardSpec("pkg://module_with_reward"))) == 7


def test_none_is_the_built_in_scorers() -> None:
    assert call(load_reward_function(RewardSpec(None))) == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_to_be_found\n", r"path=.*my_reward\.py cannot be imported: ModuleNotFoundError: .*nowhere"),
        ("def compute_score(:\n", r"cannot be imported: SyntaxError"),
        ("raise SystemExit(2)\n", r"cannot be imported: SystemExit: 2"),
        ("def score(): ...\ndef _hidden(): ...\n", r"name=compute_score does not exist .*; functions there: score$"),
        ("compute_score = 3\n", r"name=compute_score is not a function .*; functions there: none$"),
        ("def compute_score(text, truth): ...\n", r"keyword arguments data_source, solution_str, ground_truth, extra_"),
        ("async def compute_score(**kwargs): ...\n", r"is asynchronous"),
    ],
)
def test_what_cannot_be_used_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"reward\.custom_reward_function\." + ".*" + message):
        load_reward_function(RewardSpec(write(tmp_path, text)))


def test_missing_file_and_module() -> None:
    with pytest.raises(ValueError, match=r"reward\.custom_reward_function\.path=nowhere/r\.py: there is no such file"):
        load_reward_function(RewardSpec("nowhere/r.py"))
    with pytest.raises(ValueError, match=r"path=nowhere\.at\.all cannot be imported: ModuleNotFoundError"):
        load_reward_function(RewardSpec("nowhere.at.all"))


def test_a_failed_import_leaves_no_module_behind(tmp_path: Path) -> None:
    path = write(tmp_path, "raise RuntimeError\n", "half_loaded.py")
    with pytest.raises(ValueError, match="RuntimeError"):
        load_reward_function(RewardSpec(path))
    assert "tandem_reward_half_loaded" not in sys.modules


def test_spec_travels_and_resolves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RewardSpec("r.py", "f").resolved() == RewardSpec(str(tmp_path / "r.py"), "f")
    for spec in (RewardSpec("a.module", "f"), RewardSpec(None)):
        assert pickle.loads(pickle.dumps(spec)) == spec == spec.resolved()


@pytest.mark.parametrize(
    ("text", "truth", "score"),
    [
        ("It is #### 72", "72", 1.0),
        ("#### 71 no, #### 72", "72", 1.0),
        ("#### 72 no, #### 71", "72", 0.0),
        ("#### 1,234", "1234", 1.0),
        ("#### -5", "-5", 1.0),
        ("72", "72", 0.0),
        ("####72", "72", 0.0),
        ("#### 72" + " " * 300, "72", 0.0),
        ("#### 72" + " " * 293, "72", 1.0),
    ],
)
def test_gsm8k(text: str, truth: str, score: float) -> None:
    assert gsm8k(text, truth) == score
    assert compute_score("openai/gsm8k", text, truth, {}) == score


def test_exact_match_is_the_rule_for_every_other_source() -> None:
    assert exact_match(" 57\n", "57") == 1.0 and exact_match("057", "57") == 0.0
    assert compute_score("addition", "57", 57, {}) == 1.0
    with pytest.raises(ValueError, match=r"no ground truth; set data\.answer_key"):
        compute_score("addition", "57", None, {})


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.int64(1), np.array(1.0), {"score": 1, "text": "x"}])
def test_rewards(value: Any) -> None:
    assert interpret(value) == (1.0, {}, "")


def test_parts_are_the_other_finite_numbers() -> None:
    value = {"score": 0.5, "format": True, "length": 3, "pred": "57", "bad": math.nan, 7: 1}
    assert interpret(value) == (0.5, {"format": 1.0, "length": 3.0, "7": 1.0}, "")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, "returned None (NoneType), not a number"),
        ("1.0", "returned '1.0' (str), not a number"),
        (b"1", "returned b'1' (bytes), not a number"),
        ([1.0], "returned [1.0] (list), not a number"),
        (1j, "returned 1j (complex), not a number"),
        ("x" * 100, f"returned '{'x' * 56}... (str), not a number"),
        (math.nan, "returned nan"),
        (-math.inf, "returned -inf"),
        (10**400, "returned inf"),
        (-1e39, "returned -1e+39"),
        ({"acc": 1}, 'returned a dictionary without "score" (keys: acc)'),
        ({"score": math.nan, "acc": 1}, "returned score nan"),
        ({"score": "1"}, "returned score '1' (str), not a number"),
    ],
)
def test_everything_else_is_an_error(value: Any, error: str) -> None:
    assert interpret(value) == (0.0, {}, error)
