"""What w1 reads: a model of a shape with random weights, which takes as long as a trained one, and its prompts.

All of it is written once, to a directory of the cache; the weights only where somebody reads them.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.console import Console

from .w1_work import Shape

FIRST_WORD, NUM_WORDS = 2, 1000
"""Token ids of the prompts' words; before them come the end of sequence and the unknown word."""


def write_inputs(shape: Shape, directory: Path) -> None:
    """The model's config, a tokenizer of words, and prompts of the right length; nothing if they are there."""
    prompts = directory / "prompts.jsonl"  # the last one written
    if prompts.is_file():
        return
    from transformers import Qwen2Config

    config = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
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
    config.save_pretrained(directory)
    _write_tokenizer(directory / "tokenizer")  # beside the model's config it would be taken for Qwen's own
    texts = [" ".join(f"w{token - FIRST_WORD}" for token in row) for row in random_prompts(shape, 4 * shape.prompts, 0)]
    prompts.write_text("".join(json.dumps({"prompt": text, "answer": ""}) + "\n" for text in texts))


def write_weights(directory: Path, console: Console) -> None:
    """Random weights for the config that lies there; nothing if they are there."""
    done = directory / "weights.done"
    if done.is_file():
        return
    console.print(f"writing random weights to {directory}")
    # in a process of its own: the memory that it takes of a GPU would stay with this one
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(save_random_weights, directory).result()
    done.touch()


def save_random_weights(directory: Path) -> None:
    """In bfloat16 and in shards; made on the GPU where there is one, and written by threads, as one takes long."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}  # tied ones once
    shards = split_torch_state_dict_into_shards(weights, max_shard_size="2GB")

    def save(file: str) -> None:
        tensors = {name: weights[name] for name in shards.filename_to_tensors[file]}
        save_file(tensors, directory / file, metadata={"format": "pt"})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(save, shards.filename_to_tensors))
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def random_prompts(shape: Shape, count: int, seed: int) -> np.ndarray:
    """Token ids, [count, prompt_length]."""
    generator = np.random.default_rng(seed)
    return generator.integers(FIRST_WORD, FIRST_WORD + NUM_WORDS, (count, shape.prompt_length), dtype=np.int32)


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0, "<unk>": 1} | {f"w{number}": FIRST_WORD + number for number in range(NUM_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(directory)
