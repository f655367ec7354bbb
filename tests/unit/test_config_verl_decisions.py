"""What verl's keys come to where names, units, places or other keys decide: on the command line and in YAML."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from trainer.config.load import CONFIG_DIR, load_config
from trainer.config.overrides import prepare_overrides
from trainer.config.verl.report import Report
from trainer.config.verl.translate import translate_nested

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
PER_GPU = f"{ACTOR}.ppo_micro_batch_size_per_gpu"
BASE = ["data.train_files=a.jsonl", f"{MODEL}.path=org/m"]


@cache
def defaults() -> Any:
    tree = OmegaConf.load(CONFIG_DIR / "ppo_trainer.yaml")
    tree.pop("hydra")
    tree.pop("defaults")
    return tree


def read(*settings: str) -> tuple[Any, Report]:
    """The tree after the table was applied to defaults with these settings, `key=YAML value`; and what is told."""
    given = OmegaConf.from_dotlist(list(settings))
    nested = OmegaConf.to_container(OmegaConf.merge(defaults(), given))
    assert isinstance(nested, dict)
    tree = {str(key): value for key, value in nested.items()}
    report = translate_nested(tree)
    return OmegaConf.create(tree), report


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        # units
        ((f"{ACTOR}.ppo_micro_batch_size=64",), PER_GPU, 8),
        ((f"{ACTOR}.ppo_micro_batch_size=64", "trainer.nnodes=2"), PER_GPU, 4),
        ((f"{ACTOR}.ppo_micro_batch_size=4",), PER_GPU, 1),
        ((f"{ACTOR}.ppo_micro_batch_size=64", f"{PER_GPU}=3"), PER_GPU, 3),
        (
            (
                f"{ACTOR}.ppo_micro_batch_size=64",
                "model_engine=megatron",
                f"{ACTOR}.megatron.tensor_model_parallel_size=4",
            ),
            PER_GPU,
            32,
        ),
        (("critic.ppo_micro_batch_size=64", "trainer.n_devices_per_node=4"), "critic.ppo_micro_batch_size_per_gpu", 16),
        (
            (f"{ACTOR}.optim.min_lr=1e-7", f"{ACTOR}.optim.lr=1e-6", f"{ACTOR}.optim.lr_decay_style=cosine"),
            f"{ACTOR}.optim.min_lr_ratio",
            pytest.approx(0.1),
        ),
        ((f"{ACTOR}.optim.min_lr=1e-7",), f"{ACTOR}.optim.min_lr_ratio", 0.0),
        # what another key decides
        ((f"{ACTOR}.use_dynamic_bsz=true", f"{PER_GPU}=4"), PER_GPU, None),
        ((f"{ACTOR}.use_dynamic_bsz=false", f"{PER_GPU}=4"), PER_GPU, 4),
        ((f"{ACTOR}.use_dynamic_bsz=true", f"{ACTOR}.ppo_micro_batch_size=64"), PER_GPU, None),
        ((f"{ACTOR}.tau_neg=1.2",), f"{ACTOR}.policy_loss.params", {}),
        ((f"{ACTOR}.tau_neg=1.2", f"{ACTOR}.policy_loss.loss_mode=sapo"), f"{ACTOR}.policy_loss.params.tau_neg", 1.2),
        (
            (f"{ACTOR}.policy_loss.kl_cov_ratio=0.1", f"{ACTOR}.policy_loss.loss_mode=kl_cov"),
            f"{ACTOR}.policy_loss.params.kl_cov_ratio",
            0.1,
        ),
        ((f"{ACTOR}.grad_clip=0.5",), f"{ACTOR}.optim.clip_grad", 0.5),
        ((f"{ACTOR}.grad_clip=1.0", f"{ACTOR}.optim.clip_grad=0.3"), f"{ACTOR}.optim.clip_grad", 0.3),
        ((f"{ACTOR}.grad_clip=0.5", f"{ACTOR}.optim.clip_grad=0.3"), f"{ACTOR}.optim.clip_grad", 0.3),
        ((f"{ROLLOUT}.val_kwargs.temperature=1.0", f"{ROLLOUT}.val_kwargs.do_sample=true"), "TEMPERATURE", 1.0),
        ((f"{ROLLOUT}.val_kwargs.temperature=1.0", f"{ROLLOUT}.val_kwargs.do_sample=false"), "TEMPERATURE", 0.0),
        (
            ("reward_model.overlong_buffer.len=128", "reward_model.overlong_buffer.enable=true"),
            "reward.overlong_buffer.len",
            128,
        ),
        (
            ("reward_model.reward_kwargs.overlong_buffer_cfg.len=128", "reward_model.overlong_buffer.enable=false"),
            "reward.overlong_buffer.len",
            0,
        ),
        (
            ("algorithm.rollout_correction.bypass_mode=true", "algorithm.rollout_correction.loss_type=reinforce"),
            f"{ACTOR}.policy_loss.loss_mode",
            "gpg",
        ),
        (("algorithm.rollout_correction.loss_type=reinforce",), f"{ACTOR}.policy_loss.loss_mode", "ppo"),
        ((f"{ACTOR}.clip_ratio_low=10",), f"{ACTOR}.clip_ratio_low", 1.0),
        ((f"{ACTOR}.clip_ratio_low=10", f"{ACTOR}.policy_loss.loss_mode=dppo_kl"), f"{ACTOR}.clip_ratio_low", 10),
        # places
        ((f"{ACTOR}.fsdp_config.offload_policy=true",), f"{ACTOR}.fsdp_config.optimizer_offload", True),
        ((f"{ACTOR}.fsdp_config.offload_policy=false",), f"{ACTOR}.fsdp_config.optimizer_offload", "auto"),
        (
            (f"{ACTOR}.optim.override_optimizer_config.optimizer_cpu_offload=true", f"{ACTOR}.strategy=megatron"),
            f"{ACTOR}.megatron.optimizer_offload",
            True,
        ),
        (
            ("critic.megatron.override_transformer_config.recompute_granularity=full",),
            "critic.model.enable_gradient_checkpointing",
            True,
        ),
        ((f"{ROLLOUT}.full_determinism=true",), "trainer.full_determinism", True),
        ((f"{ACTOR}.use_torch_compile=false",), f"{MODEL}.use_torch_compile", False),
        ((f"{ROLLOUT}.expert_parallel_size=8",), f"{ROLLOUT}.engine_kwargs.vllm.enable_expert_parallel", True),
        ((f"{ROLLOUT}.expert_parallel_size=1",), f"{ROLLOUT}.engine_kwargs.vllm", {}),
        ((f"{ROLLOUT}.scheduling_policy=priority",), f"{ROLLOUT}.engine_kwargs.vllm.scheduling_policy", "priority"),
        ((f"{ROLLOUT}.engine_kwargs.vllm.max_model_len=4096",), f"{ROLLOUT}.max_model_len", 4096),
        (("algorithm.gdpo_reward_keys=[a,b]",), "algorithm.adv_params.weights", {"a": 1.0, "b": 1.0}),
        (("trainer.remove_previous_ckpt_in_save=true",), "trainer.max_actor_ckpt_to_keep", 1),
        ((f"{MODEL}.custom_chat_template=x.jinja",), "data.chat_template", "x.jinja"),
        # values
        (("critic.strategy=fsdp2",), "critic.strategy", "fsdp"),
        ((f"{ACTOR}.policy_loss.loss_mode=geo_mean",), f"{ACTOR}.policy_loss.loss_mode", "gmpo"),
        ((f"{ACTOR}.fsdp_config.model_dtype=bfloat16",), f"{ACTOR}.fsdp_config.model_dtype", "bf16"),
        ((f"{ACTOR}.fsdp_config.mixed_precision.param_dtype=fp32",), f"{ACTOR}.fsdp_config.dtype", "float32"),
        (("trainer.logger=[console,file]",), "trainer.logger", ["console"]),
        (("trainer.test_freq=false",), "trainer.test_freq", -1),
        (("algorithm.filter_groups.max_num_gen_batches=0",), "algorithm.filter_groups.max_num_gen_batches", 1000),
    ],
)
def test_translated(settings: tuple[str, ...], key: str, value: Any) -> None:
    tree, report = read(*settings)
    assert report.problems == []
    found = OmegaConf.select(tree, key.replace("TEMPERATURE", f"{ROLLOUT}.val_kwargs.temperature"))
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        (f"{MODEL}.lora_rank=32", "all weights are trained; train all weights"),
        ("reward_model.enable=true", "score with a function"),
        (f"{ROLLOUT}.multi_turn.enable=true", "a response is one turn"),
        (f"{ROLLOUT}.quantization=fp8", "leave it null"),
        (f"{ROLLOUT}.response_length=4096", "set data.max_response_length=4096"),
        ("data.gen_batch_size=2048", "a step generates for data.train_batch_size=1024 prompts"),
        (f"{ACTOR}.checkpoint.load_contents=[model]", "as a whole, with optimizer and extra"),
        (f"{ACTOR}.optim.optimizer=SGD", "the optimizer is AdamW"),
        (f"{ACTOR}.megatron.override_transformer_config.moe_z_loss_coeff=0.1", "would change the model or its loss"),
        (f"{ROLLOUT}.do_sample=false", "greedy responses leave nothing to explore"),
        ("trainer.v1.trainer_mode=separate_async", "set it to sync"),
        ("critic.loss_scale_factor=7", f"set {ACTOR}.loss_scale_factor=7"),
        ("ray_kwargs.ray_init.runtime_env.env_vars.A=1", "export variables before the start"),
    ],
)
def test_refused(setting: str, complaint: str) -> None:
    _, report = read(setting)
    assert len(report.problems) == 1
    key, _, value = setting.partition("=")
    assert report.problems[0].startswith(f"{key}={value.replace(',', ', ')}: ")
    assert complaint in report.problems[0]


@pytest.mark.parametrize(
    "setting",
    [
        f"{MODEL}.lora_rank=0",
        "reward_model.enable=false",
        f"{ROLLOUT}.quantization=null",
        f"{ROLLOUT}.response_length=512",
        "data.gen_batch_size=1024",
        f"{ACTOR}.optim.optimizer=AdamW",
        "trainer.v1.trainer_mode=sync",
        f"{ACTOR}.megatron.context_parallel_size=2",
        f"{ACTOR}.megatron.override_transformer_config.apply_rope_fusion=true",
        f"{ACTOR}.checkpoint.load_contents=${{.save_contents}}",
        "distillation.nnodes=0",
    ],
)
def test_harmless(setting: str) -> None:
    tree, report = read(setting)
    assert report.problems == []
    assert len(report.notices()) == 1
    assert report.notices()[0].startswith("without effect, ")
    assert tree == defaults(), "nothing is left of it, nothing else has changed"


def test_a_command_line_is_told_in_few_lines() -> None:
    flags = [f"{ACTOR}.fsdp_config.fsdp_size=8", f"+{ACTOR}.fsdp_config.forward_prefetch=True", "critic.fsdp.seed=1"]
    prepared, notices = prepare_overrides(
        [*flags, "critic.model.fsdp_config.dtype=float32", "reward_model.enable=null"]
    )
    assert prepared == ["critic.fsdp.dtype=float32"]
    assert len(notices) == 4
    assert notices[0] == "translated from verl: critic.model.fsdp_config.dtype -> critic.fsdp.dtype"
    assert notices[1].endswith(f": {ACTOR}.fsdp_config.{{fsdp_size, forward_prefetch}}")


def test_what_needs_other_keys_waits_for_them() -> None:
    prepared, notices = prepare_overrides([f"{ACTOR}.use_dynamic_bsz=True", f"{MODEL}.lora_rank=${{trainer.nnodes}}"])
    assert prepared == [f"++{ACTOR}.use_dynamic_bsz=True", f"++{MODEL}.lora_rank=${{trainer.nnodes}}"]
    assert notices == []


def test_refusals_and_mistakes_are_told_together() -> None:
    with pytest.raises(ValueError, match="3 problems in the configuration"):
        prepare_overrides([f"{MODEL}.lora_rank=8", "data.sede=1", "distillation.enabled=true"])


def test_what_is_decided_late_is_refused_with_the_other_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="2 problems in the configuration"):
        load_config([*BASE, f"{ROLLOUT}.response_length=4096", "data.seed=x"])


def test_a_section_given_as_a_dictionary_is_read() -> None:
    cfg = load_config([*BASE, "actor_rollout_ref={actor: {strategy: fsdp2, grad_clip: 1.0, ppo_epochs: 2}}"])
    assert (cfg.actor_rollout_ref.actor.strategy, cfg.actor_rollout_ref.actor.ppo_epochs) == ("fsdp", 2)


def test_a_yaml_of_verls_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dapo.yaml").write_text(
        """
hydra: {searchpath: ['file://verl/trainer/config']}
defaults: [ppo_trainer, _self_]
data: {train_files: a.parquet, gen_batch_size: '${data.train_batch_size}', train_batch_size: 64}
reward_model: {reward_manager: dapo, overlong_buffer: {enable: true, len: 16, penalty_factor: 0.5, log: false}}
actor_rollout_ref: {model: {path: org/m}, actor: {strategy: fsdp2, use_dynamic_bsz: true, ppo_micro_batch_size: null}}
algorithm: {filter_groups: {_target_: verl.Any, enable: true, metric: seq_reward, max_num_gen_batches: -1}}
"""
    )
    cfg = load_config(["reward.overlong_buffer.penalty_factor=2.0"], "dapo", config_dir=tmp_path)
    assert (cfg.reward.overlong_buffer.len, cfg.reward.overlong_buffer.penalty_factor) == (16, 2.0)
    assert cfg.algorithm.filter_groups.metric is None
    assert cfg.actor_rollout_ref.actor.strategy == "fsdp"
    assert "without effect, names a class of verl's" in capsys.readouterr().err


def test_one_key_under_two_names() -> None:
    """The last one counts, as with one name; that is told unless they agree."""
    ours, verls = "critic.fsdp.param_offload", "critic.model.fsdp_config.param_offload"
    prepared, notices = prepare_overrides([f"{verls}=True", f"{ours}=false"])
    assert prepared[-1] == f"{ours}=false"
    assert f"{verls}=True: without effect, {ours}=false sets the same key ({ours}) and comes later" in notices
    for same in ([f"{verls}=True", f"{ours}=True"], [f"{ours}=true", f"{ours}=false"]):
        assert not any("same key" in notice for notice in prepare_overrides(same)[1])
