"""Checks between keys and of the inputs: every refusal names key, value and remedy; every surprise has a notice."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from trainer.config.inputs import check_model_path, check_reward_function, find_data_files
from trainer.config.load import load_config
from trainer.config.mapping import role_devices
from trainer.config.validate import validate

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
GRPO = ["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=8"]
MEGATRON = f"{ACTOR}.megatron"
TENSOR, PIPELINE = f"{MEGATRON}.tensor_model_parallel_size", f"{MEGATRON}.pipeline_model_parallel_size"


def make_model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"")
    return directory


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """Overrides with which the default configuration is valid."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1="}\n')
    return [
        f"data.train_files={tmp_path}/train.jsonl",
        f"actor_rollout_ref.model.path={make_model(tmp_path / 'model')}",
    ]


def refused(base: list[str], *overrides: str) -> str:
    cfg = load_config([*base, *overrides])
    with pytest.raises(ValueError) as error:
        validate(cfg)
    return str(error.value)


def test_the_defaults_are_valid_and_quiet(base: list[str]) -> None:
    assert validate(load_config(base)) == []
    assert validate(load_config([*base, *GRPO])) == []


@pytest.mark.parametrize(
    ("overrides", "problem", "remedy"),
    [
        (
            ["data.train_batch_size=64"],
            f"{ACTOR}.ppo_mini_batch_size=256: larger than data.train_batch_size=64",
            f"set {ACTOR}.ppo_mini_batch_size=64",
        ),
        (
            ["data.train_batch_size=1000"],
            f"data.train_batch_size=1000: not divisible by {ACTOR}.ppo_mini_batch_size=256",
            f"set {ACTOR}.ppo_mini_batch_size=250 or data.train_batch_size=1024",
        ),
        (
            ["critic.ppo_mini_batch_size=300"],
            "data.train_batch_size=1024: not divisible by critic.ppo_mini_batch_size=300",
            "set critic.ppo_mini_batch_size=256",
        ),
        (
            ["reward.overlong_buffer.len=1000"],
            "reward.overlong_buffer.len=1000: longer than data.max_response_length=512",
            "e.g. 128, or to 0",
        ),
        (
            ["reward.overlong_buffer.len=100", "algorithm.adv_estimator=max_rl", f"{ROLLOUT}.n=8"],
            "reward.overlong_buffer.len=100: algorithm.adv_estimator=max_rl takes rewards for probabilities",
            "set it to 0, or choose another estimator",
        ),
        (
            ["reward.overlong_buffer.len=100", "algorithm.adv_estimator=gdpo", f"{ROLLOUT}.n=8"],
            "reward.overlong_buffer.len=100: algorithm.adv_estimator=gdpo takes the parts of the rewards",
            "set it to 0, or choose another estimator",
        ),
        (
            [*GRPO, f"{ROLLOUT}.n=64", "algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.type=adaptive"],
            "algorithm.kl_ctrl.horizon=10000: with the 65536 responses of a step",
            "set it above 13107, e.g. to 65536",
        ),
        (
            ["algorithm.filter_groups.enable=true"],
            f"algorithm.filter_groups.enable=true: compares the responses to one prompt, and {ROLLOUT}.n=1",
            f"set {ROLLOUT}.n=8",
        ),
        (
            ["data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=4"],
            f"{ACTOR}.ppo_mini_batch_size=4: 4 sequences ({ROLLOUT}.n=1) for 8 devices",
            "set it to 8, or use fewer devices",
        ),
        (
            ["data.train_batch_size=4", f"{ACTOR}.ppo_mini_batch_size=4"],
            f"{ACTOR}.ppo_mini_batch_size=4: 4 sequences ({ROLLOUT}.n=1) for 8 devices",
            f"set data.train_batch_size=8 with {ACTOR}.ppo_mini_batch_size=8, or use fewer devices",
        ),
        (
            [f"{ACTOR}.ppo_max_token_len_per_gpu=1000"],
            f"{ACTOR}.ppo_max_token_len_per_gpu=1000: smaller than one sequence of 1024 tokens",
            "set it to at least 1024",
        ),
        (
            ["critic.ppo_max_token_len_per_gpu=1000"],
            "critic.ppo_max_token_len_per_gpu=1000: smaller",
            "set it to at least 1024",
        ),
        (
            ["algorithm.use_kl_in_reward=true", "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=1000"],
            "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=1000: smaller",
            "set it to at least 1024",
        ),
        ([f"{ROLLOUT}.max_model_len=1023"], f"{ROLLOUT}.max_model_len=1023: smaller", "at least 1024, or to null"),
        (
            [f"{ROLLOUT}.enable_chunked_prefill=false", f"{ROLLOUT}.max_num_batched_tokens=512"],
            f"{ROLLOUT}.max_num_batched_tokens=512: a prompt",
            "set it to at least 1024",
        ),
        (
            [f"{ROLLOUT}.max_num_batched_tokens=128"],
            f"{ROLLOUT}.max_num_batched_tokens=128: smaller than {ROLLOUT}.max_num_seqs=256",
            f"set {ROLLOUT}.max_num_seqs=128",
        ),
        (
            [f"{ROLLOUT}.sleep_level=1", "trainer.device=cpu"],
            f"{ROLLOUT}.sleep_level=1: sleeping needs a GPU",
            f"set {ROLLOUT}.sleep_level=auto",
        ),
        (
            [f"{ROLLOUT}.sleep_level=2", f"{ROLLOUT}.free_cache_engine=false"],
            f"{ROLLOUT}.sleep_level=2: contradicts",
            f"set {ROLLOUT}.sleep_level=auto",
        ),
        (
            ["critic.device_mapping=0-8"],
            "critic.device_mapping=0-8: rank 8 does not exist, there are 8 devices (ranks 0-7)",
            "raise trainer.nnodes or trainer.n_gpus_per_node",
        ),
        ([f"{ACTOR}.device_mapping=3-1"], f"{ACTOR}.device_mapping=3-1: the range 3-1 runs backwards", "write ranks"),
        ([f"{ROLLOUT}.device_mapping=[0,0]"], f"{ROLLOUT}.device_mapping=[0, 0]: names [0] more than once", "write"),
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=3"],
            f"{ROLLOUT}.tensor_model_parallel_size=3: does not divide the 8 devices of the rollout",
            "set it to a divisor of 8",
        ),
        (
            [f"{ROLLOUT}.tensor_model_parallel_size=2", f"{ROLLOUT}.device_mapping=0-2"],
            f"{ROLLOUT}.tensor_model_parallel_size=2: does not divide the 3 devices",
            f"change {ROLLOUT}.device_mapping",
        ),
        (["algorithm.adv_estimator=grpo"], f"{ROLLOUT}.n=1: algorithm.adv_estimator=grpo", f"set {ROLLOUT}.n=8"),
        (
            ["critic.enable=false"],
            "critic.enable=false: algorithm.adv_estimator=gae needs",
            "set critic.enable=null, or algorithm.adv_estimator=grpo",
        ),
        ([f"{ROLLOUT}.temperature=0"], f"{ROLLOUT}.temperature=0.0: greedy", "set it above 0"),
        ([f"{ROLLOUT}.temperature=0.005"], f"{ROLLOUT}.temperature=0.005: vLLM samples at 0.01", "set it to 0.01 or"),
        (
            [*GRPO, "trainer.critic_warmup=5"],
            "trainer.critic_warmup=5: there is no critic",
            "set trainer.critic_warmup=0",
        ),
        (
            ["trainer.resume_mode=resume_path"],
            "trainer.resume_from_path=null: trainer.resume_mode=resume_path needs a checkpoint",
            "set trainer.resume_from_path",
        ),
        (
            ["trainer.test_freq=5"],
            "trainer.test_freq=5: there is nothing to validate on, data.val_files=null",
            "set data.val_files, or trainer.test_freq=-1",
        ),
    ],
)
def test_keys_that_do_not_go_together(base: list[str], overrides: list[str], problem: str, remedy: str) -> None:
    message = refused(base, *overrides)
    assert problem in message
    assert remedy in message
    assert len(message.splitlines()) == 1, "one mistake, one problem"


@pytest.mark.parametrize(
    ("overrides", "problem", "remedy"),
    [
        (
            [f"{TENSOR}=3"],
            f"{TENSOR}=3 x pipeline_model_parallel_size=1: 3 devices hold one model, and do not divide the 8",
            f"change them, {ACTOR}.device_mapping, or trainer.n_gpus_per_node; tensor_model_parallel_size=2 x "
            "pipeline_model_parallel_size=1 would fit",
        ),
        (
            [f"{TENSOR}=4", f"{PIPELINE}=4"],
            f"{TENSOR}=4 x pipeline_model_parallel_size=4: 16 devices hold one model, and do not divide the 8",
            "or trainer.n_gpus_per_node; tensor_model_parallel_size=2 x pipeline_model_parallel_size=4 would fit",
        ),
        (
            [f"{TENSOR}=2", f"{ACTOR}.device_mapping=0-2"],
            f"{TENSOR}=2 x pipeline_model_parallel_size=1: 2 devices hold one model, and do not divide the 3",
            f"{ACTOR}.device_mapping",
        ),
        (
            [f"{TENSOR}=2", f"{MEGATRON}.expert_model_parallel_size=8"],
            f"{MEGATRON}.expert_model_parallel_size=8: experts are spread over data-parallel devices, and 8 does not "
            f"divide the 4 of {ACTOR}",
            "set it to a divisor of 4",
        ),
        (
            [f"{MEGATRON}.virtual_pipeline_model_parallel_size=2"],
            f"{MEGATRON}.virtual_pipeline_model_parallel_size=2: chunks of pipeline stages, and there is one stage",
            f"set {PIPELINE}=2 or more, or leave it null",
        ),
        (
            [*GRPO, f"{ACTOR}.use_kl_loss=true", f"{PIPELINE}=2", "actor_rollout_ref.ref.device_mapping=0"],
            "actor_rollout_ref.ref.megatron.tensor_model_parallel_size=1 x pipeline_model_parallel_size=2: 2 devices "
            "hold one model, and do not divide the 1 of actor_rollout_ref.ref",
            "actor_rollout_ref.ref.device_mapping",
        ),
        (
            [f"{TENSOR}=2", "data.train_batch_size=3", f"{ACTOR}.ppo_mini_batch_size=3"],
            f"{ACTOR}.ppo_mini_batch_size=3: 3 sequences ({ROLLOUT}.n=1) for 4 data-parallel ranks",
            f"set data.train_batch_size=4 with {ACTOR}.ppo_mini_batch_size=4, or",
        ),
    ],
)
def test_what_megatron_cannot_do(base: list[str], overrides: list[str], problem: str, remedy: str) -> None:
    message = refused(base, f"{ACTOR}.strategy=megatron", *overrides)
    assert problem in message
    assert remedy in message
    assert len(message.splitlines()) == 1, "one mistake, one problem"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{ACTOR}.strategy=megatron", f"{TENSOR}=2", f"{PIPELINE}=2"],
        [f"{ACTOR}.strategy=megatron", f"{TENSOR}=8", "critic.strategy=fsdp", "critic.device_mapping=0-2"],
        [
            f"{ACTOR}.strategy=megatron",
            f"{TENSOR}=8",
            "data.train_batch_size=1",
            f"{ACTOR}.ppo_mini_batch_size=1",
            f"{ROLLOUT}.tensor_model_parallel_size=8",
        ],
        ["critic.strategy=megatron", "critic.megatron.tensor_model_parallel_size=4"],
        [f"{ACTOR}.strategy=megatron", f"{TENSOR}=2", "critic.megatron.tensor_model_parallel_size=4"],
    ],
)
def test_engines_mix(base: list[str], overrides: list[str]) -> None:
    assert validate(load_config([*base, *overrides])) == []


def test_settings_of_an_engine_that_is_not_used_are_not_checked(base: list[str]) -> None:
    assert validate(load_config([*base, f"{TENSOR}=3"])) == []


@pytest.mark.parametrize(
    ("installed", "has_triton", "problem"),
    [
        (None, True, "megatron-core is not installed"),
        ("0.15.3", True, "megatron-core 0.15.3: Tandem needs >=0.16.1,<0.20"),
        ("0.20.0rc1", True, "megatron-core 0.20.0rc1: Tandem needs >=0.16.1,<0.20"),
        ("0.18.0", False, "megatron-core 0.18.0 imports triton, which is not installed"),
        ("0.19.2", True, ""),
        ("0.17.1", False, ""),
    ],
)
def test_megatron_that_is_installed(
    base: list[str], monkeypatch: pytest.MonkeyPatch, installed: str | None, has_triton: bool, problem: str
) -> None:
    def version(name: str) -> str:
        assert name == "megatron-core"
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr("trainer.config.megatron.version", version)
    monkeypatch.setattr("trainer.config.megatron.find_spec", lambda name: object() if has_triton else None)
    assert validate(load_config(base)) == [], "nobody asks for it"
    if not problem:
        assert validate(load_config([*base, f"{ACTOR}.strategy=megatron"])) == []
        return
    message = refused(base, f"{ACTOR}.strategy=megatron")
    assert message.startswith(f'{ACTOR}.strategy=megatron: {problem}; python -m pip install "megatron-core==0.16.1"')
    assert message.endswith(f"or set {ACTOR}.strategy=fsdp")


def test_all_problems_at_once(base: list[str]) -> None:
    message = refused(base, "data.train_batch_size=64", f"{ROLLOUT}.temperature=0", "trainer.test_freq=1")
    assert message.startswith("3 problems in the configuration:\n")


def test_a_critic_that_is_not_used_is_not_checked(base: list[str]) -> None:
    unused = ["critic.ppo_mini_batch_size=300", "critic.ppo_max_token_len_per_gpu=1", "critic.device_mapping=99"]
    assert validate(load_config([*base, *GRPO, *unused, "critic.model.path=/nowhere"])) == []


def test_a_tracker_that_is_not_installed(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(base, "trainer.logger=[console,wandb]")
    assert "trainer.logger=[console, wandb]: wandb is not installed; pip install wandb" in message


@pytest.mark.parametrize(
    ("overrides", "notice"),
    [
        ([f"{ACTOR}.use_kl_loss=true", "algorithm.use_kl_in_reward=true"], "counts twice"),
        ([f"{ACTOR}.loss_scale_factor=10"], f"{ACTOR}.loss_scale_factor=10.0 has no effect"),
        ([*GRPO, "critic.enable=true"], "values algorithm.adv_estimator=grpo does not use"),
        ([f"{ROLLOUT}.top_p=0.9"], f"{ROLLOUT}.top_p=0.9: the sampler draws from a truncated distribution"),
        ([f"{ROLLOUT}.top_k=10"], f"{ROLLOUT}.top_k=10: the sampler draws"),
        (["trainer.device=cpu"], f"{ROLLOUT}.kv_cache_gb=null: on a CPU the KV cache gets 1 GiB"),
        (
            ["trainer.device=cpu", f"{ROLLOUT}.kv_cache_gb=1", f"{ACTOR}.fsdp_config.param_offload=true"],
            f"{ACTOR}.fsdp_config.param_offload=true: on a CPU this copies",
        ),
        ([f"{ACTOR}.policy_loss.loss_mode=gspo"], "loss_agg_mode=token-mean has no effect: "),
        ([f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.kl_loss_type=kl"], "kl_loss_type=kl: in the loss its gradient is 0"),
        (
            [*GRPO, "algorithm.adv_estimator=gpg", "reward.overlong_buffer.len=9"],
            "reward.overlong_buffer.len=9: a failure that is punished for its length has a reward other than 0",
        ),
        ([f"{ACTOR}.optim.lr=0"], f"{ACTOR}.optim.lr=0.0: nothing is learned"),
        (["trainer.resume_from_path=x"], "trainer.resume_from_path=x has no effect: trainer.resume_mode=auto"),
    ],
)
def test_notices(base: list[str], overrides: list[str], notice: str) -> None:
    notices = validate(load_config([*base, *overrides]))
    assert len(notices) == 1
    assert notice in notices[0]


def test_a_truncated_sampler_is_told_without_the_monitor_too(base: list[str]) -> None:
    (notice,) = validate(load_config([*base, f"{ROLLOUT}.top_p=0.9", f"{ROLLOUT}.calculate_log_probs=false"]))
    assert notice == (
        f"{ROLLOUT}.top_p=0.9: the sampler draws from a truncated distribution and the trainer scores with the full "
        f"one, so ratios and gradients are not those of what was sampled; {ROLLOUT}.top_p=1.0 and {ROLLOUT}.top_k=-1 "
        "sample from all tokens"
    )


def test_greedy_validation_repeats_itself(base: list[str]) -> None:
    val = base[0].replace("train_files", "val_files")
    assert "draws the same response" in validate(load_config([*base, val, f"{ROLLOUT}.val_kwargs.n=4"]))[0]


def test_role_devices() -> None:
    assert role_devices(None, "k", num_devices=3) == (0, 1, 2)
    assert role_devices("1-2", "k", num_devices=3) == (1, 2)


def test_inputs_are_checked_together(base: list[str], tmp_path: Path) -> None:
    message = refused(
        base,
        f"data.train_files={tmp_path}/none.jsonl",
        f"data.val_files={tmp_path}/*.parquet",
        f"actor_rollout_ref.model.path={tmp_path}/nowhere",
        f"critic.model.path={tmp_path}",
        f"reward.custom_reward_function.path={tmp_path}/none.py",
    )
    assert message.startswith("5 problems in the configuration:\n")
    assert "critic.model.path=" in message


def test_a_checkpoint_to_resume_from_must_exist(base: list[str]) -> None:
    message = refused(base, "trainer.resume_mode=resume_path", "trainer.resume_from_path=/nowhere")
    assert message.startswith("trainer.resume_from_path=/nowhere: no such directory; give a checkpoint")


class TestModelPath:
    @pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B"])
    def test_a_hub_name_is_left_alone(self, name: str) -> None:
        check_model_path(name, name)

    @pytest.mark.parametrize("path", ["/nowhere/m", "./m", "~/nowhere-m", "models/mine/last"])
    def test_a_local_path_that_does_not_exist(self, path: str) -> None:
        with pytest.raises(ValueError, match=rf"actor_rollout_ref.model.path={path}: no such directory .*hub name"):
            check_model_path(path, path)

    @pytest.mark.parametrize(
        ("missing", "complaint"),
        [
            ("config.json", "holds no config.json"),
            ("tokenizer.json", "holds no tokenizer (tokenizer.json, "),
            ("model.safetensors", "holds no weights"),
        ],
    )
    def test_a_directory_without(self, tmp_path: Path, missing: str, complaint: str) -> None:
        model = make_model(tmp_path / "m")
        (model / missing).unlink()
        with pytest.raises(ValueError) as error:
            check_model_path(str(model), str(model))
        assert f"actor_rollout_ref.model.path={model}: {complaint}" in str(error.value)

    @pytest.mark.parametrize("content", ["{", "[]", "{}"])
    def test_a_broken_config(self, tmp_path: Path, content: str) -> None:
        model = make_model(tmp_path / "m")
        (model / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config.json (is not valid JSON|names no model_type)"):
            check_model_path(str(model), str(model))

    def test_a_tokenizer_elsewhere(self, tmp_path: Path) -> None:
        model, other = make_model(tmp_path / "m"), make_model(tmp_path / "t")
        (model / "tokenizer.json").unlink()
        check_model_path(str(model), str(other))
        (other / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=rf"^actor_rollout_ref.model.tokenizer_path={other}: holds no tokenizer"):
            check_model_path(str(model), str(other))

    def test_a_file(self, tmp_path: Path) -> None:
        file = make_model(tmp_path / "m") / "config.json"
        with pytest.raises(ValueError, match="is a file; give the directory"):
            check_model_path(str(file), str(file))


class TestDataFiles:
    def test_paths_and_globs(self, tmp_path: Path) -> None:
        for name in ("b.jsonl", "a.jsonl", "c.parquet", "odd[1].json"):
            (tmp_path / name).touch()
        assert find_data_files([f"{tmp_path}/*.jsonl", f"{tmp_path}/c.parquet"], "k") == (
            tmp_path / "a.jsonl",
            tmp_path / "b.jsonl",
            tmp_path / "c.parquet",
        )
        assert find_data_files([f"{tmp_path}/odd[1].json"], "k") == (tmp_path / "odd[1].json",)
        assert find_data_files([], "k") == ()

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("none.jsonl", "no such file"),
            ("*.none", "no file matches"),
            ("", "is a directory; name the files in it"),
            ("a.csv", "unknown format .csv; give .parquet, .jsonl"),
            ("bare", "unknown format null"),
        ],
    )
    def test_refused(self, tmp_path: Path, name: str, complaint: str) -> None:
        (tmp_path / "a.csv").touch()
        (tmp_path / "bare").touch()
        with pytest.raises(ValueError) as error:
            find_data_files([f"{tmp_path}/{name}"], "data.val_files")
        assert str(error.value).startswith("data.val_files=")
        assert complaint in str(error.value)


class TestRewardFunction:
    def test_accepted(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text("def f(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n")
        check_reward_function(str(file), "f")
        check_reward_function(None, "anything")

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("mine.py", "def f(:"),
            ("mine.py", "import not_a_module_of_this_world"),
            ("mine.py", "raise SystemExit(3)"),
            ("mine.py", "def g(data_source, solution_str, ground_truth, extra_info=None): ..."),
            ("mine.py", "f = 5"),
            ("none.py", ""),
        ],
    )
    def test_refused(self, tmp_path: Path, path: str, text: str) -> None:
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(ValueError, match=r"reward\.custom_reward_function\.path="):
            check_reward_function(str(tmp_path / path), "f")

    def test_no_such_module(self) -> None:
        with pytest.raises(ValueError, match=r"reward\.custom_reward_function\.path=not\.a\.module"):
            check_reward_function("not.a.module", "f")
