"""The work of w1: the models' shapes, what a step computes, and the configuration of a run of it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

PEAK_FLOPS = 989e12
"""Dense bfloat16 of an H100 or H200, per second, by its data sheet."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's shape, Qwen2 style, and the work done with it. Lengths in tokens.

    groups_per_micro_batch: responses to so many prompts are trained on together. rollout_memory: the replica's share
    of the GPU, for its weights and all responses at once.
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
    rollout_memory: float = 0.4

    @property
    def budget(self) -> int:
        """Tokens of a micro-batch; whole groups, as a prompt is shared within one."""
        return self.groups_per_micro_batch * (self.prompt_length + self.samples * self.response_length)

    @property
    def num_responses(self) -> int:
        """Of a step."""
        return self.prompts * self.samples

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens of a step."""
        return self.num_responses * (self.prompt_length + self.response_length)

    @property
    def forward_flops(self) -> float:
        """Of one forward pass over a step's batch as training needs it: a group's prompt once, logits of responses.

        2 per weight and token; causal attention 4 x hidden x (tokens looked back on), averaged over a response.
        """
        kv = self.hidden * self.kv_heads // self.heads
        weights = self.layers * (2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate)
        responses = self.num_responses * self.response_length
        prompts = self.prompts * self.prompt_length
        dense = 2.0 * weights * (responses + prompts) + 2.0 * self.hidden * self.vocabulary * responses
        looked_back = responses * (self.prompt_length + self.response_length / 2) + prompts * self.prompt_length / 2
        return dense + 4.0 * self.layers * self.hidden * looked_back

    @property
    def update_flops(self) -> float:
        """Of the update's forward and backward passes; activations computed again are not work."""
        return 3 * self.forward_flops


SHAPES = {
    "0.5b": Shape(896, 4864, 24, 14, 2, 151_936, True),
    "1.5b": Shape(1536, 8960, 28, 12, 2, 151_936, True),
    "7b": Shape(
        *(3584, 18_944, 28, 28, 4, 152_064, False),
        prompts=32,
        response_length=512,
        groups_per_micro_batch=2,
        rollout_memory=0.25,  # weights 15.2 GB, and 11.3 GB for 256 sequences of 768 tokens, of 141
    ),
    "tiny": Shape(128, 256, 2, 4, 2, 1024, True, prompts=4, samples=4, prompt_length=8, response_length=16),
}


def overrides(shape: Shape, model: Path, options: Namespace) -> list[str]:
    """The configuration, of the recipe ppo_trainer. model: the directory that `w1_model` writes."""
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
        f"{actor}.use_kl_loss=true",
        f"{actor}.fsdp_config.dtype={'float32' if tiny else 'bfloat16'}",
        f"{rollout}.dtype={'float32' if tiny else 'bfloat16'}",
        f"{rollout}.n={shape.samples}",
        f"{rollout}.ignore_eos=true",
        f"{rollout}.max_num_seqs={shape.num_responses}",
        f"{rollout}.max_num_batched_tokens={max(8192, shape.num_responses)}",
        f"{rollout}.enforce_eager={options.eager}",
        f"{rollout}.gpu_memory_utilization={shape.rollout_memory}",
        f"{rollout}.calculate_log_probs={'true' if options.sampler_logprobs else 'monitor'}",
        *([f"{rollout}.kv_cache_gb=0.0625"] if tiny else []),
        "algorithm.adv_estimator=grpo",
        f"reward.custom_reward_function.path={Path(__file__).with_name('w1_reward.py')}",
        "trainer.n_gpus_per_node=1",
        f"trainer.total_training_steps={options.steps}",
        "trainer.save_freq=0",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
        "trainer.logger=[console]",
        *options.set,
    ]
