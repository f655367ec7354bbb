"""Mixtures of experts, of Megatron's parts: experts over ranks, tokens sent to them and back, none dropped.

The router is ours: it computes what Hugging Face and vLLM compute, and can be told the experts to take. There is no
loss that balances experts: what is lost on is the algorithm's affair.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from workers.batch import CHOOSE
from workers.engines.base import ParallelSpec
from workers.engines.megatron.architectures import Experts


class Router(TopKRouter):  # type: ignore[misc]
    """Softmax over all experts in float32, of logits in the model's dtype; the largest few, made to add up to 1 where
    the model has it so (`shares_add_up`).

    replayed: [num_tokens, experts per token] of the forward pass to come, the experts to take instead (all different;
        CHOOSE in the first place: the router's own choice); None: its own everywhere. How much each of them counts is
        the router's in any case, and has a gradient. That is what routing replay means (arXiv 2510.11370).
    """

    replayed: Tensor | None = None

    def __init__(self, *args: Any, shares_add_up: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shares_add_up = shares_add_up

    def gating(self, input: Tensor) -> Tensor:
        """Logits, as the model's dtype has them (Megatron's own takes Transformer Engine for given)."""
        return F.linear(input, self.weight)

    def routing(self, logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(shares, which are chosen), both [num_tokens, num_experts]; logits: [num_tokens, 1, num_experts]."""
        shares = torch.softmax(logits.flatten(0, 1), dim=-1, dtype=torch.float32)
        chosen = shares.topk(self.topk, dim=-1).indices
        if self.replayed is not None:
            chosen = torch.where(self.replayed[:, :1] == CHOOSE, chosen, self.replayed)
        is_chosen = torch.zeros_like(shares, dtype=torch.bool).scatter_(1, chosen, True)
        shares = shares * is_chosen
        if self._shares_add_up:
            shares = shares / shares.sum(-1, keepdim=True)  # in the order of experts, whoever chose them
        return shares, is_chosen


def expert_settings(experts: Experts, parallel: ParallelSpec) -> dict[str, Any]:
    """What Megatron's configuration says of them."""
    return {
        "num_moe_experts": experts.number,
        "moe_ffn_hidden_size": experts.intermediate,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.tensor,
    }


def experts_spec(experts: Experts) -> ModuleSpec:
    """What takes the place of an MLP: a router, and experts one after the other."""
    of_each = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    router = partial(Router, shares_add_up=experts.shares_add_up)
    submodules = MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=of_each), router=router)
    return ModuleSpec(module=MoELayer, submodules=submodules)
