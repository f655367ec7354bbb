"""The policy losses written out with loops over sequences and plain floats: what tests hold the tensors against.

A formula takes the tokens of one sequence and returns, for each, the loss and the factor of d logp in its gradient.
Ranges are those of `CLIPS`: 0.2 below, 0.28 above, constant 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LOW, HIGH, C = 0.2, 0.28, 3.0
BETA = 0.3
KL_COEF = 0.7


@dataclass(frozen=True)
class Token:
    new: float
    old: float
    advantage: float
    chosen: float = 0.0

    @property
    def log_ratio(self) -> float:
        return min(max(self.new - self.old, -20.0), 20.0)

    @property
    def moves(self) -> float:
        """Derivative of the clamped log ratio."""
        return 1.0 if abs(self.new - self.old) < 20.0 else 0.0


Formula = Callable[[Sequence[Token]], list[tuple[float, float]]]


def per_token(formula: Callable[[Token], tuple[float, float]]) -> Formula:
    return lambda sequence: [formula(token) for token in sequence]


def clipped(ratio: float, advantage: float) -> tuple[float, float]:
    """PPO's loss for a ratio, and its derivative by the log of the ratio."""
    if advantage > 0 and ratio > 1 + HIGH:
        return -advantage * (1 + HIGH), 0.0
    if advantage < 0 and ratio < 1 - LOW:
        return -advantage * (1 - LOW), 0.0
    return -advantage * ratio, -advantage * ratio


def ppo(t: Token) -> tuple[float, float]:
    ratio = math.exp(t.log_ratio)
    if t.advantage < 0 and ratio > C:
        return -t.advantage * C, 0.0
    value, slope = clipped(ratio, t.advantage)
    return value, slope * t.moves


def gspo(sequence: Sequence[Token]) -> list[tuple[float, float]]:
    ratio = math.exp(min(sum(t.log_ratio for t in sequence) / len(sequence), 10.0))
    return [clipped(ratio, t.advantage) for t in sequence]


def gmpo(sequence: Sequence[Token]) -> list[tuple[float, float]]:
    advantage = sum(t.advantage for t in sequence) / len(sequence)
    logs, free = [], []
    for t in sequence:
        out = t.log_ratio > HIGH if advantage > 0 else t.log_ratio < -LOW
        logs.append((HIGH if advantage > 0 else -LOW) if out else t.log_ratio)
        free.append(0.0 if out else t.moves)
    value = -advantage * math.prod(math.exp(x) for x in logs) ** (1 / len(sequence))
    return [(value, value * f) for f in free]


def sapo(t: Token) -> tuple[float, float]:
    tau = 1.0 if t.advantage > 0 else 1.05
    ratio = math.exp(t.log_ratio)
    sigmoid = 1.0 / (1.0 + math.exp(-min(tau * (ratio - 1.0), 700.0)))
    return -t.advantage * 4 / tau * sigmoid, -t.advantage * 4 * sigmoid * (1 - sigmoid) * ratio * t.moves


def cispo(t: Token) -> tuple[float, float]:
    weight = min(max(math.exp(t.log_ratio), 1 - LOW), 1 + HIGH)
    return -weight * t.advantage * t.new, -weight * t.advantage


def gpg(t: Token) -> tuple[float, float]:
    return -t.advantage * t.new, -t.advantage


def clip_cov(t: Token) -> tuple[float, float]:
    value, slope = clipped(math.exp(t.log_ratio), t.advantage)
    return (0.0, 0.0) if t.chosen else (value, slope * t.moves)


def kl_cov(t: Token) -> tuple[float, float]:
    value = -t.advantage * math.exp(t.log_ratio)
    extra = KL_COEF * abs(t.log_ratio) if t.chosen else 0.0
    side = KL_COEF * math.copysign(1.0, t.log_ratio) if t.chosen and t.log_ratio else 0.0
    return value + extra, (value + side) * t.moves


def dppo(divergence: Callable[[float, float], float]) -> Formula:
    """divergence: of the token's probability after and before, >= 0."""

    def formula(t: Token) -> tuple[float, float]:
        p, q = math.exp(t.new), math.exp(t.old)
        outwards = p > q if t.advantage > 0 else p < q
        if outwards and divergence(p, q) > (HIGH if t.advantage > 0 else LOW):
            return 0.0, 0.0
        weight = min(math.exp(t.log_ratio), C)
        return -weight * t.advantage * t.new, -weight * t.advantage

    return per_token(formula)


def total_variation(p: float, q: float) -> float:
    """Half the sum of the differences over both outcomes."""
    return 0.5 * (abs(p - q) + abs((1 - p) - (1 - q)))


def binary_kl(p: float, q: float) -> float:
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def dro(t: Token) -> tuple[float, float]:
    value = -(t.new * t.advantage - BETA / 2 * t.log_ratio**2)
    return value, -t.advantage + BETA * t.log_ratio


def topr(sequence: Sequence[Token]) -> list[tuple[float, float]]:
    new, old = sum(t.new for t in sequence), sum(t.old for t in sequence)
    weights = [min(math.exp(new - old), 1.0) if t.advantage < 0 else 1.0 for t in sequence]
    return [(-w * t.advantage * t.new, -w * t.advantage) for w, t in zip(weights, sequence, strict=True)]


FORMULAS: dict[str, Formula] = {
    "ppo": per_token(ppo),
    "gspo": gspo,
    "sapo": per_token(sapo),
    "cispo": per_token(cispo),
    "gmpo": gmpo,
    "gpg": per_token(gpg),
    "clip_cov": per_token(clip_cov),
    "kl_cov": per_token(kl_cov),
    "dppo_tv": dppo(total_variation),
    "dppo_kl": dppo(binary_kl),
    "dro": per_token(dro),
    "topr": topr,
}
PRESCRIBED = ("gspo", "gmpo", "sapo")
"""Losses that are averaged over tokens, then over sequences, whatever is configured."""
