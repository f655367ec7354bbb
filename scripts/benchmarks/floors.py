"""What a benchmark must reach. Every floor, with where it comes from, is here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Floor:
    """A bound on one number of a benchmark's result. key: its path in the result, with dots.

    min_steps: of a run of fewer "steps" nothing is asked.
    """

    key: str
    at_least: float | None = None
    at_most: float | None = None
    min_steps: int = 0

    def holds(self, value: float | None) -> bool:
        """Whether the value is inside; a number that was not measured (None) misses its floor."""
        if value is None:
            return False
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


QUICKSTART = (
    # Driver and Ray are not what a step is for: at most a tenth of it, on two cores, with the smallest model we have
    # (measured 2 %). Any larger model makes the share smaller.
    Floor("overhead_share", at_most=0.10),
    # From the command to the first training step, in an installed environment on two cores: importing torch, Ray and
    # vLLM in five processes takes about 22 s there; more than 40 s and a newcomer wonders whether it hangs.
    Floor("seconds_to_first_step", at_most=40.0),
)

# The quick start's promise, for every seed: the task is made so that the first numbers are at most 40 and 60 %, and
# every program measured on it (verl, TRL, a single-process loop) reaches 90 and 99 % in 40 steps; we allow 60 steps.
QUICKSTART_SEEDS = (
    Floor("accuracy_before", at_most=0.40),
    Floor("accuracy_after", at_least=0.90),
    Floor("greedy_before", at_most=0.60),
    Floor("greedy_after", at_least=0.98),
    Floor("steps", at_most=60),
    # The whole quick start after installation ends within 5 minutes, of which making the task takes about one.
    Floor("seconds_total", at_most=240.0),
)

# Any algorithm learns: from at most 40 % of held-out sums, every one gains at least this much in 40 steps.
ALGORITHMS = (Floor("gain", at_least=0.1, min_steps=40),)

# What driver, Ray, routing and conversion may cost of generation, with the smallest model we have and short responses;
# any larger model makes the share smaller.
ROLLOUT = (Floor("smallest_ratio", at_least=0.90),)

# Log-probs never hold tokens times vocabulary: memory goes with the chunk (and one gradient of the output layer), not
# with the tokens; and the numbers are those of the formula.
LOGPROBS = (
    Floor("smallest_over_logits", at_most=0.5),
    Floor("twice_the_rows", at_most=1.1),
    Floor("error", at_most=1e-6),
)

# Ten steps in a row without growth of memory: from the second on, which has seen every shape of a step, no phase may
# take more of the GPU but for 1 % of its peak, by which the share of free memory that plans go by may vary. Fewer than
# five steps do not tell.
NO_GROWTH = Floor("memory_growth_share", at_most=0.01, min_steps=5)

# One H200, by part and shape. A step: 2.5 times as fast as verl 0.9.1, tuned, on the same GPU (72.0 s), and in each
# phase what arithmetic allows with some room. CUDA graphs: the share of time that verl promises its users.
W1: Mapping[tuple[str, str], Sequence[Floor]] = {
    ("step", "1.5b"): (
        Floor("seconds_per_step", at_most=29.0),
        Floor("phases.generate.median", at_most=10.0),
        Floor("phases.annotate.median", at_most=4.0),
        Floor("phases.update.median", at_most=14.0),
        Floor("phases.sync.median", at_most=0.4),
        Floor("mfu_update", at_least=0.45),
        Floor("seconds_to_first_step", at_most=100.0),
        NO_GROWTH,
    ),
    ("step", "7b"): (NO_GROWTH,),
    ("rollout", "7b"): (Floor("graphs_over_eager.monitor.time_saved", at_least=0.27),),
    ("sync", "7b"): (Floor("seconds", at_most=1.0),),
}


def w1(result: Mapping[str, Any]) -> Sequence[Floor]:
    """Those of a result's part and shape; none for a step on several GPUs."""
    return W1.get((result["part"], result["shape"]), ()) if result.get("devices", 1) == 1 else ()


def missed(result: Mapping[str, Any], floors: Sequence[Floor]) -> list[str]:
    """A line for each floor that the result misses: key, value, bound."""
    asked = [floor for floor in floors if not floor.min_steps or result["steps"] >= floor.min_steps]
    values = [(floor, value_at(result, floor.key)) for floor in asked]
    return [f"{floor.key} = {_shown(value)}, must be {floor}" for floor, value in values if not floor.holds(value)]


def value_at(result: Mapping[str, object], key: str) -> float | None:
    """The number at a dotted path; None if it was not measured. KeyError if there is no such path."""
    value: object = result
    for part in key.split("."):
        assert isinstance(value, Mapping), f"{key}: {part} is inside a number"
        value = value[part]
    assert value is None or isinstance(value, (int, float)), f"{key} is not a number: {value!r}"
    return value


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
