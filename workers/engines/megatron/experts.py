"""Mixtures of experts, of Megatron's parts: experts over ranks, tokens sent to them and back, none dropped.

The router is ours: it computes what Hugging Face and vLLM compute, and can be told the experts to take. There is no
loss that balances experts: what is lost on is the algorithm's affair.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from workers.batch import CHOOSE
from workers.engines.base import ParallelSpec
from workers.engines.megatron.architectures import Experts


class Router(TopKRouter):  # type: ignore[misc]
    """Softmax over all experts in float32, of logits in the model's dtype; the largest few, made to add up to 1 where
    the model has it so.

    replayed: [num_tokens, experts per token] of the forward pass to come, the experts to take instead (all different;
        CHOOSE in the first place: the router's own choice); None: its own everywhere. How much each of them counts is
        the router's in any case, and has a gradient. See docs/routing_replay.md.
    """

    replayed: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        """Logits, as the model's dtype has them (Megatron's own takes Transformer Engine for given)."""
        return F.linear(input, self.weight)

    def routing(self, logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """(shares, which are chosen), both [num_tokens, num_experts]; logits: [num_tokens, 1, num_experts]."""
        shares = torch.softmax(logits.flatten(0, 1), dim=-1, dtype=torch.float32)
        chosen = shares.topk(self.topk, dim=-1).indices
        if self.replayed is not None:
            chosen = torch.where(self.replayed[:, :1] == CHOOSE, chosen, self.replayed.long())
        is_chosen = torch.zeros_like(shares, dtype=torch.bool).scatter_(1, chosen, True)
        shares = shares * is_chosen
        if not self.config.moe_router_pre_softmax:
            shares = shares / shares.sum(-1, keepdim=True)  # in the order of experts, whoever chose them
        return shares, is_chosen


class _OneByOne(SequentialMLP):  # type: ignore[misc]
    """The experts of this rank, one after the other: Megatron has nothing faster without Transformer Engine."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, **options: Any) -> None:
        of_each = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(num_local_experts, config, submodules=of_each, **options)


class Mixture(MoELayer):  # type: ignore[misc]
    """What takes the place of an MLP."""

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__(config, MoESubmodules(experts=_OneByOne, router=Router), **options)


def expert_settings(experts: Experts, parallel: ParallelSpec) -> dict[str, Any]:
    """What Megatron's configuration says of them."""
    return {
        "num_moe_experts": experts.number,
        "moe_ffn_hidden_size": experts.intermediate,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": not experts.shares_add_up,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.tensor,
    }
