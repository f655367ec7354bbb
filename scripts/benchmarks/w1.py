"""Subcommand w1: one GRPO step at real scale on one GPU, phase by phase.

64 prompts of 256 tokens x 8 responses of 1,024 tokens (ignore_eos), one update per step, reference model with KL loss,
bfloat16 compute, float32 master weights, AdamW; a model of Qwen2.5's shape with random weights, which takes as long as
a trained one. `--shape tiny` is the same program on a CPU.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from subcommands import Command

from . import launch
from .measure import MEMORY, WORK, phase_seconds

PEAK_FLOPS = 989e12
"""Dense bfloat16 of an H100 or H200, per second, by its data sheet."""

PROMPT_WORDS = 1000


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's shape, Qwen2 style, and the work done with it. Lengths in tokens.

    groups_per_micro_batch: responses to so many prompts are trained on together. recompute: activations, as they do
    not fit otherwise.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    prompts: int = 64
    samples: int = 8
    prompt_length: int = 256
    response_length: int = 1024
    groups_per_micro_batch: int = 4
    recompute: bool = False

    @property
    def budget(self) -> int:
        """Tokens of a micro-batch; whole groups, as a prompt is shared within one."""
        return self.groups_per_micro_batch * (self.prompt_length + self.samples * self.response_length)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens of a step."""
        return self.prompts * self.samples * (self.prompt_length + self.response_length)

    @property
    def forward_flops(self) -> float:
        """Of one forward pass over a step's batch as training needs it: a group's prompt once, logits of responses.

        2 per weight and token; causal attention 4 x hidden x (tokens looked back on), averaged over a response.
        """
        kv = self.hidden * self.kv_heads // self.heads
        weights = self.layers * (2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate)
        responses = self.prompts * self.samples * self.response_length
        prompts = self.prompts * self.prompt_length
        dense = 2.0 * weights * (responses + prompts) + 2.0 * self.hidden * self.vocabulary * responses
        looked_back = responses * (self.prompt_length + self.response_length / 2) + prompts * self.prompt_length / 2
        return dense + 4.0 * self.layers * self.hidden * looked_back


SHAPES = {
    "0.5b": Shape(896, 4864, 24, 14, 2, 151_936, True),
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151_936, True),
    "7b": Shape(3584, 18_944, 28, 28, 4, 152_064, False, groups_per_micro_batch=2, recompute=True),
    "tiny": Shape(128, 256, 2, 4, 2, 1024, True, prompts=4, samples=4, prompt_length=8, response_length=16),
}


def add_options(parser: ArgumentParser) -> None:
    """Command line of the subcommand."""
    launch.add_common_options(parser, out="w1.json")
    parser.add_argument("--shape", choices=SHAPES, default="1.5b", help="of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="training steps; the first is not counted")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--sampler-logprobs", action="store_true", help="of every response, not of one in eight")


def run(options: Namespace, console: Console) -> int:
    """Measure, write, show."""
    shape = SHAPES[options.shape]
    model = launch.ROOT / ".cache" / "benchmarks" / f"qwen2-{options.shape}"
    write_model(shape, model, console)
    finished = launch.run(console, "w1", overrides(shape, model, options), recipe="ppo_trainer")
    result = {
        "benchmark": "w1",
        "shape": options.shape,
        "command": finished.command,
        "commit": launch.commit(),
        "versions": finished.summary["versions"],
        "machine": launch.machine(),
        **measure(finished, shape),
    }
    launch.write(options.out, result)
    console.print(table(result))
    return 0


def overrides(shape: Shape, model: Path, options: Namespace) -> list[str]:
    """The configuration of the run."""
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    tiny = options.shape == "tiny"
    return [
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.model.tokenizer_path={model / 'tokenizer'}",
        f"data.train_files={model / 'prompts.jsonl'}",
        f"data.max_prompt_length={shape.prompt_length}",
        f"data.max_response_length={shape.response_length}",
        f"data.train_batch_size={shape.prompts}",
        f"{actor}.ppo_mini_batch_size={shape.prompts}",
        f"{actor}.ppo_max_token_len_per_gpu={shape.budget}",
        f"actor_rollout_ref.model.enable_gradient_checkpointing={shape.recompute}",
        f"{actor}.use_kl_loss=true",
        f"{actor}.fsdp_config.dtype={'float32' if tiny else 'bfloat16'}",
        f"{rollout}.dtype={'float32' if tiny else 'bfloat16'}",
        f"{rollout}.n={shape.samples}",
        f"{rollout}.ignore_eos=true",
        f"{rollout}.max_num_seqs={shape.prompts * shape.samples}",
        f"{rollout}.max_num_batched_tokens={max(8192, shape.prompts * shape.samples)}",
        f"{rollout}.enforce_eager={options.eager}",
        f"{rollout}.gpu_memory_utilization=0.4",
        f"{rollout}.calculate_log_probs={'true' if options.sampler_logprobs else 'monitor'}",
        *([f"{rollout}.kv_cache_gb=0.0625"] if tiny else []),
        "algorithm.adv_estimator=grpo",
        f"reward.custom_reward_function.path={Path(__file__).with_name('w1_reward.py')}",
        "trainer.n_gpus_per_node=1",
        f"trainer.total_training_steps={options.steps}",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
        "trainer.logger=[console]",
        *options.set,
    ]


def measure(finished: launch.Finished, shape: Shape) -> dict[str, Any]:
    """Seconds of each phase and step, tokens per second, MFU and memory."""
    history, summary = finished.history, finished.summary
    phases = phase_seconds(history, summary)
    steps = np.sum(list(phases.values()), axis=0)
    median = {name: float(np.median(seconds)) for name, seconds in phases.items()}
    return {
        "seconds_per_step": float(np.median(steps)),
        "phases": {name: {"median": median[name], "steps": seconds.tolist()} for name, seconds in phases.items()},
        "tokens_per_second": shape.num_tokens / float(np.median(steps)),
        "mfu_formula": "3 x forward FLOPs / update seconds / 989e12; forward: 2 per weight and token, causal "
        "attention, a group's prompt once, logits of responses only; recomputation not counted",
        "mfu_update": 3 * shape.forward_flops / median["update"] / PEAK_FLOPS,
        "mfu_reference": shape.forward_flops / median["annotate"] / PEAK_FLOPS,
        "seconds_to_first_step": summary["seconds_to_first_step"],
        "peak_memory_bytes": {kind: max(history.values(name)) for kind, name in MEMORY.items() if history.of(name)},
        "mismatch_logprob_abs_diff_mean": max(history.values("mismatch/logprob_abs_diff_mean"), default=None),
    }


def write_model(shape: Shape, directory: Path, console: Console) -> None:
    """Random weights, a tokenizer of words, and prompts of the right length; nothing if they are there."""
    if (directory / "prompts.jsonl").is_file():
        return
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    console.print(f"writing a random model to {directory.relative_to(launch.ROOT)}")
    config = Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32_768,
        rope_theta=1e6,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    _write_tokenizer(directory / "tokenizer")  # beside the model's config it would be taken for Qwen's own
    _write_prompts(shape, directory)


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(PROMPT_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(directory)


def _write_prompts(shape: Shape, directory: Path) -> None:
    import json

    random = np.random.default_rng(0)
    with (directory / "prompts.jsonl").open("w") as file:
        for _ in range(shape.prompts * 4):
            words = random.integers(0, PROMPT_WORDS, shape.prompt_length)
            file.write(json.dumps({"prompt": " ".join(f"w{w}" for w in words), "answer": ""}) + "\n")


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    title = f"W1, {result['shape']}: {result['seconds_per_step']:.2f} s per step"
    shown = Table(title=title, title_justify="left", box=None)
    for name in ("phase", "seconds"):
        shown.add_column(name, justify="left" if name == "phase" else "right")
    for name, phase in result["phases"].items():
        shown.add_row(name, f"{phase['median']:.2f}", style="" if name in WORK else "dim")
    shown.add_section()
    shown.add_row("tokens per second", f"{result['tokens_per_second']:,.0f}")
    shown.add_row("MFU, update", f"{result['mfu_update']:.1%}")
    shown.add_row("MFU, reference", f"{result['mfu_reference']:.1%}")
    shown.add_row("first step after", f"{result['seconds_to_first_step']:.0f} s")
    for kind, num_bytes in result["peak_memory_bytes"].items():
        shown.add_row(f"memory, {kind}", f"{num_bytes / 2**30:,.1f} GiB")
    return shown


COMMAND = Command("w1", "one GRPO step at real scale on one GPU, phase by phase", add_options, run)
