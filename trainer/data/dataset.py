"""A data set of prompts: read, checked, tokenised and cut to length once, before anything starts.

    dataset = PromptDataset.load(config.data, tokenizer, config.data.train_files, "data.train_files", max_samples=-1)

Every row is a dictionary with the columns of verl's data sets: the prompt (`data.prompt_key`, text or a list of chat
messages), the ground truth (`data.answer_key`, else reward_model.ground_truth, else answer), and if there are such,
the data source (`data.reward_fn_key`) and extra_info.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.data.files import Row, load_rows
from trainer.data.tokenise import Chat, TokenIds, tokenise
from workers.protocol import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config.schema import DataConfig


VERLS_SOURCE = "data_source"
"""The column that verl's data sets have; one of another name was asked for, and has to be there."""


@dataclass(frozen=True, slots=True)
class PromptDataset:
    """Prompts in the order of the files.

    prompts: `prompts[i].index == i`.
    num_truncated, num_filtered: prompts over data.max_prompt_length that were cut, and that were dropped.
    notices: sentences for the user, about what was changed or is missing.
    """

    prompts: list[Prompt]
    num_truncated: int
    num_filtered: int
    notices: tuple[str, ...]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    @staticmethod
    def load(
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        files: str | Sequence[str],
        key: str,
        *,
        max_samples: int,
    ) -> PromptDataset:
        """Read and tokenise `files`, the value of the configuration key `key`.

        max_samples: keep the first so many rows; -1: all.

        Raises ValueError, naming key, row and remedy, for files, columns or prompts that cannot be used, for a prompt
        over the length limit where data.truncation=error, and where no prompt is left.
        """
        rows = load_rows(files, max_samples, key=key)
        prompts = [_prompt_of(row, number, data, key) for number, row in enumerate(rows)]
        lengths = _LengthLimit(data, key)
        kept: list[Prompt] = []
        for number, (row, ids) in enumerate(zip(rows, tokenise(prompts, tokenizer, data), strict=True)):
            tokens = lengths.apply(ids, number)
            if tokens is not None:
                kept.append(_to_prompt(row, number, tokens, len(kept), data, key))
        if not kept:
            raise ValueError(
                f"{key}: all {len(rows)} prompts are longer than data.max_prompt_length={data.max_prompt_length} "
                "tokens and data.filter_overlong_prompts dropped them; raise the limit"
            )
        notices = lengths.notices() + _missing_answers(kept, data, key)
        return PromptDataset(kept, lengths.num_truncated, lengths.num_filtered, notices)


class _LengthLimit:
    """Applies data.max_prompt_length to one prompt after the other, and counts."""

    def __init__(self, data: DataConfig, key: str) -> None:
        self._data = data
        self._key = key
        self.num_truncated = 0
        self.num_filtered = 0

    def apply(self, ids: TokenIds, number: int) -> TokenIds | None:
        """The prompt within the limit, None if it is to be dropped."""
        limit = self._data.max_prompt_length
        if len(ids) <= limit:
            return ids
        if self._data.filter_overlong_prompts:
            self.num_filtered += 1
            return None
        if self._data.truncation == "error":
            raise ValueError(
                f"{self._key}: the prompt of row {number} has {len(ids)} tokens, more than data.max_prompt_length="
                f"{limit}; raise the limit, cut such prompts (data.truncation=left, right or middle) or drop them "
                "(data.filter_overlong_prompts=true)"
            )
        self.num_truncated += 1
        return truncate(ids, limit, self._data.truncation)

    def notices(self) -> tuple[str, ...]:
        limit = f"data.max_prompt_length={self._data.max_prompt_length} tokens"
        notices = []
        if self.num_truncated:
            how = f"cut (data.truncation={self._data.truncation})"
            notices.append(f"{self._key}: {self.num_truncated} prompts over {limit} were {how}")
        if self.num_filtered:
            notices.append(f"{self._key}: {self.num_filtered} prompts over {limit} were dropped")
        return tuple(notices)


def truncate(ids: TokenIds, limit: int, side: str) -> TokenIds:
    """`ids` with its left, right or middle cut away so that `limit` tokens remain."""
    if side == "left":
        return ids[-limit:]
    if side == "right":
        return ids[:limit]
    assert side == "middle"
    head = limit // 2
    return ids[:head] + ids[len(ids) - (limit - head) :]


def _prompt_of(row: Row, number: int, data: DataConfig, key: str) -> str | Chat:
    if data.prompt_key not in row:
        raise ValueError(_no_column(row, number, key, "data.prompt_key", data.prompt_key, "prompt"))
    prompt = _decoded(row[data.prompt_key])
    if isinstance(prompt, str) or _is_chat(prompt):
        return prompt  # type: ignore[no-any-return]  # checked above
    raise ValueError(
        f"{key}: the prompt of row {number} (data.prompt_key={data.prompt_key}) is {type(prompt).__name__} "
        f"{_short(prompt)}; it must be a string or a non-empty list of messages with role and content"
    )


def _decoded(prompt: Any) -> Any:
    """A chat that a file holds as JSON text, as ROLL's data sets do; everything else as it is."""
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("[{"):
        return prompt
    try:
        decoded = json.loads(prompt)
    except ValueError:
        return prompt
    return decoded if _is_chat(decoded) else prompt


def _is_chat(prompt: Any) -> bool:
    if not isinstance(prompt, list) or not prompt:
        return False
    return all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in prompt)


def _to_prompt(row: Row, number: int, tokens: TokenIds, index: int, data: DataConfig, key: str) -> Prompt:
    extra_info = row.get("extra_info")
    if extra_info is not None and not isinstance(extra_info, dict):
        raise ValueError(f"{key}: extra_info of row {number} is {type(extra_info).__name__}; it must be a dictionary")
    if data.reward_fn_key not in row and data.reward_fn_key != VERLS_SOURCE:
        raise ValueError(_no_column(row, number, key, "data.reward_fn_key", data.reward_fn_key, "data source"))
    source = row.get(data.reward_fn_key)
    return Prompt(
        index=index,
        token_ids=tokens,
        data_source="" if source is None else str(source),
        ground_truth=_ground_truth(row, number, data, key),
        extra_info=extra_info or {},
    )


def _ground_truth(row: Row, number: int, data: DataConfig, key: str) -> Any:
    if data.answer_key is not None:
        if data.answer_key not in row:
            raise ValueError(_no_column(row, number, key, "data.answer_key", data.answer_key, "ground truth"))
        return row[data.answer_key]
    reward_model = row.get("reward_model")
    if isinstance(reward_model, dict) and reward_model.get("ground_truth") is not None:
        return reward_model["ground_truth"]
    return row.get("answer")


def _missing_answers(prompts: list[Prompt], data: DataConfig, key: str) -> tuple[str, ...]:
    missing = sum(prompt.ground_truth is None for prompt in prompts)
    if not missing:
        return ()
    where = f"data.answer_key={data.answer_key}" if data.answer_key else "reward_model.ground_truth, answer"
    which = "no row has" if missing == len(prompts) else f"{missing} of {len(prompts)} rows have no"
    return (f"{key}: {which} a ground truth ({where}); the reward function gets None",)


def _no_column(row: Row, number: int, key: str, option: str, value: str, what: str) -> str:
    columns = ", ".join(row) or "none"
    return (
        f"{key}: row {number} has no column {option}={value}; its columns are: {columns}. "
        f"Set {option} to the column with the {what}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
