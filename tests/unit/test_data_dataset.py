"""Rows to tokenised prompts: templates, special tokens, answers, length limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trainer.config.schema import DataConfig
from trainer.data.dataset import PromptDataset, truncate

BOS, EOS, UNK = 0, 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role[0] }}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a{{ hint | default('') }}{% endif %}"
)


def make_tokenizer(*, bos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character; adds BOS to plain text if asked to."""
    characters = "0123456789+=abcdefghijklmnopqrstuvwxyz \n"
    vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": UNK} | {c: i + 3 for i, c in enumerate(characters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    tokenizer.chat_template = template
    return tokenizer


def config(**changes: Any) -> DataConfig:
    defaults = yaml.safe_load((Path(__file__).parents[2] / "configs/ppo_trainer.yaml").read_text())["data"]
    return DataConfig.model_validate({**defaults, "train_files": "unused", **changes})


def load(tmp_path: Path, rows: list[Any], tokenizer: Any = None, **changes: Any) -> PromptDataset:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer or make_tokenizer()
    return PromptDataset.load(config(**changes), tokenizer, str(path), "data.train_files", max_samples=-1)


def chat(content: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def test_plain_prompts(tmp_path: Path) -> None:
    dataset = load(tmp_path, [{"prompt": "12+3=", "answer": "15"}, {"prompt": "4+4=", "answer": "8"}])
    assert len(dataset) == 2 and dataset.notices == ()
    first = dataset.prompts[0]
    assert first.token_ids == (4, 5, 13, 6, 14)
    assert (first.index, first.ground_truth, first.data_source, first.extra_info) == (0, "15", "", {})


def test_plain_prompts_get_the_tokenizers_own_bos_once(tmp_path: Path) -> None:
    dataset = load(tmp_path, [{"prompt": "1"}, {"prompt": "<s>1"}], make_tokenizer(bos=True))
    assert [p.token_ids for p in dataset.prompts] == [(BOS, 4), (BOS, 4)]


def test_chats_get_exactly_what_the_template_writes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=True, template=TEMPLATE)
    dataset = load(tmp_path, [{"prompt": chat("1")}, {"prompt": "1"}, {"prompt": chat("22")}], tokenizer)
    texts = [tokenizer.decode(p.token_ids).replace(" ", "") for p in dataset.prompts]
    assert [p.token_ids.count(BOS) for p in dataset.prompts] == [1, 1, 1]
    assert texts == ["<s>u1\na", "<s>1", "<s>u22\na"]


def test_a_chat_may_be_json_text_as_in_rolls_files(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=TEMPLATE)
    rows = [{"prompt": chat("1")}, {"prompt": json.dumps(chat("1"))}, {"prompt": '[{"no": 1}]'}, {"prompt": "[{1"}]
    prompts = load(tmp_path, rows, tokenizer).prompts
    assert prompts[0].token_ids == prompts[1].token_ids
    assert len({prompts[i].token_ids for i in (0, 2, 3)}) == 3


def test_template_and_its_arguments_come_from_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    for template in (TEMPLATE, str(file)):
        dataset = load(
            tmp_path, [{"prompt": chat("1")}], chat_template=template, apply_chat_template_kwargs={"hint": "z"}
        )
        assert len(dataset.prompts[0].token_ids) == 6  # BOS u 1 newline a z
    with pytest.raises(ValueError, match=r"data\.chat_template=nowhere\.jinja is neither"):
        load(tmp_path, [{"prompt": chat("1")}], chat_template="nowhere.jinja")
    with pytest.raises(ValueError, match=r"data\.apply_chat_template_kwargs\.tokenize"):
        load(
            tmp_path,
            [{"prompt": chat("1")}],
            make_tokenizer(template=TEMPLATE),
            apply_chat_template_kwargs={"tokenize": False},
        )


def test_a_chat_needs_a_template_that_accepts_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no chat template; set data\.chat_template"):
        load(tmp_path, [{"prompt": chat("1")}])
    with pytest.raises(ValueError, match=r"prompt of row 1: TemplateError: no tools here"):
        load(tmp_path, [{"prompt": chat("1")}, {"prompt": chat("1", "tool")}], make_tokenizer(template=TEMPLATE))


def test_where_the_ground_truth_comes_from(tmp_path: Path) -> None:
    row = {"prompt": "1", "reward_model": {"ground_truth": "verl"}, "answer": "plain", "label": "own"}
    assert load(tmp_path, [row]).prompts[0].ground_truth == "verl"
    assert load(tmp_path, [row], answer_key="label").prompts[0].ground_truth == "own"
    assert load(tmp_path, [{**row, "reward_model": None}]).prompts[0].ground_truth == "plain"
    with pytest.raises(
        ValueError, match=r"data\.answer_key=nope; its columns are: prompt, reward_model, answer, label"
    ):
        load(tmp_path, [row], answer_key="nope")


def test_missing_ground_truth_is_a_notice(tmp_path: Path) -> None:
    assert "no row has a ground truth" in load(tmp_path, [{"prompt": "1"}]).notices[0]
    assert "1 of 2 rows have no" in load(tmp_path, [{"prompt": "1"}, {"prompt": "1", "answer": "1"}]).notices[0]


def test_data_source_and_extra_info(tmp_path: Path) -> None:
    prompt = load(tmp_path, [{"prompt": "1", "data_source": "openai/gsm8k", "extra_info": {"index": 3}}]).prompts[0]
    assert (prompt.data_source, prompt.extra_info) == ("openai/gsm8k", {"index": 3})
    with pytest.raises(ValueError, match="extra_info of row 0 is str"):
        load(tmp_path, [{"prompt": "1", "extra_info": "text"}])


def test_the_prompt_column_must_be_there_and_hold_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column data\.prompt_key=prompt; its columns are: question, answer\."):
        load(tmp_path, [{"question": "1", "answer": "1"}])
    for bad in (3, None, [], ["1"], [{"content": "1"}], {"role": "user", "content": "1"}):
        with pytest.raises(ValueError, match=r"prompt of row 1 .*must be a string or a non-empty list of messages"):
            load(tmp_path, [{"prompt": "1"}, {"prompt": bad}])
    with pytest.raises(ValueError, match="prompt of row 0 has no tokens"):
        load(tmp_path, [{"prompt": ""}])


LONG = [{"prompt": "1"}, {"prompt": "123456"}, {"prompt": "12"}]


@pytest.mark.parametrize(
    ("side", "kept"), [("left", (5, 6, 7, 8, 9)), ("right", (4, 5, 6, 7, 8)), ("middle", (4, 5, 7, 8, 9))]
)
def test_truncation_cuts_the_named_side_and_counts(tmp_path: Path, side: str, kept: tuple[int, ...]) -> None:
    dataset = load(tmp_path, LONG, truncation=side, max_prompt_length=5)
    assert dataset.prompts[1].token_ids == kept
    assert (len(dataset), dataset.num_truncated, dataset.num_filtered) == (3, 1, 0)
    assert f"1 prompts over data.max_prompt_length=5 tokens were cut (data.truncation={side})" in dataset.notices[0]


def test_the_middle_of_one_token_is_the_last() -> None:
    assert truncate((1, 2, 3), 1, "middle") == (3,)


def test_overlong_prompts_are_refused_or_dropped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 has 6 tokens, more than data\.max_prompt_length=5"):
        load(tmp_path, LONG, max_prompt_length=5)
    dataset = load(tmp_path, LONG, max_prompt_length=5, filter_overlong_prompts=True)
    assert [p.index for p in dataset.prompts] == [0, 1]
    assert (len(dataset.prompts[1].token_ids), dataset.num_truncated, dataset.num_filtered) == (2, 0, 1)
    with pytest.raises(ValueError, match=r"all 1 prompts are longer than data\.max_prompt_length=5"):
        load(tmp_path, LONG[1:2], max_prompt_length=5, filter_overlong_prompts=True)


def test_a_data_source_that_was_asked_for_has_to_be_there(tmp_path: Path) -> None:
    assert load(tmp_path, [{"prompt": "1", "domain": "math"}], reward_fn_key="domain").prompts[0].data_source == "math"
    with pytest.raises(ValueError, match=r"row 0 has no column data\.reward_fn_key=domain; its columns are: prompt\."):
        load(tmp_path, [{"prompt": "1"}], reward_fn_key="domain")
