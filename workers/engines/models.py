"""Hugging Face models with the two heads training needs: log-probs of response tokens, and values.

The head is part of the module's forward: a sharding engine sees one root module and gathers the output layer with it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from workers.batch import MicroBatch
from workers.engines import attention, rope
from workers.engines.attention import PackedLayout, gather_rows
from workers.engines.base import EngineSpec, Output
from workers.engines.logprobs import sum_pi_squared, token_logprobs


class LogprobModel(nn.Module):
    """A causal language model that answers with the log-probs of given tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, micro: MicroBatch, layout: PackedLayout, temperature: float, entropy: bool, output: Output = "outputs"
    ) -> tuple[Tensor, Tensor | None]:
        """Float32 log-probs [R] (and entropy [R]) of the micro-batch's targets, or what else `output` names [R]."""
        hidden = _predicting_states(self.model.base_model, micro, layout)
        weight = self.model.get_output_embeddings().weight
        if output == "sum_pi_squared":
            return sum_pi_squared(hidden, weight, temperature=temperature), None
        return token_logprobs(hidden, weight, micro.targets, temperature=temperature, entropy=entropy)


class ValueModel(nn.Module):
    """A language model's body with a scalar head: the value of the state each response token was chosen in."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.base_model
        self.value_head = nn.Linear(model.config.hidden_size, 1, bias=False, dtype=model.dtype)
        nn.init.zeros_(self.value_head.weight)

    def forward(
        self, micro: MicroBatch, layout: PackedLayout, temperature: float, entropy: bool, output: Output = "outputs"
    ) -> tuple[Tensor, None]:
        """Float32 values [R] of the states the targets were chosen in; temperature and entropy play no part."""
        assert output == "outputs", output
        values = self.value_head(_predicting_states(self.model, micro, layout)).squeeze(-1)
        return values.to(torch.float32, copy=True), None  # FSDP warns of views


def config_overrides(path: str, *, trust_remote_code: bool, override_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields to change in a checkpoint's config, told in full. Raises OSError or ValueError if there is none."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return rope.completed(config, override_config)


def hf_config(path: str, *, trust_remote_code: bool, override_config: Mapping[str, Any]) -> PreTrainedConfig:
    """A checkpoint's Hugging Face config with some fields changed. Raises OSError or ValueError if there is none."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    change_config(config, override_config)
    return config


def change_config(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> None:
    """Changes fields. Raises what the config's class raises for values it does not take."""
    for name, value in rope.completed(config, overrides).items():
        setattr(config, name, value)


def load_model(spec: EngineSpec) -> LogprobModel | ValueModel:
    """The spec's model on CPU with its weights in `master_dtype`."""
    attention.register()
    logging.disable_progress_bar()
    config = hf_config(spec.model_path, trust_remote_code=spec.trust_remote_code, override_config=spec.override_config)
    model = AutoModelForCausalLM.from_pretrained(
        spec.model_path,
        config=config,
        dtype=getattr(torch, spec.sharding.master_dtype),
        attn_implementation=attention.ATTENTION_NAME,
        trust_remote_code=spec.trust_remote_code,
    )
    if spec.gradient_checkpointing and spec.optimizer is not None:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # what is recomputed: recompute.Recompute
    wrapped = LogprobModel(model) if spec.head == "logprobs" else ValueModel(model)
    return wrapped.train(spec.optimizer is not None)


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of the model, in order: the modules of the longest ModuleList of one class."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    return max((list(x) for x in lists), key=len, default=[])


def compile_layers(module: nn.Module) -> None:
    """Compiles the body of every decoder layer; hooks (FSDP's) stay outside. Layers share what is compiled."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for layer in decoder_layers(module):
        _rotate_rows_first({type(part).__module__ for part in layer.modules()})
        layer.forward = torch.compile(layer.forward, dynamic=True)


def _rotate_rows_first(modules: Iterable[str]) -> None:
    """Lets a model's `apply_rotary_pos_emb` work on [1, tokens, heads, dim], which it can, and changes no number.

    transformers calls it with heads first. Compiled for any number of tokens, its kernel would then divide by that
    number for every element, and write what attention has to read in another order.
    """
    for module in (sys.modules[name] for name in modules):
        rotate = getattr(module, "apply_rotary_pos_emb", None)
        if rotate is None or hasattr(rotate, "rows_first"):
            continue
        parameters = list(inspect.signature(rotate).parameters)
        if parameters[:4] == ["q", "k", "cos", "sin"] and "unsqueeze_dim" in parameters:
            module.apply_rotary_pos_emb = _rows_first(rotate)  # type: ignore[attr-defined]


def _rows_first(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if others or options:
            return rotate(q, k, cos, sin, *others, **options)
        q_rotated, k_rotated = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        return q_rotated.transpose(1, 2), k_rotated.transpose(1, 2)

    apply.rows_first = True  # type: ignore[attr-defined]
    return apply


def _predicting_states(body: nn.Module, micro: MicroBatch, layout: PackedLayout) -> Tensor:
    """Hidden states that the response tokens are predicted from, [R, hidden_size]."""
    output = body(
        input_ids=micro.input_ids[None], position_ids=micro.position_ids[None], use_cache=False, segments=layout
    )
    return gather_rows(output.last_hidden_state.squeeze(0), micro.predictor)
