"""Token ids to text for the reward function, without importing transformers where that cannot change the text.

Importing AutoTokenizer pulls in torch: seconds of a start and hundreds of megabytes in a process that only decodes. The
driver has the tokenizer anyway, so it can hand over the part that decodes (`decoder_json`), which the small
`tokenizers` library runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Decode = Callable[[list[list[int]]], list[str]]
"""Batch of token ids to texts, special tokens left out."""


def decoder_json(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's backend as JSON if the backend alone decodes to the same text; None if it might not.

    It might not where the tokenizer is written in Python, overrides decoding, or cleans up spaces afterwards.
    """
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.clean_up_tokenization_spaces:
        return None
    methods = ("decode", "batch_decode", "_decode")
    if any(vars(kind).keys() & set(methods) for kind in _own_classes(type(tokenizer), PreTrainedTokenizerFast)):
        return None
    return str(tokenizer.backend_tokenizer.to_str())


def _own_classes(kind: type, base: type) -> list[type]:
    """The classes that make `kind` more than `base`."""
    return [c for c in kind.__mro__ if c not in base.__mro__]


def load_decoder(tokenizer_path: str, *, trust_remote_code: bool, tokenizer_json: str | None) -> Decode:
    """A decoder from `decoder_json`'s result, or from the tokenizer at `tokenizer_path` where that is None."""
    if tokenizer_json is not None:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(tokenizer_json)
        return lambda batch: backend.decode_batch(batch, skip_special_tokens=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
    return lambda batch: tokenizer.batch_decode(batch, skip_special_tokens=True)
