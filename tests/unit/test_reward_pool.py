"""The reward pool with real processes and reward functions that misbehave in every way we could think of."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from workers.protocol import Scores
from workers.reward import pool as pool_module
from workers.reward.function import RewardSpec
from workers.reward.pool import RewardPool, summarise_errors

TIMEOUT = 0.3

MISBEHAVING = """
import ctypes, math, os, re, signal, subprocess, sys, threading, time

def compute_score(data_source, solution_str, ground_truth, extra_info):
    return globals()[data_source](solution_str)

def good(text): return float(text)
def slow(text): time.sleep(0.05); return float(text)
def parts(text): return {"score": float(text), "half": float(text) / 2, "text": text}
def loops(text):
    while True: pass
def sleeps(text): time.sleep(1e6)
def swallows(text):
    while True:
        try: time.sleep(1e6)
        except BaseException: pass
def hangs_in_c(text):
    mutex, c = ctypes.create_string_buffer(64), ctypes.PyDLL(None)  # PyDLL keeps the GIL
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)  # a deadlock: no signal ends it, so no Python handler ever runs
def matches(text): re.match(r"(a+)+$", "a" * 40 + "b")
def steals_alarm(text):
    signal.signal(signal.SIGALRM, signal.SIG_IGN); signal.alarm(0); return float(text)
def raises(text): raise RuntimeError("broken " + text)
def raises_badly(text):
    class Bad(Exception):
        def __str__(self): raise ValueError
    raise Bad
def exits(text): sys.exit(3)
def dies(text): os._exit(3)
def segfaults(text): ctypes.string_at(0)
def killed(text): os.kill(os.getpid(), signal.SIGKILL)
def nothing(text): return None
def nan(text): return math.nan
def prints(text): print("x" * 100000, file=sys.stderr); os.write(1, b"noise"); return float(text)
def interrupts(text): raise KeyboardInterrupt
def pid(text): return os.getpid()
def starts(text):
    child = subprocess.Popen(["sleep", "1000"]); open(text, "w").write(str(child.pid)); hangs_in_c(text)
def die_later(text):
    threading.Thread(target=lambda: (time.sleep(0.05), os._exit(4))).start(); return 1
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RewardSpec:
    path = tmp_path_factory.mktemp("reward") / "misbehaving.py"
    path.write_text(MISBEHAVING)
    return RewardSpec(str(path))


@pytest.fixture(scope="module")
def pool(spec: RewardSpec) -> Iterator[RewardPool]:
    with RewardPool(spec, num_workers=2, timeout_s=TIMEOUT) as pool:
        yield pool


def run(pool: RewardPool, *kinds: str) -> Scores:
    """Score one sample per kind; sample i has the text i, which well-behaved kinds return."""
    return pool.score([(kind, str(i), None, {}) for i, kind in enumerate(kinds)])


def test_rewards_come_back_in_order_from_persistent_processes(pool: RewardPool) -> None:
    before = pool.pids()
    scores = run(pool, *["good"] * 300)
    assert scores.rewards.dtype == np.float32 and scores.rewards.tolist() == list(range(300))
    assert set(scores.errors) == {""} and scores.parts == {}
    assert set(run(pool, *["pid"] * 50).rewards) <= set(map(float, before)) and pool.pids() == before
    assert len(run(pool).rewards) == 0


def test_parts_are_nan_where_not_returned(pool: RewardPool) -> None:
    scores = run(pool, "good", "parts", "raises")
    assert list(scores.parts) == ["half"] and scores.parts["half"].dtype == np.float32
    np.testing.assert_array_equal(scores.parts["half"], np.float32([np.nan, 0.5, np.nan]))


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("loops", "timed out after 0.3 s"),
        ("sleeps", "timed out after 0.3 s"),
        ("matches", "timed out after 0.3 s"),
        ("swallows", "timed out after 0.3 s and had to be killed"),
        ("hangs_in_c", "timed out after 0.3 s and had to be killed"),
        ("raises", "raised RuntimeError: broken 2 (misbehaving.py)"),
        ("raises_badly", "raised Bad (misbehaving.py)"),
        ("exits", "raised SystemExit: 3 (misbehaving.py)"),
        ("interrupts", "raised KeyboardInterrupt (misbehaving.py)"),
        ("dies", "ended its process (exit code 3)"),
        ("segfaults", "crashed its process (Segmentation fault)"),
        ("killed", "crashed its process (Killed)"),
        ("nothing", "returned None (NoneType), not a number"),
        ("nan", "returned nan"),
    ],
)
def test_a_failure_is_the_error_of_one_sample(pool: RewardPool, kind: str, error: str) -> None:
    started = time.monotonic()
    scores = run(pool, "good", "good", kind, "good", "good")
    assert re.sub(r"py:\d+", "py", scores.errors[2]) == error
    assert [e == "" for e in scores.errors] == [True, True, False, True, True]
    assert scores.rewards.tolist() == [0, 1, 0, 3, 4]
    assert time.monotonic() - started < TIMEOUT + pool_module.GRACE_S + 3.0


def test_many_failures_in_one_chunk(spec: RewardSpec) -> None:
    kinds = ["good", "dies", "dies", "good", "hangs_in_c", "raises", "killed", "good"] * 2
    with RewardPool(spec, num_workers=1, timeout_s=TIMEOUT) as pool:
        scores = run(pool, *kinds)
    assert [error == "" for error in scores.errors] == [kind == "good" for kind in kinds]
    assert summarise_errors(scores)[:2] == [
        ("ended its process (exit code 3)", 4),
        ("timed out after 0.3 s and had to be killed", 2),
    ]


def test_finished_slow_calls_are_not_repeated_after_a_crash(spec: RewardSpec, tmp_path: Path) -> None:
    path = tmp_path / "counts.py"
    path.write_text(
        "import os, time\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    if data_source == 'dies': os._exit(1)\n"
        f"    open({str(tmp_path / 'calls')!r}, 'a').write('x'); time.sleep(0.03); return 1\n"
    )
    samples = [("dies" if i % 4 == 3 else "", "", None, {}) for i in range(16)]
    with RewardPool(RewardSpec(str(path)), num_workers=1, timeout_s=5.0) as pool:
        scores = pool.score(samples)
    assert scores.rewards.sum() == 12 and (tmp_path / "calls").read_text() == "x" * 12


def test_a_stolen_alarm_is_set_again_for_the_next_sample(spec: RewardSpec) -> None:
    with RewardPool(spec, num_workers=1, timeout_s=TIMEOUT) as pool:
        assert run(pool, "steals_alarm", "loops").errors == ("", "timed out after 0.3 s")


def test_output_of_the_reward_function_does_no_harm(pool: RewardPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(pool, "prints", "prints").rewards.tolist() == [0, 1]


def test_large_texts_pass(pool: RewardPool) -> None:
    scores = pool.score([("good", "1" + " " * 2_000_000, None, {})] * 4)
    assert scores.rewards.tolist() == [1] * 4


@pytest.mark.quiet
def test_processes_work_side_by_side(spec: RewardSpec) -> None:
    with RewardPool(spec, num_workers=4, timeout_s=5.0) as pool:
        started = time.monotonic()
        run(pool, *["slow"] * 16)
        assert time.monotonic() - started < 0.6  # 0.8 one after the other, 0.2 at best


def test_a_process_that_died_between_calls_is_replaced_without_blame(spec: RewardSpec) -> None:
    with RewardPool(spec, num_workers=1, timeout_s=TIMEOUT) as pool:
        os.kill(pool.pids()[0], signal.SIGKILL)
        assert run(pool, "good", "good").errors == ("", "")
        run(pool, "die_later")
        time.sleep(0.2)
        assert run(pool, "good", "good").errors == ("", "")


def test_a_kill_reaches_what_the_reward_function_started(spec: RewardSpec, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with RewardPool(spec, num_workers=1, timeout_s=TIMEOUT) as pool:
        assert "had to be killed" in pool.score([("starts", str(file), None, {})]).errors[0]
    assert_gone(int(file.read_text()))


def test_close_ends_the_processes(spec: RewardSpec) -> None:
    pool = RewardPool(spec, num_workers=2, timeout_s=TIMEOUT)
    pids = pool.pids()
    pool.close()
    pool.close()
    for pid in pids:
        assert_gone(pid)
    with pytest.raises(RuntimeError, match="closed"):
        run(pool, "good")


@pytest.mark.parametrize("kind", ["good", "loops", "hangs_in_c"])
def test_processes_die_with_their_parent(spec: RewardSpec, kind: str) -> None:
    """kill -9 of the parent, while the reward function is idle, busy, or hanging with the GIL held."""
    script = (
        "import sys\nfrom workers.reward.pool import *\n"
        f"pool = RewardPool(RewardSpec({spec.path!r}), 1, 1000.0)\nprint(pool.pids()[0], flush=True)\n"
        f"pool.score([({kind!r}, '1', None, {{}})])\nsys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.1)
        os.kill(pid, 0)
        parent.kill()
    assert_gone(pid)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nowhere_to_be_found\n", r"cannot be imported: ModuleNotFoundError"),
        ("import os; os._exit(5)\n", r"importing it in a reward process ended its process \(exit code 5\)"),
        ("import time; time.sleep(100)\n", r"importing it in a reward process took longer than 0\.5 s"),
    ],
)
def test_a_function_that_cannot_be_loaded_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setattr(pool_module, "STARTUP_TIMEOUT_S", 0.5)
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=r"reward\.custom_reward_function\.path=.*" + message):
        RewardPool(RewardSpec(str(tmp_path / "bad.py")), num_workers=2, timeout_s=TIMEOUT)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"reward\.num_workers=0"):
        RewardPool(RewardSpec(None), num_workers=0, timeout_s=1.0)
    with pytest.raises(ValueError, match=r"reward\.timeout_s=0"):
        RewardPool(RewardSpec(None), num_workers=1, timeout_s=0.0)


def test_reward_processes_import_next_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "modules.py"
    path.write_text("import sys\ndef compute_score(**kwargs): return {'score': 1, 'numpy': 'numpy' in sys.modules}\n")
    with RewardPool(RewardSpec(str(path)), num_workers=1, timeout_s=1.0) as pool:
        assert pool.score([("", "", None, {})]).parts["numpy"].tolist() == [0.0]


def assert_gone(pid: int) -> None:
    """The process ends within a second (a zombie that nobody reaps counts as ended)."""
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state not in "ZX":
                time.sleep(0.01)
                continue
        return
    raise AssertionError(f"process {pid} is still there")
