"""From token ids to scores: decoding by the tokenizer or by its backend alone, then the pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workers.protocol import RolloutBlock, ScoreRequest, Trajectory
from workers.reward.decoding import decoder_json, load_decoder
from workers.reward.function import RewardSpec
from workers.reward.worker import RewardWorker


def make_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token per character, joined without spaces."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate("0123456789 .")}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **options)


def trajectory(group: int, sample: int, text: str) -> Trajectory:
    ids = (*(int(c) + 3 for c in text), 1) if text else ()
    return Trajectory(group, sample, (5, 6), ids, "stop", 0)


BLOCK = RolloutBlock.collate(
    [trajectory(4, 0, "12"), trajectory(4, 1, "13"), trajectory(9, 0, "7"), trajectory(9, 1, "")]
)
REQUEST = ScoreRequest(data_source=("addition", ""), ground_truth=("12", 7), extra_info=({}, {}))


@pytest.mark.parametrize("handed_over", [True, False])
def test_scores_a_block(tmp_path: Path, handed_over: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    backend = decoder_json(tokenizer) if handed_over else None
    worker = RewardWorker(RewardSpec(None), str(tmp_path), 1, 5.0, tokenizer_json=backend)
    assert worker.ping()
    scores = worker.score(BLOCK, REQUEST)
    assert scores.rewards.tolist() == [1, 0, 1, 0] and set(scores.errors) == {""}
    assert len(worker.score(RolloutBlock.collate([]), REQUEST).rewards) == 0
    worker.close()


def test_the_backend_alone_decodes_to_the_same_text() -> None:
    tokenizer = make_tokenizer()
    batch = [[3, 4, 0, 5, 13, 14, 1], [], [2, 3], [1]]
    decode = load_decoder("unused", trust_remote_code=False, tokenizer_json=decoder_json(tokenizer))
    assert decode(batch) == tokenizer.batch_decode(batch, skip_special_tokens=True) == ["012 .", "", "0", ""]


def test_a_tokenizer_that_does_more_than_its_backend_is_not_reduced_to_it() -> None:
    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return str(super()._decode(*args, **kwargs)).upper()

    assert decoder_json(make_tokenizer(clean_up_tokenization_spaces=True)) is None
    assert decoder_json(Shouting(tokenizer_object=make_tokenizer().backend_tokenizer)) is None
    assert decoder_json(make_tokenizer(clean_up_tokenization_spaces=False)) is not None
