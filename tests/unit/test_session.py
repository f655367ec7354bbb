"""What is kept of a run that rewards end: every step that was trained, and nothing of one that was not."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config.errors import UserError
from trainer.scoring import RewardErrorRate
from trainer.session import Session
from trainer.tracking.phases import Phases
from workers.group import WorkerError


class State:
    """A train state whose order moves on before a step can fail."""

    def __init__(self) -> None:
        self.step, self.position = 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.position = state["step"], state["position"]


class Driver:
    """Three steps; raises what it is told to in the last, or in the validation after it."""

    def __init__(self, in_step: Exception | None, in_validation: Exception | None) -> None:
        self.state = State()
        self._in_step, self._in_validation = in_step, in_validation
        self.source = SimpleNamespace(take_metrics=dict)

    def step(self) -> tuple[Any, dict[str, float]]:
        self.state.position += 1
        if self.state.step == 2 and self._in_step is not None:
            raise self._in_step
        self.state.step += 1
        return None, {"reward/mean": 1.0}

    def validate(self) -> tuple[dict[str, float], None]:
        if self._in_validation is not None:
            raise self._in_validation
        return {"val/accuracy": 1.0}, None

    def is_validation_due(self) -> bool:
        return self.finished

    def is_checkpoint_due(self) -> bool:
        return self.finished

    @property
    def finished(self) -> bool:
        return self.state.step == 3


class Recorded(Session):
    """Notes what is recorded and saved instead of doing it."""

    def __init__(self, driver: Any) -> None:
        cfg: Any = SimpleNamespace(trainer=SimpleNamespace(val_before_train=False))
        none: Any = None
        super().__init__(cfg, none, driver, none, Phases(), Path(), 0.0, threading.Event(), {})
        self.lines: list[int] = []
        self.saved: list[dict[str, Any]] = []

    def save(self) -> Path:
        self.saved.append(self.driver.state.state_dict())
        return Path()

    def _record(self, metrics: Any, samples: Any) -> None:
        self.lines.append(self.driver.state.step)

    def _throughput(self, samples: Any) -> dict[str, float]:
        return {}

    def _position(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("error", [RewardErrorRate("many failed"), UserError("no such part")])
def test_a_step_that_could_not_begin_leaves_those_before_it(error: Exception) -> None:
    session = Recorded(Driver(error, None))
    with pytest.raises(type(error)):
        session.train()
    assert session.lines == [1, 2]
    assert session.saved == [{"step": 2, "position": 2}], "its prompts will be answered again"


@pytest.mark.parametrize("error", [RewardErrorRate("many failed"), WorkerError("replica 0 is gone")])
def test_a_validation_that_fails_does_not_take_the_training_with_it(error: Exception) -> None:
    session = Recorded(Driver(None, error))
    with pytest.raises(type(error)):
        session.train()
    assert session.lines == [1, 2, 3]
    assert session.saved == [{"step": 3, "position": 3}]


def test_where_the_checkpoint_fails_too_both_are_told() -> None:
    class Unsaved(Recorded):
        def save(self) -> Path:
            raise WorkerError("rank 0 is gone")

    with pytest.raises(WorkerError, match="replica 0 is gone") as told:
        Unsaved(Driver(None, WorkerError("replica 0 is gone"))).train()
    assert told.value.__notes__ == ["the step before it is not kept either: rank 0 is gone"]


def test_a_run_that_ends_well_is_saved_once() -> None:
    session = Recorded(Driver(None, None))
    session.train()
    assert session.lines == [1, 2, 3] and session.saved == [{"step": 3, "position": 3}]
