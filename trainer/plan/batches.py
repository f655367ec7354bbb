"""How many of what: prompts, sequences, mini- and micro-batches, steps.

Micro-batches are told for sequences as long as the configuration allows; shorter ones make fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config.roles import TrainingRole, training_roles
from trainer.config.schema import ActorConfig, Config, CriticConfig, RefConfig
from trainer.plan.places import ranks_of
from trainer.specs import Sizes

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Micro:
    """Passes of one data-parallel rank over its share of some prompts, every sequence as long as it may be.

    number: of micro-batches; sequences, tokens: in the largest of them. tokens: rows of the model's input.
    """

    number: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What one micro-batch may hold, and what the sequences are. prompt, response: their most tokens; samples: to one
    prompt; share_prompt: a prompt that several have in common is there once."""

    tokens: int
    sequences: int | None
    prompt: int
    response: int
    samples: int
    share_prompt: bool

    def micro(self, sequences: int) -> Micro:
        """The micro-batches of one rank's so many sequences."""
        if sequences < 1:
            return Micro(0, 0, 0)
        most = min(self._fitting(), self.sequences or sequences, sequences)
        number = -(-sequences // most)
        largest = -(-sequences // number)
        if self.share_prompt and 1 < self.samples <= most:  # whole groups stay together
            largest = min(most, -(-largest // self.samples) * self.samples)
        return Micro(number, largest, self.rows(largest))

    def rows(self, sequences: int) -> int:
        """Tokens that so many sequences take."""
        prompts = -(-sequences // self.samples) if self.share_prompt else sequences
        return prompts * self.prompt + sequences * self.response

    def _fitting(self) -> int:
        """Sequences that the token budget allows, at least one."""
        if not self.share_prompt:
            return max(1, self.tokens // (self.prompt + self.response))
        group = self.prompt + self.samples * self.response
        groups, left = divmod(self.tokens, group)
        return max(1, groups * self.samples + max(0, (left - self.prompt) // self.response))


def warmup_problems(cfg: Config, sizes: Sizes) -> tuple[list[str], list[str]]:
    """(problems, warnings): warm-ups that a run of total_epochs does not outlast; of a given number of steps the checks
    of the configuration tell it."""
    if cfg.trainer.total_training_steps is not None:
        return [], []
    run = f"{sizes.total_steps} steps (trainer.total_epochs={cfg.trainer.total_epochs} over the training prompts)"
    problems, warmup = [], cfg.trainer.critic_warmup
    if warmup >= sizes.total_steps:
        problems.append(
            f"trainer.critic_warmup={warmup}: the run has {run}, so the policy would never be trained; set "
            f"trainer.critic_warmup={sizes.total_steps // 10}, or more epochs"
        )
    warnings = [
        f"{role.key}.optim.lr_warmup_steps={role.config.optim.lr_warmup_steps}: the run has {run} with {updates} "
        f"updates each, and {role.key}.optim.lr is never reached"
        for role, updates in _updates(cfg, sizes)
        if not isinstance(role.config, RefConfig) and role.config.optim.lr_warmup_steps >= sizes.total_steps * updates
    ]
    return problems, warnings


def _updates(cfg: Config, sizes: Sizes) -> list[tuple[TrainingRole, int]]:
    """The trained roles, and their updates in a step."""
    each = {"actor": sizes.actor_updates_per_step, "critic": sizes.critic_updates_per_step}
    return [(role, each[role.name]) for role in training_roles(cfg) if role.name in each]


def budget_of(cfg: Config, role: TrainingRole) -> Budget:
    """Of a role's passes, forward and update alike."""
    config, data = role.config, cfg.data
    if isinstance(config, RefConfig):
        tokens, sequences = config.log_prob_max_token_len_per_gpu, None
    else:
        tokens, sequences = config.ppo_max_token_len_per_gpu, config.ppo_micro_batch_size_per_gpu
    model = cfg.actor_rollout_ref.model
    lengths = data.max_prompt_length, data.max_response_length
    return Budget(tokens, sequences, *lengths, cfg.actor_rollout_ref.rollout.n, model.share_prompt)


def forward_micro(cfg: Config, role: TrainingRole, data_size: int) -> Micro:
    """Of a pass over a whole step's batch."""
    sequences = cfg.data.train_batch_size * cfg.actor_rollout_ref.rollout.n
    return budget_of(cfg, role).micro(-(-sequences // data_size))


def update_micro(cfg: Config, role: TrainingRole, data_size: int) -> Micro:
    """Of one optimizer step."""
    assert isinstance(role.config, ActorConfig | CriticConfig)
    sequences = role.config.ppo_mini_batch_size * cfg.actor_rollout_ref.rollout.n
    return budget_of(cfg, role).micro(-(-sequences // data_size))


def batch_record(cfg: Config, sizes: Sizes, *, train: int, validation: int) -> Row:
    """All derived sizes, for programs. train, validation: prompts there are."""
    data, rollout = cfg.data, cfg.actor_rollout_ref.rollout
    record: Row = {
        "training_prompts": train,
        "validation_prompts": validation,
        "prompts_per_step": data.train_batch_size,
        "sequences_per_step": data.train_batch_size * rollout.n,
        "max_tokens_per_sequence": cfg.max_sequence_length,
        "steps_per_epoch": sizes.steps_per_epoch,
        "total_steps": sizes.total_steps,
    }
    updates = {"actor": sizes.actor_updates_per_step, "critic": sizes.critic_updates_per_step}
    roles: Row = {}
    for role in training_roles(cfg):
        data_size = len(ranks_of(role, cfg.num_devices)) // role.ranks_per_model
        passes: Row = {"data_parallel": data_size, "forward": _micro_row(forward_micro(cfg, role, data_size))}
        if isinstance(role.config, ActorConfig | CriticConfig):
            prompts = role.config.ppo_mini_batch_size
            passes |= {
                "prompts_per_mini_batch": prompts,
                "sequences_per_mini_batch": prompts * rollout.n,
                "updates_per_step": updates[role.name],
                "update": _micro_row(update_micro(cfg, role, data_size)),
            }
        roles[role.name] = passes
    return record | {"roles": roles}


def _micro_row(micro: Micro) -> Row:
    return {"micro_batches": micro.number, "max_sequences": micro.sequences, "max_tokens": micro.tokens}


def batch_lines(record: Row) -> Row:
    """The same for people: name to value."""
    lines: Row = {
        "training prompts": record["training_prompts"],
        "validation prompts": record["validation_prompts"],
        "prompts per step (data.train_batch_size)": record["prompts_per_step"],
        "responses per step (x rollout.n)": record["sequences_per_step"],
    }
    roles = record["roles"]
    assert isinstance(roles, dict)
    for name, passes in roles.items():
        if "update" in passes:
            micro = passes["update"]
            lines[f"{name}: updates per step"] = passes["updates_per_step"]
            lines[f"{name}: responses per mini-batch"] = passes["sequences_per_mini_batch"]
        else:
            micro = passes["forward"]
        of_each = f"{micro['micro_batches']:,} x {micro['max_sequences']:,} responses, {micro['max_tokens']:,} tokens"
        lines[f"{name}: micro-batches of a rank, at most"] = of_each
    return lines | {"steps per epoch": record["steps_per_epoch"], "steps in all": record["total_steps"]}
