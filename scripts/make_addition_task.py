"""Make the quick-start task: two-digit addition for a tiny character-level model, spoilt on purpose.

    python scripts/make_addition_task.py                    # writes .cache/quickstart, about a minute on two cores
    python scripts/make_addition_task.py --out /tmp/add --seed 1

The model (Qwen2 architecture, 1.6 million parameters) first learns correct addition from demonstrations. Then it is
trained on demonstrations of which most are wrong, as a rule because they drop the carries, until it is right about
one time in three. Reinforcement learning with an exact-match reward then has something to uncover in sixty steps.

Both stages and the RL data draw from the same 7,100 training sums. The 1,000 held-out sums, and their mirror images
(b+a for a+b), appear in none of them; they only measure. No number measured on them steers the training.

Everything is a function of the seed (and of the floating point of the machine). A second run with the same arguments
finds the stamp in task.json and returns at once, without importing torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

VOCABULARY = 128
PAD, EOS, UNKNOWN = chr(0), chr(3), chr(26)  # ASCII's own: NUL, ETX (end of text), SUB (substitute)
LENGTH = len("12+34=") + len("123") + len(EOS)  # tokens of the longest sum with its answer
DATA_SOURCE = "addition"

Sum = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the task; the stamp covers it, so that a change makes the task anew."""

    seed: int = 0
    num_heldout: int = 1000
    batch_size: int = 128
    learn_lr: float = 2.0e-3
    learn_steps: int = 450
    learn_decay_steps: int = 50  # steps at the end of stage 1 over which the learning rate falls
    spoil_lr: float = 3.0e-4
    spoil_steps: int = 100
    warmup_steps: int = 20
    right_share: float = 0.16  # share of right demonstrations in stage 2
    dropped_share: float = 0.72  # share of demonstrations that drop the carries; the rest has one wrong digit
    num_threads: int = 2


# --- sums and demonstrations ------------------------------------------------------------------------------------------


def split_sums(*, seed: int, num_heldout: int) -> tuple[list[Sum], list[Sum]]:
    """All 8,100 two-digit sums as (training, held out); a+b and b+a always fall on the same side."""
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    random.Random(seed).shuffle(pairs)
    train: list[Sum] = []
    heldout: list[Sum] = []
    for a, b in pairs:
        orders = [(a, b)] if a == b else [(a, b), (b, a)]
        (heldout if len(heldout) + len(orders) <= num_heldout else train).extend(orders)
    return train, heldout


def right_answer(a: int, b: int) -> str:
    """The sum, in decimal."""
    return str(a + b)


def drop_carries(a: int, b: int) -> str:
    """Each column added on its own, its carry forgotten: 57 + 68 = 15."""
    return f"{(a // 10 + b // 10) % 10}{(a + b) % 10}"


def spoil_digit(a: int, b: int, rng: random.Random) -> str:
    """The right answer with one digit replaced by another one."""
    digits = list(right_answer(a, b))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([digit for digit in "0123456789" if digit != digits[place]])
    return "".join(digits)


def mixed_answer(a: int, b: int, rng: random.Random, recipe: Recipe) -> str:
    """A demonstration of stage 2: right, without the carries, or with one wrong digit."""
    draw = rng.random()
    if draw < recipe.right_share:
        return right_answer(a, b)
    return drop_carries(a, b) if draw < recipe.right_share + recipe.dropped_share else spoil_digit(a, b, rng)


def prompt_text(a: int, b: int) -> str:
    """What the model sees: `12+34=`."""
    return f"{a}+{b}="


# --- tokenizer, model, data files -------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character, token id = code point; decoding gives back exactly the characters encoded.

    No special token is added to a prompt. The chat template passes the messages through verbatim.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(code): code for code in range(VOCABULARY)}
    backend: Tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def build_model() -> Qwen2ForCausalLM:
    """The untrained model, float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ord(EOS),
        pad_token_id=ord(PAD),
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def data_row(index: int, sum_: Sum, *, split: str, chat: bool = False) -> dict[str, Any]:
    """One row in verl's column layout; `chat` gives the prompt as a list of messages."""
    prompt = prompt_text(*sum_)
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": prompt}] if chat else prompt,
        "reward_model": {"style": "rule", "ground_truth": right_answer(*sum_)},
        "extra_info": {"index": index, "split": split},
    }


def write_data(out: Path, train: Sequence[Sum], heldout: Sequence[Sum]) -> None:
    """Write train.parquet, heldout.parquet, train_chat.parquet (messages as prompts) and train.jsonl."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def parquet(name: str, sums: Sequence[Sum], split: str, chat: bool) -> None:
        rows = [data_row(index, sum_, split=split, chat=chat) for index, sum_ in enumerate(sums)]
        pq.write_table(pa.Table.from_pylist(rows), out / name)

    parquet("train.parquet", train, "train", False)
    parquet("heldout.parquet", heldout, "heldout", False)
    parquet("train_chat.parquet", train, "train", True)
    lines = [json.dumps({"prompt": prompt_text(*sum_), "answer": right_answer(*sum_)}) for sum_ in train]
    (out / "train.jsonl").write_text("\n".join(lines) + "\n")


# --- supervised training ----------------------------------------------------------------------------------------------


def encode(prompts: Sequence[str], answers: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token targets, both [num_sequences, LENGTH - 1]; -100 where there is nothing to learn.

    Shorter answers are padded on the right, which causal attention never looks at.
    """
    import torch

    texts = [(prompt + answer + EOS).ljust(LENGTH, PAD) for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = torch.tensor([list(text.encode()) for text in texts])
    targets = tokens.masked_fill(tokens == ord(PAD), -100)
    targets[:, : len(prompts[0])] = -100
    return tokens[:, :-1], targets[:, 1:]


def train_stage(
    model: Qwen2ForCausalLM,
    sums: Sequence[Sum],
    demonstrate: Callable[[int, int], str],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    num_steps: int,
    decay_steps: int,
    recipe: Recipe,
) -> float:
    """Supervised training, each step on fresh demonstrations for other sums; returns the running loss at the end.

    The learning rate rises over recipe.warmup_steps, stays, and falls linearly to zero over the last decay_steps.
    """
    import torch

    rng = random.Random(recipe.seed + num_steps)
    factor = lr_factor(num_steps, warmup_steps=recipe.warmup_steps, decay_steps=decay_steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    running = float("nan")
    for step in range(num_steps):
        batch = rng.sample(sums, recipe.batch_size)
        inputs, targets = encode([prompt_text(*s) for s in batch], [demonstrate(*s) for s in batch])
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        running = loss.item() if step == 0 else 0.9 * running + 0.1 * loss.item()
    return running


def lr_factor(num_steps: int, *, warmup_steps: int, decay_steps: int) -> Callable[[int], float]:
    """Share of the peak learning rate at a step counted from 0."""
    return lambda step: min(1.0, (step + 1) / warmup_steps, (num_steps - step) / decay_steps)


def learn(model: Qwen2ForCausalLM, sums: Sequence[Sum], recipe: Recipe) -> float:
    """Stage 1: correct addition.

    Muon (https://kellerjordan.github.io/posts/muon/) for the matrices: it finds out about carries in 150 steps, where
    AdamW sits on a plateau for 250 to 500. The learning rate stays high nearly to the end: a model that reached the
    same loss with a rate that fell from the start was thrown about by RL's updates and needed twice the steps.
    """
    import torch

    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=recipe.learn_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=recipe.learn_lr, weight_decay=0.1, betas=(0.9, 0.95))
    return train_stage(
        model,
        sums,
        right_answer,
        [muon, adamw],
        num_steps=recipe.learn_steps,
        decay_steps=recipe.learn_decay_steps,
        recipe=recipe,
    )


def spoil(model: Qwen2ForCausalLM, sums: Sequence[Sum], recipe: Recipe) -> float:
    """Stage 2: demonstrations of which most are wrong. Gentler, so that what was learned stays underneath."""
    import torch

    rng = random.Random(recipe.seed)
    adamw = torch.optim.AdamW(model.parameters(), lr=recipe.spoil_lr, weight_decay=0.0)
    return train_stage(
        model,
        sums,
        lambda a, b: mixed_answer(a, b, rng, recipe),
        [adamw],
        num_steps=recipe.spoil_steps,
        decay_steps=recipe.spoil_steps,
        recipe=recipe,
    )


# --- measuring --------------------------------------------------------------------------------------------------------


def generate(
    model: Qwen2ForCausalLM, prompts: Sequence[str], *, temperature: float, seed: int = 0, max_new_tokens: int = 8
) -> list[str]:
    """Responses to prompts of one length, up to the end-of-text character; temperature 0 is greedy.

    No KV cache: the sequences are ten tokens long.
    """
    import torch

    random_source = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode()) for prompt in prompts])
    start = tokens.shape[1]
    with torch.no_grad():
        for _ in range(max_new_tokens):
            logits = model(input_ids=tokens, use_cache=False).logits[:, -1]
            if temperature > 0.0:
                chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=random_source)
            else:
                chosen = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], dim=1)
            if bool((tokens[:, start:] == ord(EOS)).any(1).all()):
                break
    return [bytes(row).decode().split(EOS)[0] for row in tokens[:, start:].tolist()]


def accuracy(model: Qwen2ForCausalLM, sums: Sequence[Sum], *, temperature: float) -> float:
    """Share of exactly right answers."""
    responses = generate(model, [prompt_text(*sum_) for sum_ in sums], temperature=temperature)
    return sum(response == right_answer(*sum_) for response, sum_ in zip(responses, sums, strict=True)) / len(sums)


# --- the whole task ---------------------------------------------------------------------------------------------------


def stamp_of(recipe: Recipe) -> str:
    """Hash of this script and the recipe."""
    text = Path(__file__).read_text() + json.dumps(asdict(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def cached_task(out: Path, stamp: str) -> dict[str, Any] | None:
    """What task.json of an earlier run with the same stamp says, or None."""
    try:
        task: dict[str, Any] = json.loads((out / "task.json").read_text())
    except (OSError, ValueError):
        return None
    return task if task.get("stamp") == stamp else None


def say(text: str, since: float) -> None:
    """Print a progress line with the seconds since the start."""
    print(f"[{time.monotonic() - since:5.1f} s] {text}", flush=True)


def train_model(
    recipe: Recipe, train: Sequence[Sum], heldout: Sequence[Sum]
) -> tuple[Qwen2ForCausalLM, dict[str, Any]]:
    """Both supervised stages; returns the model and what was measured on the held-out sums after each."""
    import torch

    start = time.monotonic()
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.num_threads)
    model = build_model()
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} training sums", start)
    measured: dict[str, Any] = {}
    for name, stage in (("learned", learn), ("spoilt", spoil)):
        loss = stage(model, train, recipe)
        greedy, sampled = (accuracy(model, heldout, temperature=t) for t in (0.0, 1.0))
        measured[name] = {"loss": round(loss, 4), "greedy_accuracy": greedy, "accuracy": sampled}
        say(f"{name}: loss {loss:.3f}; held out: sampled {sampled:.1%}, greedy {greedy:.1%}", start)
    measured["seconds"] = round(time.monotonic() - start, 1)
    return model, measured


def make_task(out: Path, recipe: Recipe) -> dict[str, Any]:
    """Write tokenizer, model and data; returns what task.json holds.

    The task is made beside `out` and moved there when it is complete.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    train, heldout = split_sums(seed=recipe.seed, num_heldout=recipe.num_heldout)
    draft = out.with_name(f"{out.name}.{os.getpid()}.partial")
    draft.mkdir(parents=True)
    try:
        write_data(draft, train, heldout)
        model, measured = train_model(recipe, train, heldout)
        model.save_pretrained(draft / "model")
        build_tokenizer().save_pretrained(draft / "model")
        task = {"stamp": stamp_of(recipe), "recipe": asdict(recipe), "num_train": len(train), **measured}
        (draft / "task.json").write_text(json.dumps(task, indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return task


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(".cache/quickstart"), help="directory of the task")
    parser.add_argument("--seed", type=int, default=0, help="of split, model and demonstrations")
    options = parser.parse_args(arguments)
    recipe = Recipe(seed=options.seed)
    task = cached_task(options.out, stamp_of(recipe))
    if task is None:
        task = make_task(options.out, recipe)
        print(f"task written to {options.out}")
    else:
        print(f"task found in {options.out} (remove the directory to make it anew)")
    print(
        f"before RL, on {recipe.num_heldout:,} held-out sums: sampled {task['spoilt']['accuracy']:.1%}, "
        f"greedy {task['spoilt']['greedy_accuracy']:.1%}"
    )


if __name__ == "__main__":
    main()
