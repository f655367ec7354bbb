"""The training-side roles as the driver sees them: actor, reference, critic. An absent one does nothing.

A role plans micro-batches from lengths, hands every rank its share, and adds up what comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from trainer.algorithms.aggregation import normalizers
from trainer.batching import Limits, MiniBatch, plan_batch, plan_forward, to_local
from trainer.samples import Samples
from workers.engines.base import Loss, Output, ParallelSpec, StepResult, Update
from workers.group import WorkerGroup
from workers.train_worker import Column, TrainWorker

RankOf = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Passes:
    """In which passes a batch is trained on: prompts per optimizer step, epochs, and the seed of their order."""

    groups_per_minibatch: int
    epochs: int
    shuffle_seed: int | None

    def seed(self, step: int) -> tuple[int, int] | None:
        """Seed of the order of one step's prompts; None: in order."""
        return None if self.shuffle_seed is None else (self.shuffle_seed, step)


@dataclass(frozen=True, slots=True)
class UpdateSettings:
    """How one batch becomes optimizer steps. length: divisor of seq-mean-token-sum-norm, tokens."""

    loss: Loss
    entropy: bool
    passes: Passes
    length: float
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Metrics averaged over the optimizer steps of one batch; maxima and minima are of all of them."""

    metrics: dict[str, float]
    grad_norm: float
    lr: float
    num_updates: int
    num_skipped: int
    peak_bytes: int


class Role(Protocol):
    """A training-side role."""

    def annotate(self, samples: Samples, column: str, *, step: int) -> None:
        """Adds what the model says of the response tokens as a column: log-probs or values; the sum of the squared
        probabilities under the name `sum_pi_squared`."""

    def update(self, samples: Samples, *, step: int) -> UpdateReport | None:
        """Trains on the batch."""

    def save(self, directory: Path) -> None:
        """Writes the role's state."""

    def load(self, directory: Path) -> None:
        """Restores the role's state."""


class AbsentRole:
    """No critic, no reference: the null object."""

    def annotate(self, samples: Samples, column: str, *, step: int) -> None:
        """Nothing."""

    def update(self, samples: Samples, *, step: int) -> None:
        """Nothing."""

    def save(self, directory: Path) -> None:
        """Nothing."""

    def load(self, directory: Path) -> None:
        """Nothing."""


class TrainRole:
    """One model on a group of training ranks.

    parallel: which ranks hold a model together (Megatron) and so get the same share of a batch.
    balance: the passes that rows are dealt to ranks for, the actor's: every role finds a row on the same rank.
    """

    def __init__(
        self,
        name: str,
        group: WorkerGroup,
        *,
        parallel: ParallelSpec,
        limits: Limits,
        temperature: float,
        hidden_size: int,
        timeout_s: float,
        balance: Passes,
        settings: UpdateSettings | None,
    ) -> None:
        self.name = name
        self.group = group
        self._share_of = tuple(parallel.data_rank(rank, len(group)) for rank in range(len(group)))
        self._num_shares = parallel.data_size(len(group))
        self._limits = limits
        self._temperature = temperature
        self._hidden_size = hidden_size
        self._timeout_s = timeout_s
        self._balance = balance
        self._settings = settings

    def annotate(self, samples: Samples, column: str, *, step: int) -> None:
        """One forward pass; the values stay on the training side, as references."""
        output: Output = "sum_pi_squared" if column == "sum_pi_squared" else "outputs"
        ranks = self._rank_of(samples, step)
        plan = plan_forward(
            samples.meta.prompt_length,
            samples.meta.response_length,
            samples.meta.group,
            num_ranks=self._num_shares,
            limits=self._limits,
            rank_of=ranks,
            hidden_size=self._hidden_size,
        )
        shares = [np.flatnonzero(ranks == r) for r in range(self._num_shares)]
        batches = [samples.rank_batch(rows, self._num_shares) for rows in shares]
        arguments = [
            (self.name, batches[r], (), to_local(plan.ranks[r], shares[r]), self._temperature, output)
            for r in self._share_of
        ]
        call, payloads = self.group.scatter_with_payload(TrainWorker.forward, arguments)
        holds = call.result(self._timeout_s)
        held = [(payloads[i], shares[r]) for i, r in enumerate(self._share_of) if holds[i]]
        assert len(held) == self._num_shares, (self.name, holds, self._share_of)
        samples.columns[column] = Column(column, tuple(held))

    def update(self, samples: Samples, *, step: int) -> UpdateReport:
        """All optimizer steps of one batch."""
        settings = self._settings
        assert settings is not None, f"{self.name} is not trained"
        plan = plan_batch(
            samples.meta.prompt_length,
            samples.meta.response_length,
            samples.meta.group,
            groups_per_minibatch=settings.passes.groups_per_minibatch,
            num_ranks=self._num_shares,
            limits=self._limits,
            epochs=settings.passes.epochs,
            shuffle_seed=settings.passes.seed(step),
            rank_of=self._rank_of(samples, step),
            hidden_size=self._hidden_size,
        )
        shares = [plan.rows_of_rank(r) for r in range(self._num_shares)]
        columns = tuple(samples.columns[name] for name in settings.columns if name in samples.columns)
        by_share = [
            (
                self.name,
                samples.rank_batch(rows, self._num_shares),
                tuple(_for_rank(c, rows, samples) for c in columns),
                _updates(plan.minibatches, r, rows, samples, settings.length),
                settings.loss,
                self._temperature,
                settings.entropy,
            )
            for r, rows in enumerate(shares)
        ]
        arguments = [by_share[r] for r in self._share_of]
        results = self.group.scatter(TrainWorker.update, arguments).result(self._timeout_s)
        return _report(results[0][0], max(peak for _, peak in results))

    def _rank_of(self, samples: Samples, step: int) -> RankOf:
        """Data-parallel rank of each row, [S]: dealt once per batch, so that ranks build their share once."""
        num_ranks = self._num_shares
        if num_ranks not in samples.rank_of:
            samples.rank_of[num_ranks] = plan_batch(
                samples.meta.prompt_length,
                samples.meta.response_length,
                samples.meta.group,
                groups_per_minibatch=self._balance.groups_per_minibatch,
                num_ranks=num_ranks,
                limits=self._limits,
                shuffle_seed=self._balance.seed(step),
                hidden_size=self._hidden_size,
            ).rank_of
        return samples.rank_of[num_ranks]

    def save(self, directory: Path) -> None:
        """Writes model and optimizer."""
        self.group.broadcast(TrainWorker.save, self.name, str(directory)).result(self._timeout_s)

    def load(self, directory: Path) -> None:
        """Restores model and optimizer."""
        self.group.broadcast(TrainWorker.load, self.name, str(directory)).result(self._timeout_s)

    def save_hf(self, directory: Path) -> None:
        """Writes a Hugging Face copy of the model."""
        self.group.broadcast(TrainWorker.save_hf, self.name, str(directory)).result(self._timeout_s)


def _for_rank(column: Column, rows: RankOf, samples: Samples) -> Column:
    """A column computed here and small enough to travel is cut to the rank's rows."""
    (source, _), *more = column.parts
    if more or not isinstance(source, np.ndarray):
        return column
    ends = np.cumsum(samples.meta.response_length)
    pieces = [source[ends[r] - samples.meta.response_length[r] : ends[r]] for r in rows]
    flat = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.float32)
    return Column(column.name, ((flat, rows),))


def _updates(
    minibatches: Sequence[MiniBatch], rank: int, rows: RankOf, samples: Samples, length: float
) -> list[Update]:
    return [
        Update(to_local(m.ranks[rank], rows), normalizers(samples.meta.loss_tokens[m.rows], length=length))
        for m in minibatches
    ]


def _report(results: Sequence[StepResult], peak_bytes: int) -> UpdateReport:
    names = {name for r in results for name in r.metrics}
    done = [r for r in results if not r.skipped]
    return UpdateReport(
        metrics={name: _merge(name, [r.metrics for r in results if name in r.metrics]) for name in sorted(names)},
        grad_norm=float(np.mean([r.grad_norm for r in done])) if done else float("nan"),
        lr=results[-1].lr if results else 0.0,
        num_updates=len(done),
        num_skipped=len(results) - len(done),
        peak_bytes=peak_bytes,
    )


def _merge(name: str, metrics: Sequence[Mapping[str, float]]) -> float:
    values = [m[name] for m in metrics]
    if name.endswith("_max"):
        return max(values)
    if name.endswith("_min"):
        return min(values)
    return float(np.sum(values) if name.startswith("mismatch/") else np.mean(values))
