"""Losses and corrections that make no sense are refused before start, each with key, value and remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.corrections import policy_loss_problems, rollout_correction_problems
from trainer.config.load import load_config

BASE = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model"]
LOSS = "actor_rollout_ref.actor.policy_loss"
KEY = "algorithm.rollout_correction"
LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs"
ASKED = f"{LOG_PROBS}=true"
BYPASS = f"{KEY}.bypass_mode=true"


def problems(*overrides: str) -> list[str]:
    cfg = load_config([*BASE, *overrides])
    return [*policy_loss_problems(cfg), *rollout_correction_problems(cfg)]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [f"{LOSS}.loss_mode=vanilla"],
        [f"{LOSS}.loss_mode=sapo", f"{LOSS}.params.tau_neg=1.1"],
        [f"{LOSS}.loss_mode=dro", f"{LOSS}.params.dro_beta=0.1"],
        [f"{KEY}.rollout_is=token", ASKED],
        [f"{KEY}.rollout_is=sequence", f"{KEY}.rollout_is_threshold='0.5_5.0'", ASKED],
        [f"{KEY}.rollout_rs='token_k1,seq_mean_k3'", f"{KEY}.rollout_rs_threshold='0.5_2.0,0.01'", ASKED],
        [BYPASS, ASKED],
        [BYPASS, f"{KEY}.rollout_rs=seq_max_k2", f"{KEY}.rollout_rs_threshold=1.0", ASKED],
        [BYPASS, f"{KEY}.rollout_is=sequence", f"{LOSS}.loss_mode=gpg", ASKED],
        [f"{KEY}.rollout_is=token", f"{KEY}.rollout_is_batch_normalize=true", ASKED],
    ],
)
def test_what_makes_sense(overrides: list[str]) -> None:
    assert problems(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "problem", "remedy"),
    [
        ([f"{LOSS}.loss_mode=pop"], f"{LOSS}.loss_mode=pop: unknown", "choose one of ppo"),
        ([f"{LOSS}.params.tau=2"], "tau: unknown parameter", "it has none"),
        ([f"{LOSS}.loss_mode=dro"], f"{LOSS}.params.dro_beta=null", "set it, e.g. 0.1"),
        ([f"{LOSS}.loss_mode=gmpo", f"{LOSS}.params.a=2"], "a: unknown parameter", "it has none"),
        ([f"{KEY}.rollout_is=token"], f"{KEY}.rollout_is=token: needs the sampler's log-probs", f"set {ASKED}"),
        (
            [f"{KEY}.rollout_rs=token_k2", f"{KEY}.rollout_rs_threshold=1.0", f"{LOG_PROBS}=false"],
            f"{KEY}.rollout_rs=token_k2: needs the sampler's log-probs of every response, and {LOG_PROBS}=false",
            f"set {ASKED}",
        ),
        ([BYPASS], f"{BYPASS}: needs the sampler's log-probs of every response, and {LOG_PROBS}=monitor", ASKED),
        ([f"{KEY}.rollout_is_threshold=0.5"], f"{KEY}.rollout_is_threshold=0.5: leaves out 1", "write e.g."),
        (
            [f"{KEY}.rollout_is_batch_normalize=true"],
            f"{KEY}.rollout_is_batch_normalize=true: there are no weights to normalise",
            "set rollout_is=token",
        ),
        (
            [
                f"{KEY}.rollout_is_batch_normalize=true",
                f"{KEY}.rollout_is=token",
                BYPASS,
                ASKED,
                f"{LOSS}.loss_mode=gpg",
            ],
            f"{KEY}.rollout_is_batch_normalize=true: with {BYPASS} weights follow the policy",
            "set one of the two to false",
        ),
        (
            [f"{KEY}.rollout_is=token", BYPASS, ASKED],
            f"{KEY}.rollout_is=token: with {BYPASS} the ratio of {LOSS}.loss_mode=ppo is taken against the sampler",
            "set rollout_is=null, or bypass_mode=false",
        ),
        ([BYPASS, ASKED, f"{LOSS}.loss_mode=gpg"], f"{BYPASS}: {LOSS}.loss_mode=gpg has no ratio", "bypass_mode=false"),
    ],
)
def test_what_does_not(overrides: list[str], problem: str, remedy: str) -> None:
    (found,) = problems(*overrides)
    assert problem in found and remedy in found


def test_verls_places_of_parameters(tmp_path: Path) -> None:
    """On the command line and in YAML."""
    actor = LOSS.rpartition(".")[0]
    both = [f"{actor}.tau_neg=1.2", f"{LOSS}.kl_cov_ratio=0.01"]
    for mode, params in {"sapo": {"tau_neg": 1.2}, "kl_cov": {"kl_cov_ratio": 0.01}, "ppo": {}}.items():
        cfg = load_config([*BASE, f"{LOSS}.loss_mode={mode}", *both])
        assert cfg.actor_rollout_ref.actor.policy_loss.params == params, "those that the loss takes"
    recipe = (
        "defaults: [ppo_trainer, _self_]\nactor_rollout_ref: {actor: {policy_loss: {loss_mode: dro, dro_beta: 0.3}}}\n"
    )
    (tmp_path / "mine.yaml").write_text(recipe)
    policy_loss = load_config(BASE, "mine", config_dir=tmp_path).actor_rollout_ref.actor.policy_loss
    assert (policy_loss.loss_mode, policy_loss.params) == ("dro", {"dro_beta": 0.3})


def test_validate_asks() -> None:
    """Through the front door, where every problem of the keys is told at once."""
    from trainer.config.validate import validate

    with pytest.raises(ValueError) as error:
        validate(load_config([*BASE, f"{LOSS}.loss_mode=pop", BYPASS]))
    assert "loss_mode=pop" in str(error.value) and f"{BYPASS}: needs" in str(error.value)


def test_a_wrong_correction_is_told_without_torch() -> None:
    code = (
        "import sys; from trainer.config.load import load_config; from trainer.config.corrections import *\n"
        f"cfg = load_config({[*BASE, BYPASS]!r})\n"
        "found = [*policy_loss_problems(cfg), *rollout_correction_problems(cfg)]\n"
        "print(len(found), 'torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout == "1 False\n", result.stderr
