"""What a user of ROLL's can get wrong: one message with key, value, place and remedy, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from trainer import main as cli
from trainer.config.errors import UserError
from trainer.config.load import load_config
from trainer.config.roll.command_line import expand_roll, to_overrides
from trainer.config.roll.defaults import DEFAULTS
from trainer.config.roll.read import RollFile, read_roll
from trainer.config.roll.translate import translate_roll

EXAMPLE = Path(__file__).resolve().parents[1] / "data" / "roll" / "qwen2.5_7b_megatron.yaml"
GIVEN = {"reward.custom_reward_function.path": "my_reward.py"}
REWARD = "reward.custom_reward_function.path=my_reward.py"
CONFIG = "strategy_args.strategy_config"
FILE = """\
pretrain: org/model
rollout_batch_size: 64
num_return_sequences_in_group: 8
response_length: 64
adv_estimator: grpo
actor_train:
  data_args: {file_name: [train.jsonl]}
  training_args:
    gradient_accumulation_steps: 8
  strategy_args: {strategy_name: fsdp2_train, strategy_config: {}}
  device_mapping: list(range(0,8))
actor_infer:
  strategy_args:
    strategy_name: vllm
    strategy_config:
      gpu_memory_utilization: 0.6
  device_mapping: list(range(0,8))
rewards:
  math: {worker_cls: a.MathRuleRewardWorker, tag_included: [gsm8k]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rlvr.yaml"
    path.write_text(FILE, encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> str:
    """The message of the translation."""
    with pytest.raises(ValueError) as error:
        expand_roll([f"roll.config={path}", REWARD, *overrides])
    return str(error.value)


def changed(file: Path, old: str, new: str) -> Path:
    assert old in FILE
    file.write_text(FILE.replace(old, new), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds nothing, no keys; give ROLL's YAML file"),
        (b"# a comment\n", "holds nothing, no keys"),
        (b"5\n", "holds one value, no keys"),
        (b"hello\n", "holds one value, no keys"),
        (b"- a\n", "holds a list, no keys"),
        (b"\xff\xfe", "not text in UTF-8; give ROLL's YAML file"),
        (b"seed: 1\nseed: 2\n", "line 2: found duplicate key seed; mend the file"),
        (b"a: 1\n b: 2\n", "line 2: mapping values are not allowed here; mend the file"),
        (b"a: &x [*x]\n", "not readable as YAML: nested too deeply, or an alias (*name) within what it stands for"),
        (b"a: &x {b: *x}\n", "an alias (*name) within what it stands for; mend the file"),
        (b"defaults: {a: b}\n", "defaults={a: b} must be a list; write [name, _self_]"),
        (b"sft_train: {}\n", "sft_train belongs to ROLL's SFT pipeline, and only RLVR is there"),
        (b"chosen_key: a\n", "ROLL's DPO pipeline"),
        (b"student: {}\n", "ROLL's distillation pipeline"),
        (b"custom_envs: {a: '${nothing}'}\n", "ROLL's agentic pipeline"),
        (b"actor_rollout_ref: {}\n", "start such a file with --config-dir "),
    ],
)
def test_files_that_hold_no_rlvr_run(file: Path, content: bytes, expected: str) -> None:
    file.write_bytes(content)
    message = refused(file)
    assert message.startswith(f"roll.config={file}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("rollout_batch_size: 64", "rollout_batchsize: 64", "did you mean rollout_batch_size? (rlvr.yaml:2)"),
        ("_steps: 8", "_step: 8", "did you mean actor_train.training_args.gradient_accumulation_steps? (rlvr.yaml:9)"),
        ("size: 64", 'size: "64"', "='64': must be a whole number of at least 1; take the quotes off (rlvr.yaml:2)"),
        ("size: 64", "size: ${many}", "=${many}: Interpolation key 'many' not found; define it in the file, or"),
        ("size: 64", "size: ${oc.env:NO_SUCH}", "Environment variable 'NO_SUCH' not found; set it, or write the value"),
        ("size: 64", "size: ${eval:1+1}", "nothing is evaluated here: write the value itself (rlvr.yaml:2)"),
        ("size: 64", "size: ???", "roll.rollout_batch_size=???: has no value yet; write one (rlvr.yaml:2)"),
        (
            "fsdp2_train",
            "fsdp2",
            "strategy_name=fsdp2: no such strategy trains or infers log-probs here; choose one of",
        ),
        ("rewards:", "reward:", "the sections of RLVR's domains stand in rewards; rename it (rlvr.yaml:18)"),
        ("  device_mapping: list(range(0,8))\nact", "act", "roll.actor_train.device_mapping=null: names no device"),
    ],
)
def test_mistakes_in_the_file_are_told_with_their_line(file: Path, old: str, new: str, expected: str) -> None:
    assert expected in refused(changed(file, old, new))


def test_lines_of_files_that_defaults_bring(file: Path) -> None:
    (file.parent / "sampling.yaml").write_text("\ntemperature: hot\n", encoding="utf-8")
    file.write_text(f"defaults: [sampling@actor_infer.generating_args, _self_]\n{FILE}", encoding="utf-8")
    message = refused(file, "roll.actor_infer.generating_args.top_k=many")
    assert "generating_args.temperature=hot: must be a number; correct it (sampling.yaml:2)" in message
    assert "generating_args.top_k=many: must be a whole number; correct it (command line)" in message


def test_entries_about_hydra_itself_mean_nothing(file: Path) -> None:
    entries = "[{override hydra/job_logging: none}, {optional /args@actor_infer.generating_args: hot}, _self_]"
    (file.parent / "args").mkdir()
    (file.parent / "args" / "hot.yaml").write_text("temperature: 1.5\n", encoding="utf-8")
    file.write_text(f"defaults: {entries}\nhydra: {{run: {{dir: .}}}}\n{FILE}", encoding="utf-8")
    assert "actor_rollout_ref.rollout.temperature=1.5" in expand_roll([f"roll.config={file}", REWARD]).overrides


def test_optional_defaults_may_be_missing(file: Path) -> None:
    file.write_text(f"defaults: [{{optional args@actor_infer.generating_args: hot}}, _self_]\n{FILE}", encoding="utf-8")
    assert "actor_rollout_ref.rollout.temperature=0.95" in expand_roll([f"roll.config={file}", REWARD]).overrides
    (file.parent / "args").mkdir()
    (file.parent / "args" / "hot.yaml").write_text("temperature: 1.5\n", encoding="utf-8")
    assert "actor_rollout_ref.rollout.temperature=1.5" in expand_roll([f"roll.config={file}", REWARD]).overrides


def test_a_name_may_serve_hydra_alone(file: Path) -> None:
    file.write_text(f"hydra: {{run: {{dir: './out/${{my_tag}}'}}}}\nmy_tag: x\n{FILE}", encoding="utf-8")
    expand_roll([f"roll.config={file}", REWARD])


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        ("actor_train", [], "nothing says what is trained; write the section"),
        ("actor_infer", [], "nothing says what generates; write the section"),
        ("reference", ["roll.use_kl_loss=true"], "a KL needs a reference; write the section, or set use_kl_loss"),
        ("critic", ["roll.adv_estimator=gae"], "adv_estimator=gae, ROLL's default, needs a critic"),
    ],
)
def test_missing_sections(file: Path, section: str, change: list[str], expected: str) -> None:
    assert f"roll.{section}=null: {expected}" in refused(file, *change, f"roll.{section}=null")


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        (
            "list(reversed(range(0,8)))",
            "is neither a list nor a range, and nothing else is evaluated; write list(range",
        ),
        ("os.getpid()", "os.getpid() is neither a list nor a range"),
        ("list(range(8,0))", "the range is empty or runs backwards"),
        ("[a,b]", "=[a, b]: no list of whole numbers"),
        ("[0,[1]]", "no list of whole numbers"),
        ("true", "=true: no list of whole numbers"),
        ("8", "=8: one number; write list(range(0,8)) for 8 devices, [8] for the one of this rank"),
        ("0", "=0: one number; write [0] for the one of this rank"),
    ],
)
def test_device_mappings_that_are_none(file: Path, mapping: str, expected: str) -> None:
    message = refused(file, f"roll.actor_train.device_mapping={mapping}")
    assert message.startswith("roll.actor_train.device_mapping=")
    assert expected in message


def test_more_nodes_than_the_file_names_are_told(file: Path) -> None:
    roll = expand_roll([f"roll.config={file}", REWARD, "roll.num_nodes=2"])
    (told,) = [notice for notice in roll.notices if "num_nodes" in notice]
    assert told.startswith("roll.num_nodes=2: the device mappings reach rank 7: 1 x 8 devices, counted from")
    same = expand_roll([f"roll.config={file}", REWARD, "roll.num_nodes=1"])
    assert not any("num_nodes" in notice for notice in same.notices)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_gpus_per_node", "0", "must be a whole number of at least 1"),
        ("response_length", "abc", "must be a whole number of at least 1"),
        ("sequence_length", "abc", "must be a whole number of at least 1"),
        ("rpc_timeout", "long", "must be a number"),
        ("reward_clip", "much", "must be a number"),
        ("resume_from_checkpoint", "3", "must be true, false or a path"),
        ("rewards.math", "5", "a section, not a value"),
        ("rewards.math.tag_included", "gsm8k", "must be a list; write [gsm8k]"),
        ("rewards.math.query_filter_config.type", "mean", "choose one of no_filter, mean_filter, std_filter"),
        ("rewards.math.query_filter_config.filter_args", "{threshold_up: x}", "filter_args.threshold_up=x: must be"),
        ("rewards.math.query_filter_config.filter_args", "{threshold_upp: 1}", "did you mean threshold_up?"),
        ("train_infer_correction.filters", "5", "must be a list"),
        ("train_infer_correction.filters", "[5]", "filters[0]=5: must be a section"),
        ("train_infer_correction.filters", "[{enabld: true}]", "filters[0].enabld=true: ROLL has no such option; did"),
        ("train_infer_correction.filters", "[{ratio_low: x}]", "filters[0].ratio_low=x: must be a number"),
        *(
            (f"{role}.sequence_packing_args.max_packed_sequence_length_{pass_}", "abc", "must be a whole number of at")
            for role, pass_ in (("actor_train", "train"), ("critic", "train"), ("reference", "forward"))
        ),
        ("reference.max_tokens_per_microbatch_in_infer", "abc", "must be a whole number"),
        (f"actor_train.{CONFIG}.offload_policy", "cpu", "must be true or false"),
        (f"actor_train.{CONFIG}.tensor_model_parallel_size", "two", "must be a whole number of at least 1"),
        (f"actor_train.{CONFIG}.pipeline_model_parallel_size", "0", "must be a whole number of at least 1"),
        (f"actor_train.{CONFIG}.lr_scheduler_kwargs", "5", "must be a section"),
        (f"actor_train.{CONFIG}.lr_scheduler_kwargs", "{min_lr: low}", "={min_lr: low}: only min_lr, a number, is"),
        (f"actor_infer.{CONFIG}.tensor_parallel_size", "0", "must be a whole number of at least 1"),
        (f"actor_infer.{CONFIG}.load_format", "dumy", "choose one of dummy, auto, safetensors"),
    ],
)
def test_values_of_the_wrong_kind(file: Path, key: str, value: str, expected: str) -> None:
    message = refused(file, f"roll.{key}={value}")
    assert f"roll.{key}" in message
    assert expected in message


@pytest.mark.parametrize("override", ["data.train_batch_size=0", "actor_rollout_ref.actor.device_mapping=abc"])
def test_a_wrong_override_of_ours_is_told_under_our_name(
    file: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert cli.main(["--config-name", "roll", f"roll.config={file}", REWARD, override]) == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert message.startswith(f"{override}: ")
    assert "roll." not in message


def test_a_rate_of_0_has_no_least_share(file: Path) -> None:
    megatron = "{strategy_name: megatron_train, strategy_config: {lr_scheduler_kwargs: {min_lr: 1e-7}}}"
    changes = ["actor_rollout_ref.actor.optim.lr=0", f"roll.actor_train.strategy_args={megatron}"]
    roll = expand_roll([f"roll.config={file}", REWARD, *changes])
    assert not any("min_lr_ratio" in override for override in roll.overrides)


def test_an_override_in_verls_spelling_wins_over_the_file(file: Path) -> None:
    cfg = load_config([f"roll.config={file}", REWARD, "actor_rollout_ref.actor.grad_clip=0.25"], "roll")
    assert cfg.actor_rollout_ref.actor.optim.clip_grad == 0.25


@pytest.mark.parametrize("value", ["x", "8", 0, -1, 1.5, True, [1], ["a"], [], {"a": 1}, {}, None])
def test_no_value_of_any_key_ends_in_a_traceback(value: object) -> None:
    example = read_roll(EXAMPLE).nested
    every = {"adv_estimator": "gae", "use_kl_loss": True, "add_token_level_kl": True, "critic": example["actor_train"]}
    for key in sorted({*_keys(example), *DEFAULTS} - {"rewards"}):
        nested = deepcopy({**example, **every})
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
        with suppress(UserError):
            to_overrides(translate_roll(RollFile(nested, frozenset()), given=GIVEN).values)


def _keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, below in tree.items():
        yield f"{prefix}{name}"
        if isinstance(below, dict):
            yield from _keys(below, f"{prefix}{name}.")


def test_a_mistake_found_under_our_name_leads_back_to_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(file, "gpu_memory_utilization: 0.6", "gpu_memory_utilization: 1.6")
    status = cli.main(["--config-name", "roll", f"roll.config={file}", REWARD, "roll.rpc_timeout=-1"])
    told = capsys.readouterr().err
    ours, source = "actor_rollout_ref.rollout.gpu_memory_utilization", f"actor_infer.{CONFIG}.gpu_memory_utilization"
    assert status == 2
    assert f"  {ours}=1.6: must be at most 1.0" in told
    assert f"from ROLL's file:\n  {ours}: {source} (rlvr.yaml:16)" in told
    assert "  trainer.step_timeout_s: rpc_timeout (command line)" in told


def test_a_mistake_without_a_part_in_the_file_says_nothing_of_it(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = "actor_rollout_ref.rollout.gpu_memory_utilization=1.6"
    assert cli.main(["--config-name", "roll", f"roll.config={file}", REWARD, ours]) == 2
    assert "ROLL's file" not in capsys.readouterr().err
