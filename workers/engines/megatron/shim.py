"""What Megatron-core needs to run where there is no GPU.

It asks for CUDA by name in a few places that work as well on a CPU. Each piece answers one kind of question, and only a
process that trains on a CPU installs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def install(device: torch.device) -> None:
    """Puts the pieces in place if `device` is a CPU (idempotent)."""
    if device.type != "cpu":
        return
    from megatron.core.transformer.moe import token_dispatcher

    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]  # only ever a `device=`
    torch.cuda.synchronize = lambda device=None: None  # pipelines wait for lengths that came over the network
    torch.cuda.current_stream = lambda device=None: _STREAM  # type: ignore[assignment,return-value]  # 0.19: no graph to wait for
    token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _STREAM  # counts of tokens are on the host already
    token_dispatcher.maybe_move_tensor_to_cpu = _moved


def _moved(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """What is a tensor for a GPU's sake becomes what collectives take."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


class _Stream:
    """The only one, and never behind; its own event."""

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        return


_STREAM = _Stream()


def schedule_devices(device: torch.device) -> AbstractContextManager[Any]:
    """Around a schedule, whose count of tokens is made with the literal `device="cuda"`."""
    return _CudaMeansCpu() if device.type == "cpu" else nullcontext()


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return func(*args, **kwargs)
