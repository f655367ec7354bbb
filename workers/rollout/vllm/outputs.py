"""vLLM's prompts and outputs, to and from ours. Whole arrays at a time: no Python work per token where vLLM allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from workers.protocol import FINISH_REASONS, FloatArray, IntArray, RolloutBlock, SequenceMeta
from workers.rollout.spec import MONITOR_EVERY, SamplingSpec


def sampling_parameters(spec: SamplingSpec, *, flat_logprobs: bool) -> tuple[Any, Any]:
    """SamplingParams without and with log-probs of the sampled tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    def make(**logprobs: Any) -> Any:
        return SamplingParams(
            n=spec.n,
            temperature=spec.temperature,
            top_p=spec.top_p,
            top_k=spec.top_k,
            max_tokens=spec.max_tokens,
            ignore_eos=spec.ignore_eos,
            stop_token_ids=list(spec.stop_token_ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **logprobs,
        )

    return make(), make(logprobs=0, **({"flat_logprobs": True} if flat_logprobs else {}))


def wants_logprobs(spec: SamplingSpec, group: int) -> bool:
    """Whether the sampler is asked for the log-probs of this prompt's responses."""
    return spec.logprobs == "all" or (spec.logprobs == "monitor" and group % MONITOR_EVERY == 0)


def to_block(outputs: Sequence[tuple[int, IntArray, Any]], weight_version: int) -> RolloutBlock:
    """One block of finished requests. outputs: (group, prompt ids, vLLM's RequestOutput) of each."""
    completions = [sorted(output.outputs, key=_index) for _, _, output in outputs]
    flat = [c for some in completions for c in some]
    counts = np.array([len(some) for some in completions])
    prompt_lengths = np.array([len(prompt) for _, prompt, _ in outputs], dtype=np.int32)
    lengths = np.array([len(c.token_ids) for c in flat], dtype=np.int32)
    meta = SequenceMeta(
        group=np.repeat(np.array([group for group, _, _ in outputs], dtype=np.int32), counts),
        sample=np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
        prompt_length=np.repeat(prompt_lengths, counts),
        response_length=lengths,
        loss_tokens=lengths,
        finish_reason=np.array([FINISH_REASONS.index(c.finish_reason) for c in flat], dtype=np.int32),
        weight_version=np.full(len(flat), weight_version, dtype=np.int32),
    )
    return RolloutBlock(
        meta=meta,
        prompt_ids=np.concatenate([prompt for _, prompt, _ in outputs]),
        prompt_lengths=prompt_lengths,
        prompt_of=np.repeat(np.arange(len(outputs), dtype=np.int32), counts),
        response_ids=np.concatenate([np.array(c.token_ids, dtype=np.int32) for c in flat]),
        logprobs=_logprobs(flat, lengths),
    )


def _index(completion: Any) -> int:
    index: int = completion.index
    return index


def _logprobs(completions: Sequence[Any], lengths: IntArray) -> FloatArray | None:
    if all(c.logprobs is None for c in completions):
        return None
    parts = [
        np.full(n, np.nan, dtype=np.float32) if c.logprobs is None else _of_sampled(c)
        for c, n in zip(completions, lengths, strict=True)
    ]
    flat: FloatArray = np.concatenate(parts)
    assert len(flat) == lengths.sum(), (len(flat), int(lengths.sum()))
    return flat


def _of_sampled(completion: Any) -> FloatArray:
    """With logprobs=0, one entry per position: the sampled token's. Flat where vLLM has that, else an object each."""
    if hasattr(completion.logprobs, "start_indices"):
        return np.array(completion.logprobs.logprobs, dtype=np.float32)
    pairs = zip(completion.logprobs, completion.token_ids, strict=True)
    return np.fromiter((step[token].logprob for step, token in pairs), dtype=np.float32)
