"""The order in which training sees its prompts: explicit state, so that a resumed run continues exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def steps_per_epoch(num_prompts: int, batch_size: int) -> int:
    """Whole batches in one pass over the data. Raises ValueError if not even one fits."""
    if batch_size < 1:
        raise ValueError(f"data.train_batch_size={batch_size} must be at least 1")
    if batch_size > num_prompts:
        raise ValueError(
            f"data.train_batch_size={batch_size} is more than the {num_prompts} prompts of data.train_files (after "
            "data.filter_overlong_prompts and data.train_max_samples); lower the batch size or give more data"
        )
    return num_prompts // batch_size


class PromptOrder:
    """Batches of prompt indices, epoch after epoch.

    Each epoch is a permutation drawn from (seed, epoch) alone, or 0, 1, 2, ... without shuffling. A batch never spans
    two epochs: what is left of an epoch and too short for a batch is dropped.

    epoch, position: where the next batch starts, unless too little of the epoch is left.
    """

    def __init__(self, num_prompts: int, *, seed: int, shuffle: bool) -> None:
        assert num_prompts > 0
        self.epoch = 0
        self.position = 0
        self._num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle
        self._rows = self._permutation()

    def next_batch(self, batch_size: int) -> list[int]:
        """The next `batch_size` prompts. Raises ValueError if an epoch is shorter than that."""
        steps_per_epoch(self._num_prompts, batch_size)
        if self.position + batch_size > self._num_prompts:
            self.epoch, self.position = self.epoch + 1, 0
            self._rows = self._permutation()
        rows = self._rows[self.position : self.position + batch_size]
        self.position += batch_size
        return [int(row) for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """All there is to know, as plain numbers."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_prompts": self._num_prompts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError if it is of other data or another order."""
        own = {"data.train_files": self._num_prompts, "data.seed": self._seed, "data.shuffle": self._shuffle}
        saved = {
            "data.train_files": state["num_prompts"],
            "data.seed": state["seed"],
            "data.shuffle": state["shuffle"],
        }
        for key, value in own.items():
            if value != saved[key]:
                unit = " prompts" if key == "data.train_files" else ""
                raise ValueError(
                    f"{key}: this run has {value}{unit}, the checkpoint {saved[key]}{unit}, so the order of the "
                    "prompts cannot continue; restore the setting, or start anew with trainer.resume_mode=disable"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._rows = self._permutation()

    def _permutation(self) -> npt.NDArray[np.intp]:
        if not self._shuffle:
            return np.arange(self._num_prompts)
        return np.random.default_rng([self._seed, self.epoch]).permutation(self._num_prompts)
