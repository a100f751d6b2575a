"""The fast way through a Llama-shaped model: few operations, one read of the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from xlora_core.errors import ModelError
from xlora_core.layers import XLoraLinear
from xlora_core.model import XLoraModel
from xlora_core.rows.attention import AttentionPlan
from xlora_core.rows.batch import RowBatch
from xlora_core.rows.cache import BlockShape, RowCache
from xlora_core.rows.projection import FusedProjection, RankWeights, plain_layer
from xlora_core.rows.reader import RowReader
from xlora_core.rows.skinny import linear_rows

# The step below is these classes' own; a subclass may compute something else.
_FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
# Kinds of rotary embedding whose frequencies follow the length of the text.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


class LlamaRows(RowReader):
    """Reads rows of a Llama, Mistral, Qwen2 or Qwen3 model block by block.

    Four products a block: ``[Wq; Wk; Wv; A]``, ``[Wo; A]``, ``[Wgate; Wup; A]``, ``[Wdown; A]``.
    The model's weights become views of the fused matrices, with the same numbers: its own passes
    go on working, also beside this. Moving or casting the model afterwards parts the two.

    Args:
        model: A model that ``fits``.

    Raises:
        ModelError: If the model does not fit.
    """

    def __init__(self, model: XLoraModel) -> None:
        if not self.fits(model):
            raise ModelError(
                f"{type(model.base_model).__name__} cannot be read by LlamaRows",
                hint="open_rows chooses a reader that fits the model",
            )
        backbone = model.base_model.model
        self._embedding: nn.Embedding = backbone.embed_tokens
        self._head: nn.Linear = model.base_model.lm_head
        self._norm = backbone.norm
        # A copy: embeddings that follow the length of the text keep it on the module.
        self._rotary = copy.deepcopy(backbone.rotary_emb)
        self._blocks = [_Block(layer) for layer in _blocks(model)]
        dtype = self._embedding.weight.dtype
        projections = [p for block in self._blocks for p in block.projections]
        self._rank_weights = RankWeights(projections, dtype)
        shapes = [block.cache_shape for block in self._blocks]
        self.cache = RowCache(shapes, dtype=dtype, device=model.device)

    @classmethod
    def fits(cls, model: XLoraModel) -> bool:
        """Whether the model's blocks compute what this reader does."""
        base = model.base_model
        if type(base) not in _FAMILIES or model.is_routed_per_layer or not _sees_everything(base):
            return False
        linears = [linear for block in _blocks(model) for linear in _linears(block)]
        ends = (base.model.embed_tokens, base.lm_head)
        if any(type(end) not in (nn.Embedding, nn.Linear) for end in ends):
            return False
        if not all(_is_plain(linear) for linear in linears):
            return False
        adapted = [linear for linear in linears if isinstance(linear, XLoraLinear)]
        # A merged model has none, an adapted layer elsewhere would be left out.
        if not adapted or len(adapted) != len(model.lora_layer_names):
            return False
        tensors = [*base.parameters(), *base.buffers()]
        places = {(p.device, p.dtype) for p in base.parameters()}
        offloaded = any(hasattr(module, "_hf_hook") for module in base.modules())
        one_place = len(places) == 1 and not any(t.is_meta for t in tensors) and not offloaded
        return one_place and next(iter(places))[1] in _DTYPES

    @torch.no_grad()
    def read(self, batch: RowBatch) -> Tensor:
        """Reads the tokens of a batch; see ``RowReader.read``."""
        plan = AttentionPlan(batch, self.cache)
        hidden = F.embedding(batch.token_ids, self._embedding.weight)
        cos, sin = self._rotation(hidden, plan.positions, batch.segments)
        weights = iter(self._weights(batch))
        for index, block in enumerate(self._blocks):
            q, k, v = block.queries_keys_values(hidden, cos, sin, next(weights))
            found = plan.attend(index, q, k, v, block.attention_scale)
            hidden = hidden + block.output(found, next(weights))
            hidden = hidden + block.mlp(hidden, next(weights), next(weights))
        normed: Tensor = self._norm(hidden)
        return normed

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits ``[n, V]`` of hidden states ``[n, H]``."""
        return linear_rows(hidden, self._head.weight, self._head.bias)

    def _weights(self, batch: RowBatch) -> Iterator[Tensor | None]:
        if batch.scalings is None:
            return iter([None] * (4 * len(self._blocks)))
        return iter(self._rank_weights.of(batch.scalings))

    def _rotation(self, hidden: Tensor, positions: Tensor, segments: Any) -> tuple[Tensor, Tensor]:
        """Returns cosines and signed sines ``[N, 1, D]`` of the tokens' positions."""
        if self._rotary.rope_type in _ROPE_BY_LENGTH:
            found = [
                self._rotation_alone(hidden, of_segment)
                for of_segment in positions.split([s.n for s in segments])
            ]
            cos, sin = (torch.cat(parts) for parts in zip(*found, strict=True))
        else:
            cos, sin = (part[0] for part in self._rotary(hidden, positions.unsqueeze(0)))
        # rotate_half's minus sign, once per step instead of once per block.
        low, high = sin.chunk(2, dim=-1)
        return cos.unsqueeze(1), torch.cat([-low, high], dim=-1).unsqueeze(1)

    def _rotation_alone(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines ``[n, D]`` as of a text that is read alone."""
        rotary = self._rotary
        rotary.inv_freq = rotary.original_inv_freq
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        cos, sin = rotary(hidden, positions.unsqueeze(0))
        return cos[0], sin[0]


class _Block:
    """One block of the model, its layers fused.

    Args:
        layer: The model's decoder layer.
    """

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v, o = (getattr(attention, name) for name in _ATTENTION_LINEARS)
        gate, up, down = (getattr(mlp, name) for name in _MLP_LINEARS)
        self._attention_norm, self._mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._q_norm = getattr(attention, "q_norm", None)
        self._k_norm = getattr(attention, "k_norm", None)
        self._act = mlp.act_fn
        self.attention_scale = float(attention.scaling)
        self._head_size = int(attention.head_dim)
        self._n_heads = plain_layer(q).out_features // self._head_size
        self._kv_heads = plain_layer(k).out_features // self._head_size
        self._n_hidden = plain_layer(gate).out_features
        self._qkv = FusedProjection([q, k, v])
        self._o = FusedProjection([o])
        self._gate_up = FusedProjection([gate, up])
        self._down = FusedProjection([down])
        self.projections = (self._qkv, self._o, self._gate_up, self._down)

    @property
    def cache_shape(self) -> BlockShape:
        """What the block caches per token."""
        size = self._head_size
        return BlockShape(n_heads=self._kv_heads, key_size=size, value_size=size)

    def queries_keys_values(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries ``[N, heads, D]``, rotated keys and values ``[N, kv_heads, D]``.

        Args:
            hidden: ``[N, H]``.
            cos: ``[N, 1, D]``.
            sin: ``[N, 1, D]``, the first half negated.
            weights: ``[M, R]``.
        """
        projected = self._qkv(self._attention_norm(hidden), weights)
        heads = projected.unflatten(1, (-1, self._head_size))
        turning, values = heads.split([self._n_heads + self._kv_heads, self._kv_heads], dim=1)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = turning.split([self._n_heads, self._kv_heads], dim=1)
            turning = torch.cat([self._q_norm(q), self._k_norm(k)], dim=1)
        swapped = turning.roll(self._head_size // 2, dims=-1)
        turned = torch.addcmul(turning * cos, swapped, sin)
        queries, keys = turned.split([self._n_heads, self._kv_heads], dim=1)
        return queries, keys, values

    def output(self, found: Tensor, weights: Tensor | None) -> Tensor:
        """Returns what attention adds to the hidden states, ``[N, H]``."""
        return self._o(found, weights)

    def mlp(self, hidden: Tensor, up: Tensor | None, down: Tensor | None) -> Tensor:
        """Returns what the MLP adds to the hidden states, ``[N, H]``.

        Args:
            hidden: ``[N, H]``.
            up: ``[M, R]``, rank weights of gate and up.
            down: ``[M, R]``, rank weights of down.
        """
        both = self._gate_up(self._mlp_norm(hidden), up)
        gate, linear = both.split(self._n_hidden, dim=1)
        return self._down(self._act(gate) * linear, down)


def _blocks(model: XLoraModel) -> list[Any]:
    backbone = model.base_model.model
    return list(backbone.layers[: backbone.config.num_hidden_layers])


def _linears(block: Any) -> list[Any]:
    return [getattr(block.self_attn, name) for name in _ATTENTION_LINEARS] + [
        getattr(block.mlp, name) for name in _MLP_LINEARS
    ]


def _is_plain(linear: Any) -> bool:
    """Whether a layer is a linear one, or experts without bias over one."""
    if type(linear) is XLoraLinear:
        alike = linear.lora_A.dtype == linear.weight.dtype
        return type(linear.base_layer) is nn.Linear and linear.lora_bias is None and alike
    return type(linear) is nn.Linear


def _sees_everything(base: Any) -> bool:
    """Whether no block has a sliding window shorter than the longest text."""
    config = base.config
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None) or ()
    if isinstance(base, MistralForCausalLM):
        return window is None or window >= config.max_position_embeddings
    return all(kind == "full_attention" for kind in layer_types)
