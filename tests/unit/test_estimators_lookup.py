"""Estimators by name and by import path, their parameters, and what is refused before a run starts."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from estimator_formulas import EVERY, make_batch, run

from trainer.advantage import AdvantageComputer
from trainer.algorithms import custom
from trainer.algorithms.advantages import estimator
from trainer.algorithms.estimators import catalog
from trainer.algorithms.kl import kl_controller
from trainer.config.algorithms import estimator_problems
from trainer.config.errors import UserError
from trainer.config.load import load_config
from trainer.config.notices import notices
from trainer.samples import Samples
from workers.protocol import Prompt, RolloutBlock, Scores, Trajectory

BASE = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model"]
N = "actor_rollout_ref.rollout.n"
OWN = str(Path(__file__).with_name("own_algorithms.py"))


def problems(name: str, *overrides: str, n: int = 4) -> str:
    cfg = load_config([*BASE, f"algorithm.adv_estimator='{name}'", f"{N}={n}", *overrides])
    return "\n".join(estimator_problems(cfg))


@pytest.mark.parametrize("name", EVERY)
def test_what_an_estimator_needs(name: str) -> None:
    chosen = estimator(name)
    assert chosen.needs == catalog.needs(name) <= catalog.NEEDS
    flags = {need for need in catalog.NEEDS if getattr(chosen, f"needs_{need}")}
    expected: dict[str, set[str]] = {
        "gae": {"values"},
        "reinforce_plus_plus": set(),
        "remax": {"baseline"},
        "gdpo": {"groups", "parts"},
        "optimal_token_baseline": {"groups", "logprobs", "sum_pi_squared"},
    }
    assert flags == expected.get(name, {"groups"})


@pytest.mark.parametrize("name", EVERY)
def test_a_plain_configuration_of_each_is_accepted(name: str) -> None:
    assert problems(name) == ""
    cfg = load_config([*BASE, f"algorithm.adv_estimator={name}", f"{N}=4"])
    assert cfg.use_critic == (name == "gae")


@pytest.mark.parametrize("name", [name for name in EVERY if "groups" in catalog.needs(name)])
def test_one_response_per_prompt_is_refused_where_responses_are_compared(name: str) -> None:
    assert f"{N}=1: algorithm.adv_estimator={name} compares" in problems(name, n=1)


@pytest.mark.parametrize("name", ["gae", "remax", "reinforce_plus_plus"])
def test_one_response_per_prompt_is_enough_for_the_others(name: str) -> None:
    assert problems(name, n=1) == ""


def test_no_critic_for_gae() -> None:
    assert "critic.enable=false: algorithm.adv_estimator=gae needs the critic" in problems("gae", "critic.enable=false")


@pytest.mark.parametrize(
    ("name", "params", "complaint"),
    [
        (
            "grpo",
            "{gama: 0.9}",
            "algorithm.adv_params.gama: unknown parameter of algorithm.adv_estimator=grpo; it has none",
        ),
        (
            "gae",
            "{gamma: 0.9}",
            "algorithm.adv_params.gamma: unknown parameter of algorithm.adv_estimator=gae; it has whiten",
        ),
        (
            "gdpo",
            "{weight: {a: 1}}",
            "adv_params.weight: unknown parameter of algorithm.adv_estimator=gdpo; it has weights",
        ),
        ("gdpo", "{weights: {a: high}}", "algorithm.adv_params.weights.a=high: must be a finite number"),
        ("gdpo", "{weights: 3}", "algorithm.adv_params.weights=3: must name parts of the reward with their weights"),
        ("gdpo", "{weights: {}}", "algorithm.adv_params.weights={}: must name parts"),
        ("gae", "{whiten: 1}", "algorithm.adv_params.whiten=1: must be true or false"),
        ("gdpo", "{whiten_over: rows}", "algorithm.adv_params.whiten_over=rows: choose tokens or sequences"),
        ("gpg", "{valid: all}", "algorithm.adv_params.valid=all: choose nonzero_rewards or mixed_groups"),
        ("gpg", "{f_norm: 0}", "algorithm.adv_params.f_norm=0: it divides the advantages; set it above 0"),
        ("gpg", "{f_norm: high}", "wrong kind of value for algorithm.adv_estimator=gpg"),
        (f"{OWN}:needs_a_limit", "{}", "needs_a_limit needs limit; set algorithm.adv_params.limit"),
        (f"{OWN}:sign", "{size: 2}", "algorithm.adv_params.size: unknown parameter of"),
    ],
)
def test_wrong_parameters(name: str, params: str, complaint: str) -> None:
    assert complaint in problems(name, f"algorithm.adv_params={params}")


def test_parameters_on_the_command_line() -> None:
    """As a dictionary, or one by one."""
    whole = load_config([*BASE, "algorithm.adv_params={whiten: false}"])
    single = load_config([*BASE, "algorithm.adv_params.whiten=false"])
    assert whole.algorithm.adv_params == single.algorithm.adv_params == {"whiten": False}


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match=r"adv_estimator=grop: must be one of dr_grpo, .*or your own function as package"
    ):
        load_config([*BASE, "algorithm.adv_estimator=grop"])
    with pytest.raises(ValueError, match=r"adv_estimator='grop' is unknown; choose one of dr_grpo, gae, .*your own"):
        estimator("grop")


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("nowhere.to_be_found:f", "cannot be imported (No module named 'nowhere'); check the spelling"),
        ("gone.py:f", "there is no file"),
        (
            f"{OWN}:sing",
            "sing does not exist; functions there: a_list, greedy, infinite, less_value, needs_a_limit, odd, sign",
        ),
        (f"{OWN}:NUMBER", "NUMBER is not a function"),
        (f"{OWN}:", "not an import path; write package.module:function or path/to/file.py:function"),
        (":f", "not an import path"),
        (f"{OWN}:greedy", "its attribute `needs` names everything; it may name baseline, groups, logprobs"),
        (f"{OWN}:odd", "its attribute `needs` is 5; give a set of baseline, groups"),
        ("math:hypot", "no signature found for builtin <built-in function hypot>; write a function that calls it"),
    ],
)
def test_paths_that_lead_nowhere(path: str, complaint: str) -> None:
    told = problems(path)
    assert complaint in told and told.startswith(f"algorithm.adv_estimator={path}")


def test_a_file_that_fails_is_told_and_may_be_mended(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("1 / 0\n")
    with pytest.raises(ValueError, match=r"k=.*mine\.py:f: cannot be imported; mend it \(ZeroDivisionError"):
        custom.load(f"{file}:f", "k")
    assert not [name for name in sys.modules if name.startswith("tandem_custom_mine")]
    file.write_text("def f(x): return 1\n")
    assert custom.load(f"{file}:f", "k")(0) == 1


def test_a_configuration_without_parameters_is_checked_without_torch() -> None:
    code = (
        "import sys; from trainer.config.load import load_config; from trainer.config.validate import validate\n"
        f"cfg = load_config({[*BASE, 'algorithm.adv_estimator=grpo']!r})\n"
        "try:\n    validate(cfg)\n"
        "except ValueError as error:\n    print('rollout.n=1' in str(error), 'torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stdout == "True False\n", result.stderr


def test_a_built_in_estimator_has_a_default_for_each_parameter() -> None:
    for name in EVERY:
        estimator(name)  # raises for one that is missing


def test_a_file_is_imported_once_and_two_of_one_name_are_two(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"import neighbour_of_{folder}\ncalls = []\ndef f(x):\n    calls.append(x)\n    return '{folder}', calls\n"
        )
        (tmp_path / folder / f"neighbour_of_{folder}.py").write_text("")
    first, second = (custom.load(f"{tmp_path / folder / 'mine.py'}:f", "k") for folder in ("a", "b"))
    assert first(1)[0] == "a" and second(1)[0] == "b"
    assert custom.load(f"{tmp_path / 'a' / 'mine.py'}:f", "k") is first
    assert pickle.loads(pickle.dumps(first)) is first


def test_own_estimators() -> None:
    x = make_batch(3, [3, 2], masked=True, paid=False, binary=True)
    assert x.loss_mask is not None and x.values is not None
    by_file, by_module = run(f"{OWN}:sign", x, {"scale": 2.0}), run("own_algorithms:sign", x, {"scale": 2.0})
    expected = torch.repeat_interleave(torch.where(x.rewards > 0.5, 2.0, -2.0), x.lengths) * x.loss_mask
    torch.testing.assert_close(by_file.advantages, expected)
    torch.testing.assert_close(by_module.advantages, expected)
    assert by_file.returns is None
    valued = run("own_algorithms:less_value", x, {"weight": 1.0})
    assert valued.returns is not None
    rewards = torch.repeat_interleave(x.rewards, x.lengths) * x.loss_mask
    torch.testing.assert_close(valued.returns, rewards)
    torch.testing.assert_close(valued.advantages, rewards - x.values * x.loss_mask)


def test_an_own_estimator_gets_the_critic_it_needs() -> None:
    own = ["algorithm.adv_estimator='own_algorithms:less_value'", "algorithm.adv_params={weight: 1.0}"]
    assert load_config([*BASE, *own, f"{N}=2"]).use_critic
    assert f"{N}=1: algorithm.adv_estimator=own_algorithms:less_value compares" in problems(
        "own_algorithms:less_value", own[1], n=1
    )
    surprising = "critic.enable=true trains a critic whose values"
    used = load_config([*BASE, *own, f"{N}=2", "critic.enable=true"])
    unused = load_config([*BASE, "algorithm.adv_estimator=rloo", f"{N}=2", "critic.enable=true"])
    assert not any(surprising in notice for notice in notices(used))
    assert any(surprising in notice for notice in notices(unused))


@pytest.mark.parametrize(
    ("name", "params", "complaint"),
    [
        ("needs_a_limit", {"limit": 1.0}, r"returned advantages \[5\]; it must return one number per token, \[\d+\]"),
        ("a_list", {}, "returned advantages list; it must return"),
        ("infinite", {}, "numbers are not finite in the advantages of algorithm.adv_estimator=own_algorithms:infinite"),
    ],
)
def test_wrong_results_of_own_estimators(name: str, params: dict[str, Any], complaint: str) -> None:
    x = make_batch(3, [3, 2], masked=False, paid=False, binary=True)
    with pytest.raises(ValueError, match=complaint):
        run(f"own_algorithms:{name}", x, params)


def make_samples() -> Samples:
    """Two prompts with two responses each; 2, 1, 3 and 1 tokens."""
    lengths = {(0, 0): 2, (0, 1): 1, (1, 0): 3, (1, 1): 1}
    rows = [Trajectory(g, s, (g,), tuple(range(n)), "stop", 1) for (g, s), n in lengths.items()]
    block = RolloutBlock.collate(rows)
    rewards = np.array([0.0, 1.0, 1.0, 0.0], dtype=np.float32)
    scored = Scores(rewards, {"answer": rewards, "format": 1 - rewards}, ("",) * 4)
    prompts = [Prompt(index=g, token_ids=(g,)) for g in range(2)]
    return Samples.join("train-1", prompts, (block,), [block.meta], [scored])


def compute(samples: Samples, name: str, *, gamma: float = 1.0, **params: Any) -> torch.Tensor:
    cfg = load_config([*BASE, f"algorithm.adv_estimator='{name}'", f"{N}=2"])
    algorithm = cfg.algorithm.model_copy(update={"adv_params": params, "gamma": gamma})
    advantages, _ = AdvantageComputer(algorithm).compute(samples, kl_controller(algorithm.kl_ctrl))
    np.testing.assert_array_equal(samples.fetch_column("advantages"), advantages.numpy())
    return advantages


def test_the_trainer_fetches_what_is_needed_and_nothing_else() -> None:
    samples = make_samples()
    half = torch.tensor([-0.5, -0.5, 0.5, 0.5, 0.5, 0.5, -0.5])
    torch.testing.assert_close(compute(samples, "dr_grpo"), half)  # without any column
    torch.testing.assert_close(
        compute(samples, "gdpo", weights={"format": 2.0}, whiten_over="sequences"),
        -torch.sign(half) * (3 / 4) ** 0.5,
        rtol=1e-5,
        atol=1e-5,
    )
    samples.baseline = np.array([0.25, 0.25, 1.0, 1.0], dtype=np.float32)
    torch.testing.assert_close(compute(samples, "remax"), torch.tensor([-0.25, -0.25, 0.75, 0.0, 0.0, 0.0, -1.0]))
    samples.put_column("old_logprobs", np.log(np.full(7, 0.5, dtype=np.float32)))
    samples.put_column("sum_pi_squared", np.full(7, 0.5, dtype=np.float32))
    expected = torch.tensor([-0.5, 0.0, 0.5, 0.5, 1.0, 1.0, -0.5])  # beyond the shorter one: the reward itself
    torch.testing.assert_close(compute(samples, "optimal_token_baseline"), expected)
    samples.put_column("values", np.full(7, 0.25, dtype=np.float32))
    torch.testing.assert_close(
        compute(samples, "own_algorithms:less_value", weight=1.0),
        torch.tensor([-0.25, -0.25, 0.75, 0.75, 0.75, 0.75, -0.25]),
    )
    assert samples.fetch_column("returns").tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_rewards_that_an_estimator_cannot_use_are_the_users_to_mend() -> None:
    """One message; what a function of one's own raises keeps its traceback."""
    samples = make_samples()
    with pytest.raises(UserError, match=r"adv_params\.weights\.style: the rewards have no such part"):
        compute(samples, "gdpo", weights={"style": 1.0})
    samples.rewards = samples.rewards - 1
    with pytest.raises(UserError, match=r"adv_estimator=max_rl: 2 of 4 rewards are below 0"):
        compute(samples, "max_rl")
    with pytest.raises(ValueError, match="returned advantages list") as error:
        compute(samples, "own_algorithms:a_list")
    assert not isinstance(error.value, UserError)


def test_a_critic_always_has_something_to_learn() -> None:
    """critic.enable=true beside an estimator that gives no returns: the discounted reward to come."""
    samples = make_samples()
    compute(samples, "rloo", gamma=0.5)
    assert "returns" not in samples.columns  # no critic
    samples.put_column("values", np.zeros(7, dtype=np.float32))
    compute(samples, "rloo", gamma=0.5)
    assert samples.fetch_column("returns").tolist() == [0.0, 0.0, 1.0, 0.25, 0.5, 1.0, 0.0]


def test_samples_without_a_row_keep_its_baseline() -> None:
    samples = make_samples()
    samples.baseline = np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32)
    kept = samples.take(np.array([3, 0]))
    assert kept.baseline is not None
    assert kept.baseline.tolist() == pytest.approx([0.4, 0.1])
