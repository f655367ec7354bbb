"""What Tandem adds to vLLM's worker: loading weights, and looking at them. Mixed into the worker class by vLLM itself.

Every name is prefixed: vLLM refuses an extension whose attributes exist on its worker, and adds some in most releases.
Arguments and results are plain containers, the only things that cross vLLM's RPC in every version.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.memory import CudaMeter
from workers.sync.buckets import BucketReader
from workers.sync.checksum import checksum, has_nan

CPU_EXPERTS = "vllm.model_executor.layers.fused_moe.experts.cpu_moe"
RELOAD = "vllm.model_executor.model_loader.reload"


def _keep_cpu_weights() -> None:
    """vLLM's CPU build packs linear weights and empties the parameters (0.10.2 and later), so nothing can be loaded
    into them any more, and a tied output layer goes stale. Plain matrix products keep the parameters real."""
    from vllm.model_executor.layers import utils

    def keep(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = lambda x, weight, bias: F.linear(x, weight, bias)  # type: ignore[assignment]

    if hasattr(utils, "dispatch_cpu_unquantized_gemm"):
        utils.dispatch_cpu_unquantized_gemm = keep


def _keep_cpu_experts() -> bool:
    """The same of expert weights, where vLLM's CPU build computes them as we know (0.32). Whether it does."""
    try:
        experts: Any = importlib.import_module(CPU_EXPERTS).CPUUnquantizedExperts
    except (ImportError, AttributeError):
        return False
    experts.process_weights_after_loading = lambda self, layer: None
    experts.apply = _plain_experts
    return True


def _plain_experts(
    self: Any,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation: Any,
    **_: Any,
) -> None:
    """One expert after the other: w1 [experts, gate and up, hidden], w2 [experts, hidden, gate]."""
    assert activation.value == "silu", activation
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in topk_ids.unique().tolist():
        token, place = torch.where(topk_ids == expert)
        gate, up = F.linear(hidden_states[token], w1[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, w2[expert])
        total.index_add_(0, token, out.float() * topk_weights[token, place, None].float())
    output.copy_(total)


_PLAIN_EXPERTS = False
"""Whether expert weights of a CPU are what parameters say."""

if not torch.cuda.is_available():
    _keep_cpu_weights()
    _PLAIN_EXPERTS = _keep_cpu_experts()


class TandemWorkerExtension:
    """Methods reached through `collective_rpc`. One update is begin, any number of buckets, finish."""

    model_runner: Any
    vllm_config: Any

    def tandem_begin_update(self) -> None:
        """Marks every parameter as not yet written (NaN), so that `tandem_finish_update` sees what was left out.

        Expert weights may lie in memory as a kernel wants them; vLLM (0.16 and later) puts them back for loading. Then
        nothing can be marked, and what was left out shows in the checksum alone.
        Raises RuntimeError for experts on a CPU whose kernels keep copies that no reload reaches.
        """
        model = self.model_runner.model
        experts = any(hasattr(module, "w13_weight") for module in model.modules())
        if experts and not torch.cuda.is_available() and not _PLAIN_EXPERTS:
            raise RuntimeError(
                "weight sync: this vLLM's CPU build cannot take new weights for mixture-of-experts models; use 0.32"
            )
        if getattr(self, "_tandem_reader", None) is None:  # a worker's `device` is None in CPU builds before 0.23
            self._tandem_reader = BucketReader(next(model.parameters()).device)
        self._tandem_seen: set[str] = set()
        self._tandem_layerwise = experts and torch.cuda.is_available() and importlib.util.find_spec(RELOAD) is not None
        if self._tandem_layerwise:
            with self._tandem_loading():
                importlib.import_module(RELOAD).initialize_layerwise_reload(model)
            return
        _restore_loaders(model)
        for parameter in _parameters(model).values():
            if parameter.is_floating_point():
                parameter.fill_(float("nan"))

    def tandem_load_bucket(self, messages: list[dict[str, object]]) -> None:
        """Loads one bucket from all training ranks. Raises RuntimeError for a parameter that came twice."""
        with self._tandem_loading():
            self.model_runner.model.load_weights(self._tandem_new(messages))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the trainer may fill this bucket's memory again

    def _tandem_new(self, messages: list[dict[str, object]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._tandem_reader.read(messages):
            if name in self._tandem_seen:
                raise RuntimeError(f"weight sync: {name} came twice in one update")
            self._tandem_seen.add(name)
            yield name, weight

    def tandem_finish_update(self) -> dict[str, int]:
        """Checks that everything was written; returns the number of parameters received and the checksum of all held.

        Raises RuntimeError naming the parameters that were not written, or written in part.
        """
        model = self.model_runner.model
        if self._tandem_layerwise:
            with self._tandem_loading():
                reload = importlib.import_module(RELOAD)
                reload.finalize_layerwise_reload(model, self.model_runner.model_config)
        parameters = _parameters(model)
        missing = [n for n, p in parameters.items() if p.is_floating_point() and has_nan(p)]
        if missing:
            raise RuntimeError(f"weight sync: not (fully) written, or NaN: {', '.join(missing[:8])}")
        held = sum(checksum(p) for p in parameters.values()) % (1 << 64)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the cache of keys and values wakes next, and wants the room
        return {"parameters": len(self._tandem_seen), "checksum": held}

    @contextmanager
    def _tandem_loading(self) -> Iterator[None]:
        """What vLLM sets while it loads weights itself; only reloading layer by layer needs it."""
        if not self._tandem_layerwise:
            yield
            return
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config), self._tandem_reader.device:
            yield

    def tandem_save_buffers(self) -> None:
        """Keeps what is not a parameter, where sleep loses it (level 2 before vLLM 0.8.5)."""
        self._tandem_buffers = {n: b.detach().cpu().clone() for n, b in self.model_runner.model.named_buffers()}

    def tandem_restore_buffers(self) -> None:
        """Puts it back, after waking."""
        buffers = dict(self.model_runner.model.named_buffers())
        for name, saved in getattr(self, "_tandem_buffers", {}).items():
            buffers[name].data.copy_(saved)
        self._tandem_buffers = {}

    def tandem_seed(self, seed: int) -> None:
        """Seeds the sampler for the next generate call; model runner V2 draws a seed per request from NumPy."""
        torch.manual_seed(seed)
        np.random.seed(seed % (1 << 32))

    def tandem_begin_call(self) -> None:
        """From here on `tandem_peaks` counts."""
        if torch.cuda.is_available():
            CudaMeter().begin()

    def tandem_peaks(self) -> list[int]:
        """Largest amounts of accelerator memory held by this worker, and by everyone on its device (0, 0 on CPU)."""
        if not torch.cuda.is_available():
            return [0, 0]
        return [CudaMeter().own_peak_bytes(), CudaMeter().peak_bytes()]

    def tandem_memory(self) -> list[int]:
        """Free bytes of this worker's device, and bytes of the model's parameters (0, 0 on CPU)."""
        if not torch.cuda.is_available():
            return [0, 0]
        return [torch.cuda.mem_get_info()[0], sum(p.nbytes for p in _parameters(self.model_runner.model).values())]


def _restore_loaders(model: nn.Module) -> None:
    """vLLM 0.8.2 to 0.8.4 makes expert weights anew after loading, without what the next loading needs of them."""
    for module in model.modules():
        loader = getattr(module, "weight_loader", None)
        for name in ("w13_weight", "w2_weight"):
            parameter = getattr(module, name, None)
            if loader is not None and parameter is not None and not hasattr(parameter, "weight_loader"):
                parameter.weight_loader = loader


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.data for name, p in model.named_parameters()}
