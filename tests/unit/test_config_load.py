"""Overrides, older spellings, a user's own YAML: what is accepted, and the message for what is not."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from trainer.config.keys import known_keys
from trainer.config.load import CONFIG_DIR, load_config, to_config
from trainer.config.overrides import check_override_keys, prepare_overrides

BASE = ["data.train_files=train.jsonl", "actor_rollout_ref.model.path=org/model"]
ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        load_config([*BASE, *overrides])
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        (f"{ROLLOUT}.enforce_eagr=True", f"{ROLLOUT}.enforce_eager"),
        ("rollout.n=8", f"{ROLLOUT}.n"),
        ("actor.optim.lr=1e-5", f"{ACTOR}.optim.lr"),
        ("actor_rolout_ref.rollout.n=8", f"{ROLLOUT}.n"),
        ("data.train_batchsize=8", "data.train_batch_size"),
        ("trainer.train_batch_size=8", "data.train_batch_size"),
        ("algoritm.gamma=1", "algorithm.gamma"),
        ("algorithm.lambda=1", "algorithm.lam"),
        ("critic.fsdp_config.dtype=float32", f"{ACTOR}.fsdp_config.dtype"),
        ("trainer.total_epoch=1", "trainer.total_epochs"),
        ("adv_estimator=grpo", "algorithm.adv_estimator"),
        (f"+{ROLLOUT}.enforce_eagr=True", f"{ROLLOUT}.enforce_eager"),
        (f"++{ROLLOUT}.enforce_eagr=True", f"{ROLLOUT}.enforce_eager"),
        ("data={trian_files: x}", "data.train_files"),
        ("actor_rollout_ref={actor: {strateg: fsdp}}", f"{ACTOR}.strategy"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    message = refused(override)
    assert "unknown key; did you mean" in message
    assert nearest in message


def test_unknown_key_with_nothing_near() -> None:
    message = refused("zzz=1")
    assert message == "zzz=1: unknown key; `python -m trainer.main --cfg job` lists every key"


def test_all_bad_overrides_are_listed_at_once() -> None:
    message = refused("zzz=1", "data=5", "~data.seed", "foo")
    assert message.startswith("4 problems in the configuration:\n  zzz=1: ")
    assert len(message.splitlines()) == 5


@pytest.mark.parametrize("override", ["data=5", f"{ACTOR}=null", f"+{ACTOR}=1", "data={}x", "trainer=[1]"])
def test_a_section_is_not_replaced(override: str) -> None:
    assert re.search("is a section, not a value; set a key below it|cannot be read", refused(override))


def test_a_section_inside_a_dictionary_is_not_replaced() -> None:
    assert f"{ACTOR}.optim is a section" in refused("actor_rollout_ref={actor: {optim: 5}}")


@pytest.mark.parametrize("override", ["~data.seed", "~data.seed=1", "~critic"])
def test_nothing_is_removed(override: str) -> None:
    assert "cannot be removed" in refused(override)


@pytest.mark.parametrize("override", ["trainer.logger=console,wandb", "data.seed=range(1,3)", "data.seed=choice(1,2)"])
def test_a_sweep_is_refused(override: str) -> None:
    message = refused(override)
    assert f"quote the value: '{override.partition('=')[0]}=\"" in message
    assert ("for a list" in message) == ("(" not in override)


@pytest.mark.parametrize("number", ["20261122", "2026_11", "1.5"])
def test_a_name_may_look_like_a_number(number: str) -> None:
    assert load_config([*BASE, f"trainer.experiment_name={number}"]).trainer.experiment_name == number


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("~data", "~data: keys cannot be removed, every one of them is needed; set the keys below data instead"),
        ("~data.sede", "~data.sede: keys cannot be removed, every one of them is needed; did you mean data.seed?"),
        (
            "actor_rollout_ref.rollout.n.foo=3",
            "actor_rollout_ref.rollout.n.foo=3: actor_rollout_ref.rollout.n is a value, not a section; set "
            "actor_rollout_ref.rollout.n=...",
        ),
        ("trainer.n_gpus=8", "trainer.n_gpus=8: unknown key; did you mean trainer.n_gpus_per_node?"),
        (
            "actor_rollout_ref=foo",
            "actor_rollout_ref=foo: actor_rollout_ref is a section, not a value; set a key below it, such as "
            "actor_rollout_ref.model.path=foo",
        ),
        (
            "trainer.project_name=a=b",
            "trainer.project_name=a=b: cannot be read (mismatched input '=' expecting <EOF>); put quotes around the "
            "value: 'trainer.project_name=\"a=b\"'",
        ),
        (
            "actor_rollout_ref.rollout.log_prob_micro_batch_sise_per_gpu=16",
            "actor_rollout_ref.rollout.log_prob_micro_batch_sise_per_gpu=16: unknown key; did you mean "
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu?",
        ),
        (
            "actor_rollout_ref.rollout.tensor_parallel_size=4",
            "actor_rollout_ref.rollout.tensor_parallel_size=4: unknown key; did you mean "
            "actor_rollout_ref.rollout.tensor_model_parallel_size?",
        ),
        ("data.train_files=3", "data.train_files=3: must be a path, glob, or list of them"),
        ("actor_rollout_ref.model.path=null", "actor_rollout_ref.model.path=null: must be a path"),
        ("data.prompt_key=5", "data.prompt_key=5: must be text; put quotes around it: 'data.prompt_key=\"5\"'"),
        (
            "actor_rollout_ref.actor.device_mapping=[0-3]",
            "actor_rollout_ref.actor.device_mapping=[0-3]: must be ranks: 0-7, 0,2,5-6 or [0,1], or null",
        ),
        (
            "actor_rollout_ref.actor.optim.betas=[0.9]",
            "actor_rollout_ref.actor.optim.betas=[0.9]: must have 2 items",
        ),
        ("actor_rollout_ref.actor.optim.betas=[]", "actor_rollout_ref.actor.optim.betas=[]: must have 2 items"),
    ],
)
def test_one_mistake_is_told_once_with_what_to_do(override: str, message: str) -> None:
    assert refused(override) == message


def test_the_mistake_of_a_key_that_others_follow_is_told_once() -> None:
    actor = "actor_rollout_ref.actor.ppo_mini_batch_size"
    assert refused(f"{actor}=0") == f"{actor}=0: must be greater than 0"
    both = refused(f"{actor}=0", "critic.ppo_mini_batch_size=none")
    assert "critic.ppo_mini_batch_size=none: must be a whole number" in both
    assert len(both.splitlines()) == 3


@pytest.mark.parametrize("override", ["data.train_files=a=b.jsonl", "trainer.logger=[console", "=1", "data.seed"])
def test_unreadable_override(override: str) -> None:
    message = refused(override)
    assert message.startswith(override)
    assert "put quotes around the value" in message or "write key=value" in message


@pytest.mark.parametrize("text", [r"C:\dir(a", r"a(\"b", "a(\\", 'say "no(', "a(b"])
def test_what_is_proposed_for_text_is_read_as_that_text(text: str) -> None:
    proposed = refused(f"data.answer_key={text}").rpartition("put quotes around the value: ")[2]
    (override,) = shlex.split(proposed)
    assert OverridesParser.create().parse_override(override).value() == text


def test_hydra_keys_pass() -> None:
    check_override_keys(["hydra.verbose=true", "hydra/job_logging=none"], known_keys())


def test_plus_means_the_same_on_a_known_key() -> None:
    assert load_config([*BASE, "+data.seed=3"]).data.seed == 3
    assert load_config([*BASE, "++data.seed=4"]).data.seed == 4


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_below_free_form_dictionaries_anything_goes(plus: str) -> None:
    cfg = load_config(
        [
            *BASE,
            f"{plus}{ROLLOUT}.engine_kwargs.vllm.compilation_config.level=3",
            f"{plus}actor_rollout_ref.model.override_config.num_hidden_layers=2",
            f"{plus}data.apply_chat_template_kwargs.enable_thinking=false",
        ]
    )
    assert cfg.actor_rollout_ref.rollout.engine_kwargs.vllm == {"compilation_config": {"level": 3}}
    assert cfg.actor_rollout_ref.model.override_config == {"num_hidden_layers": 2}
    assert cfg.data.apply_chat_template_kwargs == {"enable_thinking": False}


def test_a_section_can_be_set_as_a_dictionary() -> None:
    cfg = load_config([*BASE, "trainer={nnodes: 2, n_gpus_per_node: 4}"])
    assert (cfg.trainer.nnodes, cfg.trainer.n_gpus_per_node, cfg.trainer.device) == (2, 4, "auto")


@pytest.mark.parametrize(
    ("written", "value"),
    [("0-7", "0-7"), ("0,2,5-6", "0,2,5-6"), ("3", "3"), ("list(range(0,12))", "list(range(0,12))"), ("null", None)],
)
def test_device_mappings_need_no_quotes(written: str, value: str | None) -> None:
    assert load_config([*BASE, f"{ROLLOUT}.device_mapping={written}"]).actor_rollout_ref.rollout.device_mapping == value
    assert load_config([*BASE, "critic.device_mapping=[0,1]"]).critic.device_mapping == [0, 1]


def test_files_may_be_one_a_glob_or_several() -> None:
    assert load_config([*BASE, "data.train_files=d/*.parquet"]).data.train_files == ("d/*.parquet",)
    assert load_config([*BASE, "data.train_files=[a.jsonl,b.jsonl]"]).data.train_files == ("a.jsonl", "b.jsonl")
    assert load_config(BASE).data.val_files is None


def test_home_directory_is_expanded() -> None:
    cfg = load_config([*BASE, "data.train_files=~/a.jsonl", "actor_rollout_ref.model.path=~/m"])
    assert cfg.data.train_files == (str(Path.home() / "a.jsonl"),)
    assert cfg.actor_rollout_ref.model.tokenizer_path == str(Path.home() / "m")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.train_batch_size=0", "data.train_batch_size=0: must be greater than 0"),
        ("data.train_batch_size=-8", "data.train_batch_size=-8: must be greater than 0"),
        ("data.train_batch_size=1e3", "data.train_batch_size=1000.0: must be a whole number"),
        ("data.train_batch_size=many", "data.train_batch_size=many: must be a whole number"),
        ("data.train_batch_size='8'", "data.train_batch_size=8: must be a whole number (it is text: '8')"),
        ("data.train_batch_size=true", "data.train_batch_size=true: must be a whole number"),
        ("data.train_batch_size=null", "data.train_batch_size=null: must be a whole number"),
        ("data.train_batch_size=[1]", "data.train_batch_size=[1]: must be a whole number"),
        ("data.train_batch_size={a: 1}", "data.train_batch_size={a: 1}: must be a whole number"),
        ("data.shuffle=1", "data.shuffle=1: must be true or false"),
        ("data.train_max_samples=0", "data.train_max_samples=0: must be -1 or greater than 0"),
        ("data.train_files=[]", "data.train_files=[]: must have at least 1 items"),
        ("data.truncation=middel", "'left', 'right' or 'middle'"),
        (f"{ACTOR}.clip_ratio_c=1.0", f"{ACTOR}.clip_ratio_c=1.0: must be greater than 1.0"),
        ("critic.strategy=fsdp3", "critic.strategy=fsdp3: must be one of 'fsdp' or 'megatron'"),
        (f"{ACTOR}.optim.betas=[0.9]", "betas"),
        (f"{ACTOR}.optim.betas=[0.9,0.9,0.9]", "must have at most 2 items"),
        (f"{ACTOR}.optim.lr=-1", f"{ACTOR}.optim.lr=-1: must be at least 0"),
        (f"{ACTOR}.optim.lr=nan", f"{ACTOR}.optim.lr=nan: must be a finite number"),
        (f"{ACTOR}.checkpoint.save_contents=[modle]", "'model', 'optimizer', 'extra' or 'hf_model'"),
        (f"{ACTOR}.device_mapping=[a]", f"{ACTOR}.device_mapping=[a]: "),
        (f"{ROLLOUT}.temperature=-1", f"{ROLLOUT}.temperature=-1: must be at least 0"),
        (f"{ROLLOUT}.top_p=1.5", "must be at most 1"),
        (f"{ROLLOUT}.sleep_level=3", "'auto', 0, 1 or 2"),
        (f"{ROLLOUT}.sleep_level=true", "'auto', 0, 1 or 2"),
        (f"{ROLLOUT}.calculate_log_probs=some", "must be 'monitor' or true or false"),
        (f"{ROLLOUT}.engine_kwargs.vllm=5", "must be a dictionary"),
        ("algorithm.adv_estimator=gpo", "algorithm.adv_estimator=gpo: must be one of dr_grpo, gae, gdpo, gpg, grpo, "),
        ("reward.max_error_rate=2", "must be at most 1"),
        ("trainer.logger=[console,wanbd]", "'console', 'tensorboard' or 'wandb'"),
        ("trainer.test_freq=-2", "trainer.test_freq=-2: must be -1 or greater than 0"),
        ("trainer.experiment_name=''", "must not be empty"),
    ],
)
def test_impossible_value(override: str, complaint: str) -> None:
    message = refused(override)
    assert complaint in message
    assert override.partition("=")[0] in message


def test_every_impossible_value_is_listed() -> None:
    message = refused("data.train_batch_size=0", "critic.ppo_epochs=x", f"{ROLLOUT}.n=0")
    assert message.startswith("3 problems in the configuration:")


def test_what_has_no_default_must_be_given() -> None:
    with pytest.raises(ValueError) as error:
        load_config()
    assert "data.train_files=???: has no default; give the training prompts" in str(error.value)
    assert "actor_rollout_ref.model.path=???: has no default; give a directory or hub name" in str(error.value)


def test_an_unknown_configuration_name() -> None:
    with pytest.raises(ValueError, match=r"--config-name=ppo_trainr: .* did you mean ppo_trainer\?"):
        load_config(BASE, "ppo_trainr")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("critic.model.fsdp_config.dtype=float32", "critic.fsdp.dtype", "float32"),
        ("custom_reward_function.name=f", "reward.custom_reward_function.name", "f"),
        (f"{ACTOR}.optim.warmup_style=cosine", f"{ACTOR}.optim.lr_scheduler_type", "cosine"),
        (f"{ACTOR}.ppo_micro_batch_size=32", f"{ACTOR}.ppo_micro_batch_size_per_gpu", 4),
        ("trainer.n_devices_per_node=2", "trainer.n_gpus_per_node", 2),
        ("+trainer.n_devices_per_node=2", "trainer.n_gpus_per_node", 2),
    ],
)
def test_older_spellings_are_translated_and_told(
    override: str, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = load_config([*BASE, override])
    assert OmegaConf.select(OmegaConf.create(cfg.model_dump(mode="json")), key) == value
    old = override.partition("=")[0].lstrip("+")
    assert f"translated from verl: {old}" in (told := capsys.readouterr().err)
    assert f"-> {key}" in told


def test_a_mistyped_key_below_an_older_section_is_unknown() -> None:
    assert "did you mean critic.fsdp.dtype?" in refused("critic.model.fsdp_config.dtyp=float32")


def test_prepared_overrides_are_what_hydra_gets() -> None:
    prepared, notices = prepare_overrides(["+trainer.n_devices_per_node=2", f"{ACTOR}.device_mapping=0,1"])
    assert prepared == ["trainer.n_gpus_per_node=2", f'{ACTOR}.device_mapping="0,1"']
    assert len(notices) == 1


def write(directory: Path, text: str) -> Path:
    (directory / "mine.yaml").write_text(text)
    return directory


HEAD = "defaults: [ppo_trainer, _self_]\ndata: {train_files: t.jsonl}\nactor_rollout_ref: {model: {path: org/m}}\n"


def test_a_yaml_of_the_users_own(tmp_path: Path) -> None:
    cfg = load_config(["data.seed=9"], "mine", config_dir=write(tmp_path, f"{HEAD}trainer: {{nnodes: 3}}\n"))
    assert (cfg.trainer.nnodes, cfg.data.seed, cfg.trainer.n_gpus_per_node) == (3, 9, 8)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("trainer: {nnode: 3}", "trainer.nnode=3: unknown key; did you mean trainer.nnodes"),
        ("rollout: {n: 3}", "rollout={n: 3}: unknown key; did you mean actor_rollout_ref.rollout?"),
        ("trainer: 5", "trainer=5: trainer is a section, not a value"),
        ("critic: {optim: null}", "critic.optim=null: critic.optim is a section, not a value"),
        ("trainer: {nnodes: '2'}", "trainer.nnodes=2: must be a whole number (it is text: '2')"),
        ("critic: {optim: {lr: '${actor.lr}'}}", "critic.optim.lr: Interpolation key 'actor.lr' not found"),
        ("data: {train_files: '???'}", "data.train_files=???: has no default"),
        ("trainer: {nnodes: 1", "mine.yaml"),
        ("trainer: {nnodes: 1}\ntrainer: {nnodes: 2}", "duplicate key trainer"),
    ],
)
def test_mistakes_in_a_yaml_of_the_users_own(tmp_path: Path, text: str, complaint: str) -> None:
    head = HEAD.replace("data: {train_files: t.jsonl}\n", "") if text.startswith("data") else HEAD
    with pytest.raises(ValueError) as error:
        load_config([], "mine", config_dir=write(tmp_path, f"{head}{text}\n"))
    assert complaint in str(error.value)


def test_a_yaml_without_the_defaults(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing from the configuration; begin the file with `defaults:"):
        load_config([], "mine", config_dir=write(tmp_path, "trainer: {nnodes: 3}\n"))


def test_a_yaml_that_starts_from_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Could not load 'ppo_trainr'; name a file of"):
        load_config([], "mine", config_dir=write(tmp_path, "defaults: [ppo_trainr, _self_]\n"))


def test_older_spellings_in_a_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{HEAD}critic: {{model: {{fsdp_config: {{dtype: float32}}}}}}\ncustom_reward_function: {{path: a.py}}\n"
    cfg = load_config([], "mine", config_dir=write(tmp_path, text))
    assert cfg.critic.fsdp.dtype == "float32"
    assert cfg.reward.custom_reward_function.path == "a.py"
    told = capsys.readouterr().err
    assert "critic.model.fsdp_config.dtype -> critic.fsdp.dtype" in told
    assert "custom_reward_function.path -> reward.custom_reward_function.path" in told
    cfg = load_config(["critic.fsdp.dtype=bfloat16"], "mine", config_dir=tmp_path)
    assert cfg.critic.fsdp.dtype == "bfloat16", "the command line wins"


def test_to_config_takes_a_composed_tree() -> None:
    tree = OmegaConf.load(CONFIG_DIR / "ppo_trainer.yaml")
    tree.pop("defaults")
    tree.pop("hydra")
    tree.data.train_files = "a.jsonl"
    tree.actor_rollout_ref.model.path = "org/m"
    assert to_config(tree) == load_config(["data.train_files=a.jsonl", "actor_rollout_ref.model.path=org/m"])
