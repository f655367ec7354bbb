"""Prompts to token ids, once per row: plain text through the tokenizer, chats through its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config.schema import DataConfig

Chat = list[dict[str, Any]]
TokenIds = tuple[int, ...]

_OURS = ("tokenize", "return_dict", "return_tensors", "padding", "truncation", "chat_template")


def tokenise(prompts: Sequence[str | Chat], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[TokenIds]:
    """Token ids of every prompt, special tokens included.

    Plain text gets the special tokens that the tokenizer adds by default; a chat gets exactly what its template writes.

    Raises ValueError for a chat without a chat template, for a template that refuses a chat (naming the row), and for
    a prompt of no tokens.
    """
    ids: list[TokenIds] = [()] * len(prompts)
    texts = {row: prompt for row, prompt in enumerate(prompts) if isinstance(prompt, str)}
    chats = {row: prompt for row, prompt in enumerate(prompts) if not isinstance(prompt, str)}
    for row, tokens in zip(texts, _tokenise_texts(list(texts.values()), tokenizer), strict=True):
        ids[row] = tokens
    for row, tokens in zip(chats, _tokenise_chats(chats, tokenizer, data), strict=True):
        ids[row] = tokens
    for row, tokens in enumerate(ids):
        if not tokens:
            raise ValueError(
                f"data.prompt_key={data.prompt_key}: the prompt of row {row} has no tokens; remove the row"
            )
    return ids


def _tokenise_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[TokenIds]:
    if not texts:
        return []
    batch = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)["input_ids"]
    return [_without_second_bos(tuple(tokens), tokenizer.bos_token_id) for tokens in batch]


def _without_second_bos(tokens: TokenIds, bos: int | None) -> TokenIds:
    """A text that already begins with the BOS token gets another one from the tokenizer."""
    return tokens[1:] if bos is not None and tokens[:2] == (bos, bos) else tokens


def _tokenise_chats(chats: dict[int, Chat], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[TokenIds]:
    if not chats:
        return []
    options = _template_options(tokenizer, data)
    try:
        encoded: Any = tokenizer.apply_chat_template(list(chats.values()), **options)
    except Exception:
        for row, chat in chats.items():
            _try_chat(row, chat, tokenizer, options)
        raise
    return [tuple(tokens) for tokens in encoded["input_ids"]]


def _try_chat(row: int, chat: Chat, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    try:
        tokenizer.apply_chat_template(chat, **options)
    except Exception as error:
        raise ValueError(
            f"the chat template cannot render the prompt of row {row}: {type(error).__name__}: {error}; change the "
            "row, or the template (data.chat_template, data.apply_chat_template_kwargs)"
        ) from error


def _template_options(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> dict[str, Any]:
    taken = [name for name in _OURS if name in data.apply_chat_template_kwargs]
    if taken:
        raise ValueError(f"data.apply_chat_template_kwargs.{taken[0]} cannot be set; the program decides it")
    if data.chat_template is None and not tokenizer.chat_template:
        raise ValueError(
            f"data.prompt_key={data.prompt_key} holds chats, but the tokenizer has no chat template; set "
            "data.chat_template to a Jinja template (text or a file), or use plain strings as prompts"
        )
    options = {"add_generation_prompt": True, **data.apply_chat_template_kwargs, "tokenize": True, "return_dict": True}
    if data.chat_template is not None:
        options["chat_template"] = _read_template(data.chat_template)
    return options


def _read_template(template: str) -> str:
    if "{" in template:
        return template
    file = Path(template).expanduser()
    if not file.is_file():
        raise ValueError(f"data.chat_template={template} is neither a Jinja template (it has no braces) nor a file")
    return file.read_text(encoding="utf-8")
