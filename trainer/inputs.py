"""What a run reads before anything starts: tokenizer, prompts, the model's shape and end-of-sequence tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.errors import raise_problems, show
from trainer.config.model import model_problems, unknown_override_notices
from trainer.config.roles import training_roles
from trainer.config.schema import Config, ModelConfig
from trainer.data.dataset import PromptDataset
from trainer.engines import parallel_spec
from workers.engines.megatron.architectures import check
from workers.imports import big_imports
from workers.reward.scorers import SCORERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

ACTOR = "actor_rollout_ref.actor"
_FINGERPRINT = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """model_path, tokenizer_path: absolute, or a hub name. hidden_size: of the model's config.

    override_config: of the model's config, as every part of a run reads it.
    fingerprint: what makes a checkpoint of this model this model's. eos_ids: tokens that end a response.
    notices: about the model, and how it is scored.
    """

    tokenizer: PreTrainedTokenizerBase
    train: PromptDataset
    validation: PromptDataset | None
    model_path: str
    tokenizer_path: str
    hidden_size: int
    override_config: dict[str, Any]
    fingerprint: dict[str, Any]
    eos_ids: tuple[int, ...]
    notices: tuple[str, ...]


def load_inputs(cfg: Config) -> Inputs:
    """Reads and checks everything. Raises ValueError naming the key for what cannot be used."""
    with big_imports():
        from transformers import AutoTokenizer

    model = cfg.actor_rollout_ref.model
    model_path, tokenizer_path = absolute(model.path), absolute(model.tokenizer_path)
    config = read_config(model, model.path, "actor_rollout_ref.model.path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"actor_rollout_ref.model.tokenizer_path={model.tokenizer_path}: cannot be loaded: {_told(error)}; give a "
            "directory with a tokenizer, or a hub name this machine can reach"
        ) from error
    fields = config.to_dict()
    raise_problems(list(model_problems(cfg, fields)))
    check_attention(fields, model.path, longest=cfg.max_sequence_length)
    check_engines(cfg)
    data = cfg.data
    train = PromptDataset.load(
        data, tokenizer, data.train_files, "data.train_files", max_samples=data.train_max_samples
    )
    validation = None
    if data.val_files is not None:
        validation = PromptDataset.load(
            data, tokenizer, data.val_files, "data.val_files", max_samples=data.val_max_samples
        )
    for key, dataset in (("data.train_files", train), ("data.val_files", validation)):
        if dataset is not None:
            check_vocabulary(
                [p.token_ids for p in dataset.prompts], int(fields["vocab_size"]), key, model.tokenizer_path
            )
            check_answers(cfg, dataset, key)
    return Inputs(
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        model_path=model_path,
        tokenizer_path=tokenizer_path,
        hidden_size=int(fields["hidden_size"]),
        override_config=_overrides(model),
        notices=(*_notices(model), *scorer_notices(cfg, train)),
        fingerprint={key: fields[key] for key in _FINGERPRINT if key in fields},
        eos_ids=_eos_ids(tokenizer.eos_token_id, config.eos_token_id, model_path),
    )


def check_attention(fields: dict[str, Any], path: str, *, longest: int) -> None:
    """Raises ValueError for a model whose attention is not plain causal attention over `longest` tokens.

    fields: of its Hugging Face config.
    """
    layers = fields.get("layer_types")
    windowed = "sliding_attention" in layers if layers else fields.get("use_sliding_window", True)
    window = fields.get("sliding_window")
    too_short = windowed and window is not None and window < longest
    refused = {
        f"a sliding window of {window} tokens, less than the {longest} of data.max_prompt_length + "
        "data.max_response_length": too_short,
        "capped attention scores (attn_logit_softcapping)": fields.get("attn_logit_softcapping") is not None,
        "attention sinks": fields.get("model_type") == "gpt_oss",
    }
    reasons = [reason for reason, holds in refused.items() if holds]
    if reasons:
        raise ValueError(
            f"actor_rollout_ref.model.path={path}: the model has {' and '.join(reasons)}, which packed training does "
            "not compute; use another model, or shorter sequences where only the window is in the way"
        )


def check_engines(cfg: Config) -> None:
    """Raises ValueError for a model that the engine of a role cannot hold, or not cut up as the role says."""
    model = cfg.actor_rollout_ref.model
    problems: dict[str, str] = {}
    for role in training_roles(cfg):
        key, path = ("critic", cfg.critic.model.path) if role.name == "critic" else ("actor_rollout_ref", model.path)
        config = read_config(model, path, f"{key}.model.path")
        if role.megatron is None:
            check_experts(config.to_dict(), path)
            continue
        for told in [*check(config, parallel_spec(role)), *_files_for_megatron(path)]:
            where = role.key if told.startswith("strategy") else role.engine_key
            where = f"{ACTOR}.megatron" if told.startswith("sequence_parallel") else where  # holds for every role
            problems.setdefault(told, f"{where}.{told}")  # the reference's are the actor's, unless told otherwise
    raise_problems(list(problems.values()))


def _files_for_megatron(path: str) -> Iterator[str]:
    """What it cannot read: it takes slices of safetensors, named as Hugging Face names them. (Of a hub name it fetches
    nothing else.)"""
    directory = Path(absolute(path))
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        if lacking := sorted(name for name in named if not (directory / name).is_file()):
            yield (
                f"strategy=megatron reads safetensors, and {path} lacks {len(lacking)} of the {len(named)} files that "
                f"its index names ({lacking[0]}): fetch or save the model again"
            )
    elif directory.is_dir() and not (directory / "model.safetensors").is_file():
        yield f"strategy=megatron reads safetensors, and {path} has none: save the model as such, or use fsdp"


def read_config(model: ModelConfig, path: str, key: str) -> PreTrainedConfig:
    """A model's Hugging Face config, with model.override_config. Raises ValueError naming `key` if there is none."""
    from workers.engines.models import change_config, hf_config

    try:
        config = hf_config(absolute(path), trust_remote_code=model.trust_remote_code, override_config={})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={path}: config cannot be loaded: {_told(error)}; give a directory with a Hugging Face checkpoint, "
            "or a hub name this machine can reach"
        ) from error
    try:
        change_config(config, model.override_config)
    except Exception as error:  # whatever the class of the config checks its fields with
        raise ValueError(
            f"actor_rollout_ref.model.override_config={show(model.override_config)}: the model's config does not take "
            f"it: {' '.join(str(error).split())}; correct it"
        ) from error
    return config


def _told(error: Exception) -> str:
    """Its first sentences, on one line."""
    return " ".join(str(error).partition("\n")[0].split()).rstrip(".")


def _overrides(model: ModelConfig) -> dict[str, Any]:
    from workers.engines.models import config_overrides

    return config_overrides(
        absolute(model.path), trust_remote_code=model.trust_remote_code, override_config=model.override_config
    )


def _notices(model: ModelConfig) -> tuple[str, ...]:
    """About model.override_config; code that ships with the checkpoint may read whatever it likes."""
    if not model.override_config or model.trust_remote_code:
        return ()
    plain = read_config(model.model_copy(update={"override_config": {}}), model.path, "actor_rollout_ref.model.path")
    return tuple(unknown_override_notices(model.override_config, plain.to_dict()))


def check_experts(fields: dict[str, Any], path: str) -> None:
    """Raises ValueError for a mixture of experts: FSDP holds its experts under other names than vLLM loads."""
    experts = next((fields[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if fields.get(k)), 0)
    if experts > 1:
        raise ValueError(
            f"actor_rollout_ref.model.path={path}: a mixture of {experts} experts, whose weights FSDP cannot hand to "
            "vLLM; train it with strategy=megatron, or use a dense model"
        )


def check_vocabulary(prompts: Sequence[Sequence[int]], vocab_size: int, key: str, tokenizer_path: str) -> None:
    """Raises ValueError for a prompt with a token id that the model has no row for."""
    for number, token_ids in enumerate(prompts):
        if max(token_ids) >= vocab_size:
            raise ValueError(
                f"{key}: prompt {number} has token id {max(token_ids)}, outside the model's vocabulary of "
                f"{vocab_size}; actor_rollout_ref.model.tokenizer_path={tokenizer_path} is another model's tokenizer"
            )


def check_answers(cfg: Config, dataset: PromptDataset, key: str) -> None:
    """Raises ValueError for rows without a ground truth where a built-in scorer has to compare with it."""
    missing = sum(prompt.ground_truth is None for prompt in dataset.prompts)
    if missing and cfg.reward.custom_reward_function.path is None:
        raise ValueError(
            f"{key}: {missing} of {len(dataset)} rows have no ground truth, and without reward.custom_reward_function."
            "path a response is compared with it; set data.answer_key to the column with the answer, or "
            "reward.custom_reward_function.path to a function that needs none"
        )


def scorer_notices(cfg: Config, train: PromptDataset) -> Iterator[str]:
    """Data sources for which a built-in scorer was expected and is not there."""
    if cfg.reward.custom_reward_function.path is not None:
        return
    sources = {prompt.data_source for prompt in train.prompts} - {""}
    if unknown := sorted(sources - SCORERS.keys()):
        shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        yield (
            f"data.reward_fn_key={cfg.data.reward_fn_key}: no built-in scorer for {shown} (there is one for "
            f"{', '.join(SCORERS)}), so a response gets 1 if it equals the ground truth, else 0; "
            "reward.custom_reward_function.path scores otherwise"
        )


def absolute(path: str) -> str:
    """A local path made absolute (workers may run elsewhere); a hub name as it is."""
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


def _eos_ids(*sources: Any) -> tuple[int, ...]:
    """Union of the tokenizer's, the config's and generation_config.json's ends of sequence."""
    *given, model_path = sources
    generation = Path(model_path) / "generation_config.json"
    if generation.is_file():
        given.append(json.loads(generation.read_text()).get("eos_token_id"))
    found: list[int] = []
    for value in given:
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(sorted(set(found)))
