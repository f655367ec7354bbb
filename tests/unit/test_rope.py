"""Rotary positions: what overrides come to in both spellings, how many positions follow, what vLLM makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from trainer.config.load import load_config
from trainer.config.model import model_problems
from workers.engines.models import config_overrides, hf_config
from workers.engines.rope import Positions, positions_of

BASE = ["data.train_files=t.jsonl", "actor_rollout_ref.model.path=org/model"]
OVERRIDE = "actor_rollout_ref.model.override_config"
YARN = {"rope_type": "yarn", "factor": 4.0}
THETA = 1_000_000.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    ).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_yarn_in_either_spelling_keeps_the_base_and_says_how_far_it_goes(
    spelling: str, kind: str, checkpoint: Path
) -> None:
    config = of(checkpoint, {spelling: {kind: "yarn", "factor": 4.0}})
    assert config.rope_parameters == YARN | {"rope_theta": THETA, "original_max_position_embeddings": 32768}
    assert config.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("overrides", "rope", "positions"),
    [
        ({}, {"rope_type": "default", "rope_theta": THETA}, 32768),
        ({"rope_theta": 5.0}, {"rope_type": "default", "rope_theta": 5.0}, 32768),
        ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": THETA}, 32768),
        (
            {"max_position_embeddings": 131072, "rope_scaling": YARN},  # raised by hand: 4 x the checkpoint's own
            YARN | {"rope_theta": THETA, "original_max_position_embeddings": 32768},
            131072,
        ),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 4096}, "rope_theta": 7.0},
            YARN | {"rope_theta": 7.0, "original_max_position_embeddings": 4096},
            32768,
        ),
    ],
)
def test_what_overrides_come_to(
    overrides: dict[str, Any], rope: dict[str, Any], positions: int, checkpoint: Path
) -> None:
    config = of(checkpoint, overrides)
    assert config.rope_parameters == rope
    assert config.max_position_embeddings == positions


def test_one_parameter_changes_what_the_checkpoint_has(tmp_path: Path, checkpoint: Path) -> None:
    of(checkpoint, {"rope_scaling": YARN}).save_pretrained(tmp_path)
    config = of(tmp_path, {"rope_scaling": {"factor": 8.0}})
    assert config.rope_parameters["original_max_position_embeddings"] == 32768
    assert config.max_position_embeddings == 262144


def test_a_checkpoint_that_was_only_given_yarn_has_all_its_positions(tmp_path: Path, checkpoint: Path) -> None:
    config = Qwen2Config.from_pretrained(checkpoint)
    config.rope_parameters = YARN | {"rope_theta": THETA, "original_max_position_embeddings": 32768}
    config.save_pretrained(tmp_path)
    found = config_overrides(str(tmp_path), trust_remote_code=False, override_config={})
    assert found == {"max_position_embeddings": 131072}


@pytest.mark.parametrize(
    ("rope", "number", "kind"),
    [
        ({}, 1000, "default"),
        ({"rope_type": "llama3", "factor": 8.0}, 1000, "llama3"),
        ({"rope_type": "linear", "factor": 2}, 2000, "linear"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 700}, 1400, "yarn"),
        ({"type": "su", "original_max_position_embeddings": 400}, 400, "longrope"),
        ({"rope_type": "dynamic", "factor": 2.0}, 1000, "dynamic"),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_positions(spelling: str, rope: dict[str, Any], number: int, kind: str) -> None:
    found = positions_of({"max_position_embeddings": 1000, spelling: rope})
    assert isinstance(found, Positions)
    assert (found.number, found.kind) == (number, kind)


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
            "the model has original_max_position_embeddings=256 x factor=4.0 (rope_type=yarn), less than one sequence "
            "of 1512 tokens (data.max_prompt_length=512 + data.max_response_length=1000); set data.max_response_length="
            f"512 or smaller, or, if the model bears it, {OVERRIDE}.rope_scaling.factor=6",
        ),
        (
            {"rope_type": "dynamic", "factor": 4.0},
            "the model has max_position_embeddings=1024, less than one sequence of 1512 tokens "
            "(data.max_prompt_length=512 + data.max_response_length=1000); set data.max_response_length=512 or "
            "smaller, or, as a dynamic scale follows the longest sequence of a batch from there on, in training "
            f"another than in vLLM, {OVERRIDE}.rope_scaling.rope_type=yarn with {OVERRIDE}.rope_scaling.factor=2",
        ),
    ],
)
def test_sequences_beyond_what_is_extended(rope: dict[str, Any], wanted: str) -> None:
    cfg = load_config([*BASE, "data.max_response_length=1000"])
    fields = {"max_position_embeddings": 1024, "rope_parameters": rope}
    assert list(model_problems(cfg, fields)) == [f"actor_rollout_ref.model.path=org/model: {wanted}"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rope_scaling.rope_type=yran", "rope_scaling.rope_type=yran: unknown; choose one of default, linear,"),
        ("rope_scaling.rope_type=yarn", "rope_scaling.rope_type=yarn: needs factor; set "),
        (
            "rope_scaling={rope_type:llama3,factor:8.0}",
            "rope_scaling.rope_type=llama3: needs low_freq_factor, high_freq_factor, as the model's card",
        ),
        ("rope_scaling.rope_type=longrope", "rope_scaling.rope_type=longrope: needs short_factor, long_factor, as"),
        ("rope_parameters.factor=2", "rope_scaling.factor=2: has no effect without a kind; set "),
    ],
)
def test_mistaken_overrides(given: str, message: str) -> None:
    cfg = load_config([*BASE, f"+{OVERRIDE}.{given}"])
    problems = list(model_problems(cfg, {"max_position_embeddings": 32768}))
    assert len(problems) == 1
    assert problems[0].startswith(f"{OVERRIDE}.{message}")


def test_the_installed_vllm_takes_as_many_positions_and_no_more(checkpoint: Path) -> None:
    overrides = config_overrides(str(checkpoint), trust_remote_code=False, override_config={"rope_scaling": YARN})
    program = (
        "import sys; from vllm.engine.arg_utils import EngineArgs\n"
        f"for length in (131072, 131073):\n"
        "    try:\n"
        f"        EngineArgs(model=sys.argv[1], hf_overrides={overrides}, max_model_len=length, "
        "skip_tokenizer_init=True).create_model_config()\n"
        "        print('takes', length)\n"
        "    except ValueError as error:\n"
        "        assert 'max_model_len' in str(error), error\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint)], capture_output=True, text=True, env=os.environ, check=True
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("takes")] == ["takes 131072"]


def of(directory: Path, overrides: dict[str, Any]) -> Any:
    return hf_config(str(directory), trust_remote_code=False, override_config=overrides)
