"""Everything a run must remember to continue as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.algorithms.kl import KLController
from trainer.data.order import PromptOrder


@dataclass(slots=True)
class TrainState:
    """step: finished training steps. weight_version: of the weights the replicas hold (one per sync).
    order: place in the data. kl: controller of the KL penalty.

    Sampling needs no generator state: each call's seed follows from rollout.seed and the step.
    """

    order: PromptOrder
    kl: KLController
    step: int = 0
    weight_version: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "step": self.step,
            "weight_version": self.weight_version,
            "order": self.order.state_dict(),
            "kl": self.kl.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a manifest. Raises ValueError if the data are not those it was made with."""
        self.order.load_state_dict(state["order"])
        self.kl.load_state_dict(state["kl"])
        self.step = int(state["step"])
        self.weight_version = int(state["weight_version"])
