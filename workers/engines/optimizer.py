"""AdamW as language models are trained with it, and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from workers.engines.base import OptimizerSpec
from workers.engines.residency import local_of


def make_optimizer(module: nn.Module, spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) without weight decay on norms and biases."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return adamw([p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2], spec)


def adamw(matrices: list[nn.Parameter], others: list[nn.Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """The same on parameters that have been told apart; weights of matrices decay."""
    groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)


def begin_state(optimizer: torch.optim.AdamW) -> None:
    """Gives parameters that were never stepped the state a first step starts from.

    torch's own way of making state to save or to load into is a step with a learning rate of 0, which counts as one.
    A first step would make it inside the memory that activations have just left, and no block that holds some of it
    could be given back.
    """
    if not optimizer.state and torch.cuda.is_available():
        torch.cuda.empty_cache()
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter not in optimizer.state:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def moments(optimizer: torch.optim.AdamW) -> list[Tensor]:
    """This rank's exp_avg and exp_avg_sq, as many as there are; the step counts are no size."""
    return [local_of(state[name]) for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def learning_rate(spec: OptimizerSpec, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0: linear warm-up, then constant, linear or cosine."""
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    if spec.lr_scheduler_type == "constant":
        return spec.lr
    progress = (step - spec.warmup_steps) / max(1, spec.total_steps - spec.warmup_steps)
    done = min(1.0, progress)
    left = 1.0 - done if spec.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return spec.lr * (spec.min_lr_ratio + (1 - spec.min_lr_ratio) * left)
