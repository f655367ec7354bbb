"""The tensors of a model, from its Hugging Face config alone: how many numbers, in which layer, cut along what.

Architectures that Megatron knows have tables of their tensors (`workers.engines.megatron.architectures`); any other is
built without memory, on torch's meta device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from workers.engines.megatron.architectures import ARCHITECTURES, Experts, Head, experts_of, head_dim, items

Place = Literal["input", "layer", "output"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter. place: before the layers (embedding), in one, or after them; layer: its number, -1 outside.

    is_cut: tensor parallelism divides it; is_expert: expert parallelism does. is_copy: tied to the embedding.
    """

    numel: int
    place: Place
    layer: int
    is_cut: bool = False
    is_expert: bool = False
    is_copy: bool = False


@dataclass(frozen=True)
class Layout:
    """Sizes of a model's tensors, in numbers. query, kv: widths of the projections to q, and to k or v.

    intermediate: of the MLP, or of one expert; num_layers: of the decoder. has_logits: an output layer follows.
    """

    tensors: tuple[Tensor, ...]
    hidden: int
    query: int
    kv: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    num_layers: int
    experts: Experts | None
    normalises_qk: bool
    has_logits: bool

    @cached_property
    def total(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(tensor.numel for tensor in self.tensors if not tensor.is_copy)

    @cached_property
    def in_layers(self) -> int:
        """Of them, in the decoder's layers."""
        return sum(tensor.numel for tensor in self.tensors if tensor.place == "layer")

    @cached_property
    def outside_layers(self) -> int:
        """Of them, outside: embedding, output layer, last norm."""
        return self.total - self.in_layers

    @cached_property
    def largest_layer(self) -> int:
        """Parameters of the largest layer."""
        sizes = [0] * self.num_layers
        for tensor in self.tensors:
            if tensor.place == "layer":
                sizes[tensor.layer] += tensor.numel
        return max(sizes, default=0)

    @property
    def output(self) -> int:
        """Of the output layer; 0 without logits."""
        return self.vocab * self.hidden if self.has_logits else 0

    def held(self, *, tensor: int = 1, pipeline: int = 1, expert: int = 1, stage: int = 0) -> list[int]:
        """Numbers of each tensor that one rank of a model cut by Megatron holds. stage: of the pipeline.

        A tied output layer is a tensor of its own where it is on another stage than the embedding.
        """
        return [
            math.ceil(each.numel / (tensor if each.is_cut else 1) / (expert if each.is_expert else 1))
            for each in self.tensors
            if stage == self._stage(each, pipeline) and not (each.is_copy and pipeline == 1)
        ]

    def _stage(self, each: Tensor, pipeline: int) -> int:
        if each.place == "layer":
            chunk = -(-self.num_layers // pipeline)
            return each.layer // chunk
        return 0 if each.place == "input" else pipeline - 1


def layout_of(hf: Any, head: Head) -> Layout:
    """The layout of a language model ("logprobs") or of its body with a scalar head ("values")."""
    text = hf.get_text_config()
    known = text.model_type in ARCHITECTURES
    experts = experts_of(text) if known else None
    tensors = tuple(_from_table(text, head) if known else _from_meta(text, head))
    dim = head_dim(text)
    return Layout(
        tensors=tensors,
        hidden=text.hidden_size,
        query=dim * text.num_attention_heads,
        kv=dim * text.num_key_value_heads,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        intermediate=experts.intermediate if experts else text.intermediate_size,
        vocab=text.vocab_size,
        num_layers=text.num_hidden_layers,
        experts=experts,
        normalises_qk=text.model_type.startswith("qwen3"),
        has_logits=head == "logprobs",
    )


def _from_table(hf: Any, head: Head) -> Iterator[Tensor]:
    for item in items(hf, head):
        found = re.match(r"decoder\.layers\.(\d+)\.", item.parameter)
        if found:
            place: Place = "layer"
        else:
            place = "input" if item.parameter.startswith("embedding") else "output"
        yield Tensor(
            math.prod(item.shape),
            place,
            int(found.group(1)) if found else -1,
            is_cut=item.cut is not None,
            is_expert=item.is_expert,
            is_copy=item.is_copy,
        )


def _from_meta(hf: Any, head: Head) -> Iterator[Tensor]:
    """Of an architecture that only FSDP trains: it is not cut."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    parameters = model.named_parameters() if head == "logprobs" else model.base_model.named_parameters()
    for name, parameter in parameters:
        found = re.search(r"\.?layers\.(\d+)\.", name)
        place: Place = "layer" if found else "input" if "embed" in name else "output"
        yield Tensor(parameter.numel(), place, int(found.group(1)) if found else -1)
    if head == "values":
        yield Tensor(hf.hidden_size, "output", -1)
