"""What the extension does for versions and models that do not run here, on small modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from workers.rollout.vllm.extension import TandemWorkerExtension


def extension(model: nn.Module) -> Any:
    worker = TandemWorkerExtension()
    worker.model_runner = SimpleNamespace(model=model, model_config=None)
    worker.device = None  # as of the CPU builds before 0.23
    return worker


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("table", torch.arange(6.0).view(2, 3), persistent=False)

    def load_weights(self, weights: Any) -> set[str]:
        loaded = set()
        for name, value in weights:
            self.get_parameter(name).data.copy_(value)
            loaded.add(name)
        return loaded


def test_buffers_come_back_after_a_sleep_that_loses_them() -> None:
    """Level 2 before vLLM 0.8.5."""
    model = Rotary()
    worker = extension(model)
    table = model.table
    worker.tandem_save_buffers()
    table.fill_(-1)  # what the memory holds after waking
    worker.tandem_restore_buffers()
    assert model.table is table and torch.equal(table, torch.arange(6.0).view(2, 3))
    table.fill_(-2)
    worker.tandem_restore_buffers()  # without a sleep before it, nothing is put back
    assert bool((table == -2).all())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.zeros(2, 2))
        self.w2_weight = nn.Parameter(torch.zeros(2, 2))
        self.w2_weight.weight_loader = "its own"  # type: ignore[attr-defined]

    def weight_loader(self) -> str:
        return "of the module"


def test_experts_without_a_loader_get_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM 0.8.2 to 0.8.4 makes expert weights anew after loading, without `weight_loader`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("workers.rollout.vllm.extension.RELOAD", "no_such_module")
    model = nn.Sequential(Experts())
    extension(model).tandem_begin_update()
    experts: Any = model[0]
    assert experts.w13_weight.weight_loader() == "of the module"
    assert experts.w2_weight.weight_loader == "its own"


def test_experts_on_a_cpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their kernels keep packed copies: the update would seem to work, and change nothing."""
    monkeypatch.setattr("workers.rollout.vllm.extension._PLAIN_EXPERTS", False)
    with pytest.raises(RuntimeError, match="CPU build cannot take new weights for mixture-of-experts"):
        extension(nn.Sequential(Experts())).tandem_begin_update()
