"""What Tandem adds to vLLM's worker: loading weights, and looking at them. Mixed into the worker class by vLLM itself.

Every name is prefixed: vLLM refuses an extension whose attributes exist on its worker, and adds some in most releases.
Arguments and results are plain containers, the only things that cross vLLM's RPC in every version.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.sync.checksum import checksum
from workers.sync.shm import ShmReader


def _keep_cpu_weights() -> None:
    """vLLM's CPU build packs linear weights and empties the parameters (0.10.2 and later), so nothing can be loaded
    into them any more, and a tied output layer goes stale. Plain matrix products keep the parameters real."""
    from vllm.model_executor.layers import utils

    def keep(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = lambda x, weight, bias: F.linear(x, weight, bias)  # type: ignore[assignment]

    if hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        utils.dispatch_cpu_unquantized_gemm = keep


if not torch.cuda.is_available():
    _keep_cpu_weights()


class TandemWorkerExtension:
    """Methods reached through `collective_rpc`. One update is begin, any number of buckets, finish."""

    model_runner: Any

    def tandem_begin_update(self) -> None:
        """Marks every parameter as not yet written (NaN), so that `tandem_finish_update` sees what was left out."""
        self._tandem_reader = getattr(self, "_tandem_reader", None) or ShmReader()
        self._tandem_seen: set[str] = set()
        for parameter in _parameters(self.model_runner.model).values():
            if parameter.is_floating_point():
                parameter.fill_(float("nan"))

    def tandem_load_bucket(self, messages: list[dict[str, object]]) -> None:
        """Loads one bucket from all training ranks. Raises RuntimeError for a parameter that came twice."""
        weights = list(self._tandem_reader.read(messages))
        for name, _ in weights:
            if name in self._tandem_seen:
                raise RuntimeError(f"weight sync: {name} came twice in one update")
            self._tandem_seen.add(name)
        self.model_runner.model.load_weights(iter(weights))

    def tandem_finish_update(self) -> dict[str, int]:
        """Checks that everything was written; returns the number of parameters received and the checksum of all held.

        Raises RuntimeError naming the parameters that were not written, or written in part.
        """
        parameters = _parameters(self.model_runner.model)
        missing = [n for n, p in parameters.items() if p.is_floating_point() and bool(torch.isnan(p).any())]
        if missing:
            raise RuntimeError(f"weight sync: not (fully) written, or NaN: {', '.join(missing[:8])}")
        return {
            "parameters": len(self._tandem_seen),
            "checksum": sum(checksum(p) for p in parameters.values()) % (1 << 64),
        }

    def tandem_seed(self, seed: int) -> None:
        """Seeds the sampler for the next generate call."""
        torch.manual_seed(seed)

    def tandem_peak_bytes(self) -> int:
        """Largest amount of accelerator memory this worker has held (0 on CPU)."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.data for name, p in model.named_parameters()}
