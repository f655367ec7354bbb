"""Lengths, batches and token budgets: ROLL counts sequences per device, this prompts per update and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.config.roll.engines import SECTIONS
from trainer.config.roll.tree import Translation

_N = "num_return_sequences_in_group"


def translate_batches(into: Translation, roles: Sequence[str], devices: dict[str, tuple[int, ...]]) -> None:
    """Translate lengths, batch sizes and what a micro-batch may hold."""
    length = _lengths(into)
    into.copy("data.train_batch_size", "rollout_batch_size")
    into.copy("actor_rollout_ref.rollout.n", _N)
    into.copy("actor_rollout_ref.actor.ppo_epochs", "ppo_epochs")
    for role in roles:
        if role == "reference":
            _reference_budget(into, length)
            continue
        where = role if role in devices else "actor_train"  # a critic without a mapping goes where the actor is
        _mini_batch(into, role, len(devices[where]) if where in devices else 1)
        _training_budget(into, role, length)
    if "critic" in roles:
        into.put("critic.ppo_epochs", 1, "ppo_epochs")


def _lengths(into: Translation) -> int:
    """Translate prompt and response length; return their sum, in tokens."""
    roll = into.roll
    prompt, response, total = (roll.value(f"{name}_length") for name in ("prompt", "response", "sequence"))
    into.copy("data.max_prompt_length", "prompt_length")
    into.put("data.filter_overlong_prompts", True, "prompt_length")
    if total is not None:
        if total <= prompt:
            into.refuse("sequence_length", f"leaves no response after prompt_length={prompt}", "set it higher")
        into.put("data.max_response_length", total - prompt, "sequence_length", "prompt_length")
        return int(total)
    if response is None:
        into.problems.append("roll.response_length=null: neither it nor sequence_length is given; set one of them")
        return int(prompt)
    into.copy("data.max_response_length", "response_length")
    return int(prompt + response)


def _mini_batch(into: Translation, role: str, num_devices: int) -> None:
    """Sequences of one update on all devices, as prompts: ROLL's backward batch over the data-parallel ranks."""
    roll, training = into.roll, f"{role}.training_args"
    each, steps = roll.value(f"{training}.per_device_train_batch_size"), f"{training}.gradient_accumulation_steps"
    ranks, n, batch = _data_parallel(into, role, num_devices), roll.value(_N), roll.value("rollout_batch_size")
    sequences = each * roll.value(steps) * ranks
    key, paths = f"{SECTIONS[role]}.ppo_mini_batch_size", (f"{training}.per_device_train_batch_size", steps, _N)
    if sequences >= batch * n:
        into.put(key, batch, *paths, "rollout_batch_size")
        if sequences > batch * n:
            into.tell(
                f"roll.{steps}={roll.value(steps)}: an update of {each} x {roll.value(steps)} x {ranks} = {sequences} "
                f"sequences is more than the {batch * n} of a step; each step is one update",
                key,
            )
    elif sequences % n:
        whole = each * ranks
        near = max(1, round(sequences / math.lcm(whole, n))) * math.lcm(whole, n) // whole
        into.refuse(
            steps,
            f"an update of {each} x {roll.value(steps)} x {ranks} data-parallel ranks = {sequences} sequences cuts a "
            f"group of {_N}={n}, and an update holds whole groups",
            f"set it to {near}",
            key,
        )
    else:
        into.put(key, sequences // n, *paths, f"{role}.device_mapping")
        into.put(f"{SECTIONS[role]}.shuffle", True, *paths)


def _data_parallel(into: Translation, role: str, num_devices: int) -> int:
    """Ranks that get sequences of their own: with Megatron, one copy of the model; our keys win over the file's."""
    section, cut = SECTIONS[role], 1
    strategy = into.given.get(f"{section}.strategy") or into.roll.value(f"{role}.strategy_args.strategy_name")
    if str(strategy).startswith("megatron"):
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            ours = into.given.get(f"{section}.megatron.{name}")
            cut *= ours if type(ours) is int and ours > 0 else into.roll.strategy_config(role).either(name, 1)
    return max(1, num_devices // cut)


def _training_budget(into: Translation, role: str, length: int) -> None:
    """Tokens of a micro-batch: what ROLL's padded micro-batch holds, never less than one sequence."""
    roll, path = into.roll, f"{role}.training_args.per_device_train_batch_size"
    budget, paths = roll.value(path) * length, [path]
    if roll.value(f"{role}.use_dynamic_batching_in_train"):
        paths = [f"{role}.max_tokens_per_microbatch_in_train"]
        budget = roll.value(paths[0])
    elif roll.value(f"{role}.use_sequence_packing"):
        packed = f"{role}.sequence_packing_args.max_packed_sequence_length_train"
        if roll.has(packed):
            budget, paths = roll.value(packed), [packed]
    into.put(f"{SECTIONS[role]}.ppo_max_token_len_per_gpu", max(budget, length), *paths)


def _reference_budget(into: Translation, length: int) -> None:
    roll, path = into.roll, "reference.infer_batch_size"
    budget, paths = roll.value(path) * length, [path]
    if roll.value("reference.use_dynamic_batching_in_infer"):
        paths = ["reference.max_tokens_per_microbatch_in_infer"]
        budget = roll.value(paths[0]) or length
    elif roll.value("reference.use_sequence_packing"):
        packed = "reference.sequence_packing_args.max_packed_sequence_length_forward"
        if roll.has(packed):
            budget, paths = roll.value(packed), [packed]
    key = "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"
    into.put(key, max(budget, length), *paths)
    if roll.has(path):
        into.tell(
            f"roll.{path}={roll.value(path)}: sequences of one forward pass of the reference, as a budget of "
            f"{max(budget, length)} tokens; no part in the update",
            key,
        )
