"""What kind of value those keys of ROLL's take with which the translation computes; of the others our keys judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from trainer.config.errors import show
from trainer.config.roll.defaults import DEFAULTS
from trainer.config.roll.rules import nearest


@dataclass(frozen=True, slots=True)
class Kind:
    """words: what a value must be, for the message. fits: whether one is."""

    words: str
    fits: Callable[[Any], bool]


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number", lambda value: type(value) is int)
COUNT = Kind("a whole number of at least 1", lambda value: type(value) is int and value > 0)
NUMBER = Kind("a number", lambda value: type(value) in (int, float))
SECTION = Kind("a section", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
TEXT = Kind("text", lambda value: isinstance(value, str))
TEXTS = Kind(
    "text or a list of texts",
    lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)),
)
FLAG_OR_TEXT = Kind("true, false or a path", lambda value: isinstance(value, bool | str))

_PACKING = "sequence_packing_args"
_OF_DEFAULT: Mapping[type, Kind] = {bool: FLAG, int: WHOLE, float: NUMBER, dict: SECTION}
_OWN: Mapping[str, Kind] = {
    **dict.fromkeys(
        (
            "rollout_batch_size",
            "num_return_sequences_in_group",
            "num_gpus_per_node",
            "prompt_length",
            "response_length",
            "sequence_length",
            "reference.infer_batch_size",
            *(
                f"{role}.training_args.{name}"
                for role in ("actor_train", "critic")
                for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
            ),
            *(f"{role}.{_PACKING}.max_packed_sequence_length_train" for role in ("actor_train", "critic")),
            f"reference.{_PACKING}.max_packed_sequence_length_forward",
        ),
        COUNT,
    ),
    **dict.fromkeys(("reward_clip", "advantage_clip", "rpc_timeout", "value_clip", "target_kl"), NUMBER),
    **dict.fromkeys(("exp_name", "output_dir", "pretrain", "reward_pretrain", "tracker_kwargs.project"), TEXT),
    **dict.fromkeys(("actor_train.data_args.file_name", "validation.data_args.file_name"), TEXTS),
    **dict.fromkeys(("checkpoint_config.output_dir", "global_template", "actor_train.data_args.template"), TEXT),
    "max_ckpt_to_keep": WHOLE,
    "reference.max_tokens_per_microbatch_in_infer": WHOLE,
    "resume_from_checkpoint": FLAG_OR_TEXT,
    "train_infer_correction.filters": LIST,
}
_OF_STRATEGY: Mapping[str, Kind] = {
    **dict.fromkeys(
        (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "tensor_parallel_size",
        ),
        COUNT,
    ),
    **dict.fromkeys(("offload_policy", "optimizer_cpu_offload"), FLAG),
    "lr_scheduler_kwargs": SECTION,
}
_OF_REWARD: Mapping[str, Kind] = {
    "world_size": WHOLE,
    "tag_included": LIST,
    "query_filter_config.filter_args": SECTION,
}
_OF_RATIO: Mapping[str, Kind] = {
    "agg_type": TEXT,
    **dict.fromkeys(("enabled", "ratio_enabled", "diff_enabled"), FLAG),
    **dict.fromkeys(("ratio_low", "ratio_high", "diff_low", "diff_high"), NUMBER),
}
_OF_GROUPS: Mapping[str, Kind] = dict.fromkeys(("threshold_up", "threshold_down", "std_threshold"), NUMBER)


def fits(path: str, value: Any) -> bool:
    """Whether a value may stand at a key of ROLL's."""
    return not any(wrong_values(path, value))


def wrong_values(path: str, value: Any) -> Iterator[str]:
    """What is wrong with the value of a key of ROLL's, and with those of the options that it holds."""
    if value is None:
        return
    kind = _kind(path)
    if kind is not None and not kind.fits(value):
        yield _problem(path, value, kind)
    elif path.endswith(".strategy_args.strategy_config") and isinstance(value, dict):
        for name, below in value.items():
            if name in _OF_STRATEGY and below is not None and not _OF_STRATEGY[name].fits(below):
                yield _problem(f"{path}.{name}", below, _OF_STRATEGY[name])
    elif path.endswith(".query_filter_config.filter_args"):
        yield from _options(path, value, _OF_GROUPS)
    elif path == "train_infer_correction.filters":
        for number, rule in enumerate(value):
            yield from _options(f"{path}[{number}]", rule, _OF_RATIO)


def _kind(path: str) -> Kind | None:
    if path.startswith("rewards."):
        return _OF_REWARD.get(path.split(".", 2)[-1])
    return _OWN.get(path) or _OF_DEFAULT.get(type(DEFAULTS.get(path)))


def _options(path: str, value: Any, kinds: Mapping[str, Kind]) -> Iterator[str]:
    if not isinstance(value, dict):
        yield _problem(path, value, SECTION)
        return
    for name, below in value.items():
        if name not in kinds:
            likely = nearest(str(name), dict(kinds))
            remedy = f"did you mean {likely}?" if likely else f"choose among {', '.join(kinds)}"
            yield f"roll.{path}.{name}={show(below)}: ROLL has no such option; {remedy}"
        elif below is not None and not kinds[name].fits(below):
            yield _problem(f"{path}.{name}", below, kinds[name])


def _problem(path: str, value: Any, kind: Kind) -> str:
    if kind is LIST and not isinstance(value, dict):
        return f"roll.{path}={show(value)}: must be a list; write [{show(value)}]"
    if isinstance(value, str) and kind.fits(_unquoted(value)):
        return f"roll.{path}='{value}': must be {kind.words}; take the quotes off"
    return f"roll.{path}={show(value)}: must be {kind.words}; correct it"


def _unquoted(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
