"""The quick-start task: splits that share nothing, demonstrations as described, a byte-exact tokenizer, the reward."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    """A file of the repository that is not part of a package, as a module."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


task = load("scripts/make_addition_task.py")
reward = load("examples/addition_reward.py")
ASCII = st.text(alphabet=[chr(code) for code in range(128)], max_size=40)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_heldout_sums_and_their_mirror_images_are_never_trained_on(seed: int) -> None:
    train, heldout = task.split_sums(seed=seed, num_heldout=1000)
    assert len(heldout) == 1000 and len(train) == 7100
    assert set(train) | set(heldout) == {(a, b) for a in range(10, 100) for b in range(10, 100)}
    assert not {frozenset(s) for s in train} & {frozenset(s) for s in heldout}


def test_split_follows_from_the_seed() -> None:
    assert task.split_sums(seed=3, num_heldout=1000) == task.split_sums(seed=3, num_heldout=1000)
    assert task.split_sums(seed=3, num_heldout=1000) != task.split_sums(seed=4, num_heldout=1000)


def test_supervised_stages_sample_from_the_sums_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever train_stage encodes comes from its `sums`, so that held-out sums cannot reach the model."""
    import torch

    train, _ = task.split_sums(seed=0, num_heldout=1000)
    seen: set[str] = set()
    encode = task.encode

    def watch(prompts: list[str], answers: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.update(prompts)
        encoded: tuple[torch.Tensor, torch.Tensor] = encode(prompts, answers)
        return encoded

    monkeypatch.setattr(task, "encode", watch)
    recipe = task.Recipe(learn_steps=2, spoil_steps=2, batch_size=16)
    model = task.build_model()
    task.learn(model, train, recipe)
    task.spoil(model, train, recipe)
    assert seen and seen <= {task.prompt_text(*s) for s in train}


@pytest.mark.parametrize(
    ("a", "b", "dropped"), [(12, 34, "46"), (17, 25, "32"), (57, 68, "15"), (99, 99, "88"), (50, 50, "00")]
)
def test_dropped_carries(a: int, b: int, dropped: str) -> None:
    assert task.drop_carries(a, b) == dropped


def test_spoilt_digit_is_wrong_in_one_place() -> None:
    rng = random.Random(0)
    for a, b in [(12, 34), (99, 99)] * 50:
        answer, right = task.spoil_digit(a, b, rng), task.right_answer(a, b)
        assert len(answer) == len(right)
        assert sum(x != y for x, y in zip(answer, right, strict=True)) == 1


def test_demonstrations_of_stage_two_have_the_shares_of_the_recipe() -> None:
    rng, recipe = random.Random(0), task.Recipe()
    answers = [task.mixed_answer(57, 68, rng, recipe) for _ in range(4000)]
    assert answers.count("125") / 4000 == pytest.approx(recipe.right_share, abs=0.03)
    assert answers.count("15") / 4000 == pytest.approx(recipe.dropped_share, abs=0.03)


def test_targets_are_the_answer_and_the_end() -> None:
    inputs, targets = task.encode(["12+34=", "57+68="], ["46", "125"])
    assert bytes(inputs[0].tolist()).decode() == "12+34=46\x03"
    assert [t for t in targets[0].tolist() if t != -100] == [ord("4"), ord("6"), ord(task.EOS)]
    assert [t for t in targets[1].tolist() if t != -100] == [ord("1"), ord("2"), ord("5"), ord(task.EOS)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The tokenizer as AutoTokenizer loads it again."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    task.build_tokenizer().save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@given(text=ASCII)
def test_tokens_are_code_points_both_ways(tokenizer: object, text: str) -> None:
    ids = tokenizer(text)["input_ids"]  # type: ignore[operator]
    assert ids == [ord(character) for character in text]
    assert tokenizer.decode(ids) == text  # type: ignore[attr-defined]


def test_tokenizer_has_the_model_s_vocabulary_and_ends(tokenizer: object) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == task.VOCABULARY  # type: ignore[arg-type, attr-defined]
    assert tokenizer.eos_token_id == ord(task.EOS)  # type: ignore[attr-defined]
    assert tokenizer.pad_token_id == ord(task.PAD)  # type: ignore[attr-defined]
    assert tokenizer.decode([52, 54, ord(task.EOS)], skip_special_tokens=True) == "46"  # type: ignore[attr-defined]


def test_chat_template_passes_the_prompt_through(tokenizer: object) -> None:
    row = task.data_row(0, (12, 34), split="train", chat=True)
    text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        row["prompt"], tokenize=False, add_generation_prompt=True
    )
    assert text == "12+34="


def test_model_is_the_one_described() -> None:
    model = task.build_model()
    assert 1.5e6 < model.num_parameters() < 1.7e6
    assert model.config.architectures is None or model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_data_files_have_verl_s_columns(tmp_path: Path) -> None:
    task.write_data(tmp_path, [(12, 34), (57, 68)], [(99, 99)])
    (row,) = pq.read_table(tmp_path / "heldout.parquet").to_pylist()
    assert row == {
        "data_source": "addition",
        "prompt": "99+99=",
        "reward_model": {"style": "rule", "ground_truth": "198"},
        "extra_info": {"index": 0, "split": "heldout"},
    }
    assert pq.read_table(tmp_path / "train_chat.parquet").to_pylist()[1]["prompt"] == [
        {"role": "user", "content": "57+68="}
    ]
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "12+34=", "answer": "46"},
        {"prompt": "57+68=", "answer": "125"},
    ]


def test_a_cached_task_is_found_without_torch(tmp_path: Path) -> None:
    recipe = task.Recipe(seed=5)
    report = {"stamp": task.stamp_of(recipe), "spoilt": {"accuracy": 0.3, "greedy_accuracy": 0.25}}
    (tmp_path / "task.json").write_text(json.dumps(report))
    program = (
        "import runpy, sys; sys.argv = ['make', '--out', sys.argv[1], '--seed', '5']; "
        "runpy.run_path('scripts/make_addition_task.py', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "task found" in done.stdout and "sampled 30.0%" in done.stdout
    assert task.cached_task(tmp_path, task.stamp_of(task.Recipe(seed=6))) is None


def test_reward_is_an_exact_match() -> None:
    assert reward.compute_score("addition", "46", "46") == 1.0
    for wrong in ("", "4", "46 ", "046", "46\x03", "32"):
        assert reward.compute_score("addition", wrong, "46", {"index": 1}) == 0.0


def test_reward_in_parts_is_the_same_reward() -> None:
    for answer in ("46", "", "4", "47", "461", "32"):
        parts = reward.compute_parts("addition", answer, "46")
        assert parts["score"] == parts["right"] == reward.compute_score("addition", answer, "46")
    assert [reward.compute_parts("addition", answer, "46")["near"] for answer in ("46", "47", "32", "")] == [
        1,
        0.5,
        0,
        0,
    ]
