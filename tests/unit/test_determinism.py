"""What the switch sets in a training process, and when."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from workers.determinism import ENVIRONMENT, make_deterministic
from workers.train_worker import TrainWorker


@pytest.fixture
def pytorch_as_it_was() -> Iterator[None]:
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.mark.parametrize("deterministic", [True, False])
def test_libraries_find_their_variables_before_they_are_loaded(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    TrainWorker(0, 1, "cuda", local_device=3, threads=1, timeout_s=1.0, deterministic=deterministic)
    assert {"CUDA_VISIBLE_DEVICES": "3"} | (ENVIRONMENT if deterministic else {}) == os.environ


@pytest.mark.usefixtures("pytorch_as_it_was")
def test_operations_are_deterministic_or_raise() -> None:
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "flash attention would only warn, too"
    assert torch._inductor.config.deterministic, "what is compiled is not chosen by timing"
    assert not torch.utils.deterministic.fill_uninitialized_memory
