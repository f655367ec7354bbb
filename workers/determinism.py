"""What `trainer.full_determinism` switches in a process: variables that libraries read at their start, then PyTorch.

On a CPU one command takes the same course by itself, as far as is known; PyTorch's switch holds it to that.
"""

from __future__ import annotations

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else products on several streams may differ; PyTorch insists on it
    "NCCL_NVLS_ENABLE": "0",  # a switch that adds up what GPUs send does so in any order
    "TORCHINDUCTOR_DETERMINISTIC": "1",  # compiled reductions are not chosen by timing them
}
"""Read by CUDA's libraries and by torch when they are loaded."""


def make_deterministic() -> None:
    """Operations that differ from run to run take their deterministic form; those that have none raise RuntimeError.

    Flash attention's backward pass is the one that matters: its blocks add up the gradient of the queries in turn.
    """
    import torch

    torch.use_deterministic_algorithms(True)
    # fresh memory would be filled with NaN, a pass over it, to make errors repeat; nothing here reads it unwritten
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
