"""One pipeline stage of a decoder, of Megatron's parts, on packed rows.

Embedding, layers and the cutting of each are Megatron's. Attention, norm and heads are ours: Megatron's own attention
pads (without Transformer Engine), and knows positions by the order of rows, which a shared prompt breaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from workers.batch import CHOOSE, MicroBatch
from workers.engines.attention import PackedLayout, gather_rows, packed_attention, prepare
from workers.engines.base import EngineSpec, Output
from workers.engines.fusion import fused
from workers.engines.logprobs import VocabularyPart, sum_pi_squared, token_logprobs
from workers.engines.megatron.architectures import Head, experts_of, has_experts, has_qk_norm, has_qkv_bias, head_dim
from workers.engines.megatron.experts import Mixture, expert_settings


@dataclass(frozen=True, slots=True)
class Packed:
    """What layers need to know of a micro-batch. cos, sin: [num_tokens, head_dim], of each row's own position.

    routing: [tokens of this rank, num_layers, experts per token] or None, as in MicroBatch.
    """

    layout: PackedLayout
    cos: Tensor
    sin: Tensor
    routing: Tensor | None


class RMSNorm(nn.Module):
    """Megatron's own asserts that the sequence is whole."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # sum it over ranks
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self._eps)


class PackedSelfAttention(MegatronModule):  # type: ignore[misc]
    """Causal self-attention of packed rows, some heads on each tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, layer_number: int, qk_norm: bool, **_: Any) -> None:
        super().__init__(config)
        tensor, self._head_dim = config.tensor_model_parallel_size, config.kv_channels
        self._rotate = fused(apply_rotary_pos_emb) if config.bias_activation_fusion else apply_rotary_pos_emb
        self._heads = [config.num_attention_heads // tensor, *[config.num_query_groups // tensor] * 2]
        settings = {"config": config, "init_method": config.init_method}
        size = self._head_dim * (config.num_attention_heads + 2 * config.num_query_groups)
        self.linear_qkv = ColumnParallelLinear(config.hidden_size, size, bias=config.add_qkv_bias, **settings)
        self.linear_proj = RowParallelLinear(
            self._head_dim * config.num_attention_heads,
            config.hidden_size,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            **settings,
        )
        for name in ("q_layernorm", "k_layernorm"):  # Megatron sums gradients over heads of parameters named so
            norm = RMSNorm(config, self._head_dim, config.layernorm_epsilon) if qk_norm else IdentityOp()
            self.add_module(name, norm)

    def forward(self, hidden_states: Tensor, *, packed_seq_params: Packed, **_: Any) -> tuple[Tensor, Tensor | None]:
        """[num_tokens, 1, hidden_size] in and out, and no bias to add."""
        packed = packed_seq_params
        qkv = self.linear_qkv(hidden_states)[0].squeeze(1).unflatten(-1, (-1, self._head_dim))
        query, key, value = qkv.split(self._heads, dim=1)
        query, key = self._rotate(
            self.q_layernorm(query), self.k_layernorm(key), packed.cos, packed.sin, unsqueeze_dim=1
        )
        out = packed_attention(query, key, value, packed.layout, self._head_dim**-0.5)
        return self.linear_proj(out.flatten(1).unsqueeze(1))  # type: ignore[no-any-return]


class Layer(TransformerLayer):  # type: ignore[misc]
    """Attention, and an MLP or experts, which are told what to replay. Activations are computed again in the backward
    pass if `gradient_checkpointing` says so."""

    gradient_checkpointing = False

    def forward(self, *args: Any, **options: Any) -> Any:
        """As Megatron's."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self._once(*args, **options)
        return torch.utils.checkpoint.checkpoint(
            self._once, *args, use_reentrant=False, preserve_rng_state=False, **options
        )

    def _once(self, *args: Any, packed_seq_params: Packed, **options: Any) -> Any:
        if isinstance(self.mlp, Mixture):
            routing = packed_seq_params.routing
            self.mlp.router.replayed = None if routing is None else routing[:, self.layer_number - 1]
        return super().forward(*args, packed_seq_params=packed_seq_params, **options)


class Stage(MegatronModule):  # type: ignore[misc]
    """The layers of one pipeline rank (or of one of its chunks), with embedding and head where they are its.

    Has what Megatron's schedules and gradient reduction look for: config, model_type, pre_process, post_process,
    set_input_tensor, share_embeddings_and_output_weights, shared_embedding_or_output_weight.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, hf: PreTrainedConfig, config: TransformerConfig, head: Head, chunk: int | None) -> None:
        super().__init__(config)
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk)
        self.share_embeddings_and_output_weights = head == "logprobs" and hf.tie_word_embeddings
        self.vp_stage = chunk
        self._head, self._vocabulary = head, hf.vocab_size
        table = -(-hf.vocab_size // config.tensor_model_parallel_size) * config.tensor_model_parallel_size
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(config, table, hf.max_position_embeddings, "rope")
        self.rotary = LlamaRotaryEmbedding(hf)  # type: ignore[arg-type]  # any kind of `rope_parameters`; the same in all our architectures
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(_layer_specs(hf, config, chunk), layer_norm=RMSNorm),
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=chunk,
        )
        if self.post_process and head == "values":
            self.value_head = nn.Linear(hf.hidden_size, 1, bias=False, dtype=config.params_dtype)
        elif self.post_process and not (self.pre_process and self.share_embeddings_and_output_weights):
            self.output_layer = ColumnParallelLinear(
                hf.hidden_size, table, config=config, init_method=config.init_method, bias=False
            )

    def set_input_tensor(self, tensors: list[Tensor]) -> None:
        """What the stage before sent."""
        self.decoder.set_input_tensor(tensors[0])

    def shared_embedding_or_output_weight(self) -> Tensor:
        """This stage's copy of tied embeddings, or its output layer; [rows of this rank, hidden_size]."""
        weight: Tensor = (self.embedding.word_embeddings if self.pre_process else self.output_layer).weight
        return weight

    def forward(self, micro: MicroBatch, temperature: float, entropy: bool, output: Output = "outputs") -> Any:
        """Hidden states [num_tokens, 1, hidden_size] for the next stage; of the last stage, (log-probs, values or
        `output` [R] of the micro-batch's targets, entropies [R] or None), float32."""
        cos, sin = self.rotary(self._sample(), micro.position_ids[None])
        layout = prepare(micro.segments, self.config.params_dtype)
        packed = Packed(layout, cos[0], sin[0], self._routing(micro))
        hidden = self.embedding(micro.input_ids[None], micro.position_ids[None]) if self.pre_process else None
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=packed)
        if not self.post_process:
            return hidden
        if self._head == "values":
            assert output == "outputs", output
            return self._values(hidden, micro), None
        states, weight, part = self._before_logits(hidden, micro)
        if output == "sum_pi_squared":
            return sum_pi_squared(states, weight, temperature=temperature, part=part), None
        return token_logprobs(states, weight, micro.targets, temperature=temperature, entropy=entropy, part=part)

    def _routing(self, micro: MicroBatch) -> Tensor | None:
        """Of the rows that this rank's layers work on."""
        if micro.routing is None or not self.config.sequence_parallel:
            return micro.routing
        mine: Tensor = micro.routing.chunk(self.config.tensor_model_parallel_size)[
            parallel_state.get_tensor_model_parallel_rank()
        ]
        return mine

    def _before_logits(self, hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor, VocabularyPart | None]:
        """The states that targets are predicted from, [R, hidden_size], and this rank's part of the output layer."""
        is_shared = self.pre_process and self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_shared else self.output_layer.weight
        part = None
        if self.config.tensor_model_parallel_size > 1:
            first = parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
            part = VocabularyPart(parallel_state.get_tensor_model_parallel_group(), first)
            weight = weight[: self._vocabulary - first]  # without what fills the last part up
        if self.config.sequence_parallel:
            states = gather_rows(gather_from_sequence_parallel_region(hidden).squeeze(1), micro.predictor)
        else:
            states = copy_to_tensor_model_parallel_region(gather_rows(hidden.squeeze(1), micro.predictor))
        return states, weight, part

    def _values(self, hidden: Tensor, micro: MicroBatch) -> Tensor:
        """Every tensor-parallel rank computes them all, and so has the whole gradient of what it computed from."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        values: Tensor = self.value_head(gather_rows(hidden.squeeze(1), micro.predictor))
        return values.squeeze(-1).float()

    def _sample(self) -> Tensor:
        """A tensor whose dtype and device are the activations'."""
        sample: Tensor = next(self.decoder.parameters())
        return sample


def padded(micro: MicroBatch, multiple: int) -> MicroBatch:
    """With rows that nobody looks at behind, so that sequence parallelism can cut all rows evenly."""
    missing = -len(micro.input_ids) % multiple
    if not missing:
        return micro
    segments, size = micro.segments, len(micro.input_ids)
    extra = torch.arange(missing, device=micro.input_ids.device)
    return replace(
        micro,
        input_ids=F.pad(micro.input_ids, (0, missing)),
        position_ids=torch.cat([micro.position_ids, extra]),
        segments=replace(
            segments,
            rows=torch.cat([segments.rows, extra + size]),
            lengths=(*segments.lengths, missing),
            owner=torch.cat([segments.owner, extra + len(segments.rows)]),
            borrowed=(*segments.borrowed, (0, 0)),
        ),
        routing=None if micro.routing is None else F.pad(micro.routing, (0, 0, 0, 0, 0, missing), value=CHOOSE),
    )


def transformer_config(hf: PreTrainedConfig, spec: EngineSpec, device: torch.device) -> TransformerConfig:
    """Megatron's settings. Loss and gradients are sums: the driver has divided by global counts already."""
    parallel, dtype = spec.parallel, getattr(torch, spec.sharding.dtype)
    is_interleaved, experts = parallel.virtual_pipeline is not None, experts_of(hf)
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_dim(hf),
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=has_qk_norm(hf),
        add_bias_linear=False,
        add_qkv_bias=has_qkv_bias(hf),
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # demanded with variable lengths, experts or not
        **(expert_settings(experts, parallel) if experts else {}),
        overlap_p2p_comm=is_interleaved,  # two ranks send to each other twice at once: in a batch that deadlocks
        batch_p2p_comm=not is_interleaved,
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        gradient_accumulation_fusion=False,  # Apex
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=spec.compile,
        bias_dropout_fusion=spec.compile,
    )


def _layer_specs(hf: PreTrainedConfig, config: TransformerConfig, chunk: int | None) -> list[ModuleSpec]:
    """Of the layers of one stage."""
    chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    first, count = get_transformer_layer_offset(config, chunk), config.num_layers // chunks
    dense, sparse = _layer_spec(hf, _mlp_spec()), _layer_spec(hf, Mixture)
    return [sparse if has_experts(hf, layer) else dense for layer in range(first, first + count)]


def _mlp_spec() -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )


def _layer_spec(hf: PreTrainedConfig, mlp: ModuleSpec | type) -> ModuleSpec:
    return ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=PackedSelfAttention, params={"qk_norm": has_qk_norm(hf)}),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
