"""Elementwise work around matrix products, fused into one kernel on a GPU (torch.compile)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """`function` compiled once for any number of rows: dim 0 of every tensor among its positional arguments.

    All other sizes are constants of the kernel; it would divide by them at run time for every element otherwise.
    """
    compiled = torch.compile(function)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for arg in args:
            if isinstance(arg, Tensor) and arg.ndim:
                torch._dynamo.maybe_mark_dynamic(arg, 0)
        return compiled(*args, **kwargs)

    return call
