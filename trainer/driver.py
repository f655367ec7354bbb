"""The loop. One step, read aloud: take prompts; generate and score; annotate with log-probs and values; compute
advantages; update critic and actor; publish the weights; report.

The driver holds references and numbers, not tokens. It knows no algorithm (a function of `Samples` makes advantages),
no engine, no device: an absent role is a null object, the source owns the replicas' memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.advantage import AdvantageComputer
from trainer.collect import VALIDATE, Collector
from trainer.evaluation import Evaluation
from trainer.loss_columns import LossColumns
from trainer.measure import Metrics, advantage_metrics, sample_metrics, update_metrics
from trainer.roles import Role
from trainer.samples import Samples
from trainer.sources import SyncSource
from trainer.state import TrainState
from trainer.tracking.phases import Phases
from workers.rollout.spec import SamplingSpec
from workers.sync.sync import WeightSync


@dataclass(frozen=True, slots=True)
class Cadence:
    """When things happen, in steps; and what is asked of the actor before its first update.

    old_logprobs, sum_pi_squared: whether anything needs its log-probs, the sums of its squared probabilities.
    """

    total_steps: int
    test_freq: int
    save_freq: int
    critic_warmup: int
    old_logprobs: bool
    sum_pi_squared: bool


@dataclass(slots=True)
class Driver:
    """One training run, ready to go."""

    state: TrainState
    source: SyncSource
    collector: Collector
    actor: Role
    reference: Role
    critic: Role
    advantages: AdvantageComputer
    loss_columns: LossColumns
    sync: WeightSync
    evaluation: Evaluation
    cadence: Cadence
    phases: Phases

    def step(self) -> tuple[Samples, Metrics]:
        """One training step; returns its samples, for people to look at, and its metrics."""
        step = self.state.step + 1
        samples, collected = self.collector.collect(self.state.order, step)
        with self.phases("annotate"):
            self.reference.annotate(samples, "ref_logprobs", step=step)
            self.critic.annotate(samples, "values", step=step)
            if self.cadence.old_logprobs:
                self.actor.annotate(samples, "old_logprobs", step=step)
            if self.cadence.sum_pi_squared:
                self.actor.annotate(samples, "sum_pi_squared", step=step)
            advantages, measured = self.advantages.compute(samples, self.state.kl)
            self.loss_columns.compute(samples, advantages, step=step)
        with self.phases("update"):
            metrics = update_metrics("critic", self.critic.update(samples, step=step))
            if step > self.cadence.critic_warmup:
                metrics |= update_metrics("actor", self.actor.update(samples, step=step))
        metrics |= self.publish()
        self.state.step = step
        return samples, metrics | collected | measured | sample_metrics(samples) | advantage_metrics(advantages)

    def publish(self) -> Metrics:
        """Gives the replicas the actor's weights of now."""
        with self.phases("sync"):
            self.source.wake_weights()
            report = self.sync.publish(self.state.weight_version + 1)
            self.source.wake_cache()
        self.state.weight_version = report.version
        return {
            "sync/weight_version": float(report.version),
            "sync/bytes": float(report.num_bytes),
            "sync/bytes_between_nodes": float(report.bytes_between_nodes),
            "sync/parameters": float(report.parameters),
        }

    def validate(self) -> tuple[Metrics, Samples | None]:
        """Held-out performance with the replicas' present weights."""
        with self.phases("validate"):
            return self.evaluation.run(self.source, seed=(VALIDATE, self.state.step))

    def is_validation_due(self) -> bool:
        """Every test_freq steps and after the last."""
        return self._is_due(self.cadence.test_freq)

    def is_checkpoint_due(self) -> bool:
        """Every save_freq steps and after the last; never if it is 0."""
        return self.cadence.save_freq != 0 and self._is_due(self.cadence.save_freq)

    def _is_due(self, freq: int) -> bool:
        return self.finished or (freq > 0 and self.state.step % freq == 0)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.state.step >= self.cadence.total_steps


def validation_sampling(
    training: SamplingSpec, *, n: int, temperature: float, top_p: float, top_k: int
) -> SamplingSpec:
    """Sampling of validation: as in training but for these."""
    return replace(training, n=n, temperature=temperature, top_p=top_p, top_k=top_k, logprobs="none")
