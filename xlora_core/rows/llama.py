"""The fast way through a Llama-shaped model: few operations, one read of the weights."""

from __future__ import annotations

from collections.abc import Sequence
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
from xlora_core.rows.graphs import (
    Record,
    RecordedSteps,
    RectanglePlan,
    compiling_recorder,
    cuda_recorder,
)
from xlora_core.rows.norm import rms_norm
from xlora_core.rows.packed import Product, packs
from xlora_core.rows.projection import FusedProjection, RankWeights, plain_layer
from xlora_core.rows.reader import RowReader

# The step below is these classes' own; a subclass may compute something else.
_FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
_DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
# Rotary embeddings whose frequencies depend on how long a text is, or the longest beside it.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


class LlamaRows(RowReader):
    """Reads rows of a Llama, Mistral, Qwen2 or Qwen3 model block by block.

    Four products a block: ``[Wq; Wk; Wv; A]``, ``[Wo; A]``, ``[Wgate; Wup; A]``, ``[Wdown; A]``.
    The model's weights become views of the fused matrices, with the same numbers: its own passes
    go on working, also beside this. Moving or casting the model afterwards parts the two. Packed
    matrices are copies beside them, until ``close``: what changes the weights later is not read.

    Args:
        model: A model that ``fits``.
        triton: Whether Triton adds the experts' mixture on a CUDA device, in one kernel for all
            layers of a projection instead of one product each.
        compiled: Whether steps over single tokens are compiled, see ``compiling_recorder`` for
            what that costs; on a CUDA device they are graphs otherwise.
        packed: Whether matrices, the head's too, may be packed where that is faster, see
            ``Product``; they take as much memory again.

    Raises:
        ModelError: If the model does not fit.
    """

    def __init__(
        self,
        model: XLoraModel,
        *,
        triton: bool = False,
        compiled: bool = False,
        packed: bool = False,
    ) -> None:
        if not self.fits(model):
            raise ModelError(
                f"{type(model.base_model).__name__} cannot be read by LlamaRows",
                hint="open_rows chooses a reader that fits the model",
            )
        backbone = model.base_model.model
        self._embedding: nn.Embedding = backbone.embed_tokens
        head: nn.Linear = model.base_model.lm_head
        self._norm = rms_norm(backbone.norm)
        self._rotary = backbone.rotary_emb
        dtype = self._embedding.weight.dtype
        triton = triton and model.device.type == "cuda"
        # A compiler packs for itself.
        packed = packed and not compiled and model.device.type == "cpu" and packs(dtype)
        self._blocks = [_Block(layer, triton=triton, packed=packed) for layer in _blocks(model)]
        self._head = Product(head.weight, head.bias, packed=packed)
        projections = [p for block in self._blocks for p in block.projections]
        self._rank_weights = RankWeights(projections, dtype)
        shapes = [block.cache_shape for block in self._blocks]
        self.cache = RowCache(shapes, dtype=dtype, device=model.device)
        record: Record | None = None
        if compiled:
            record = compiling_recorder()
        elif model.device.type == "cuda":
            record = cuda_recorder(model.device)
        self._recorded = record and RecordedSteps(self._run, self.cache, record)
        self.records_single_tokens = self._recorded is not None

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
        if base.model.rotary_emb.rope_type in _ROPE_BY_LENGTH:
            return False
        if not all(_is_plain(linear) for linear in linears):
            return False
        adapted = [linear for linear in linears if isinstance(linear, XLoraLinear)]
        # A merged model has none, an adapted layer elsewhere would be left out.
        if not adapted or len(adapted) != len(model.lora_layer_names):
            return False
        if any(_is_watched(module) for module in base.modules()):
            return False
        devices: set[torch.device] = {p.device for p in base.parameters()}
        dtypes = {p.dtype for p in base.parameters()}
        if len(devices) > 1 or len(dtypes) > 1 or not dtypes <= _DTYPES:
            return False
        return devices.pop().type != "meta"  # where weights rest that are offloaded

    def close(self) -> None:
        """Frees the rows and the packed matrices, which are no longer right once weights change."""
        super().close()
        self._head.unpack()
        for block in self._blocks:
            for projection in block.projections:
                projection.unpack()

    def read(self, batch: RowBatch) -> Tensor:
        """Reads the tokens of a batch; see ``RowReader.read``."""
        self.cache.check_room(batch.segments)
        # Cheaper than no_grad, operation by operation; the clone is an ordinary tensor again.
        with torch.inference_mode():
            if self._recorded is not None and self._recorded.takes(batch):
                hidden = self._recorded.read(batch)
            else:
                plan = AttentionPlan(batch, self.cache)
                hidden = self._run(batch.token_ids, plan, batch.scalings)
        return hidden.clone()

    def _run(
        self, token_ids: Tensor, plan: AttentionPlan | RectanglePlan, scalings: Tensor | None
    ) -> Tensor:
        """Returns the last hidden states ``[N, H]`` of tokens ``[N]``."""
        hidden = F.embedding(token_ids, self._embedding.weight)
        rotation = self._rotation(hidden, plan.positions)
        weights: Sequence[Tensor | None] = [None] * (4 * len(self._blocks))
        if scalings is not None:
            weights = self._rank_weights.of(scalings, len(token_ids))
        for index, block in enumerate(self._blocks):
            block.read(hidden, index, plan, rotation, weights[4 * index : 4 * index + 4])
        return self._norm(hidden)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits ``[n, V]`` of hidden states ``[n, H]``."""
        return self._head(hidden)

    def _rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and signed sines ``[N, 1, D]`` of the tokens' positions."""
        cos, sin = self._rotary(hidden, positions.unsqueeze(0))
        # rotate_half's minus sign, once per step instead of once per block.
        low, high = sin.chunk(2, dim=-1)
        signed = torch.cat([-low, high], dim=-1)
        return cos.transpose(0, 1), signed.transpose(0, 1)


class _Block:
    """One block of the model, its layers fused.

    Args:
        layer: The model's decoder layer.
        triton: As for ``FusedProjection``.
        packed: Likewise.
    """

    def __init__(self, layer: Any, *, triton: bool, packed: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v, o = (getattr(attention, name) for name in _ATTENTION_LINEARS)
        gate, up, down = (getattr(mlp, name) for name in _MLP_LINEARS)
        self._attention_norm = rms_norm(layer.input_layernorm)
        self._mlp_norm = rms_norm(layer.post_attention_layernorm)
        self._q_norm = getattr(attention, "q_norm", None)
        self._k_norm = getattr(attention, "k_norm", None)
        self._act = mlp.act_fn
        self._scale = float(attention.scaling)
        self._head_size = int(attention.head_dim)
        self._n_heads = plain_layer(q).out_features // self._head_size
        self._kv_heads = plain_layer(k).out_features // self._head_size
        self._n_inner = plain_layer(gate).out_features
        self._qkv = FusedProjection([q, k, v], triton=triton, packed=packed)
        self._o = FusedProjection([o], triton=triton, packed=packed)
        self._gate_up = FusedProjection([gate, up], triton=triton, packed=packed)
        self._down = FusedProjection([down], triton=triton, packed=packed)
        self.projections = (self._qkv, self._o, self._gate_up, self._down)

    @property
    def cache_shape(self) -> BlockShape:
        """What the block caches per token."""
        size = self._head_size
        return BlockShape(n_heads=self._kv_heads, key_size=size, value_size=size)

    def read(
        self,
        hidden: Tensor,
        index: int,
        plan: AttentionPlan | RectanglePlan,
        rotation: tuple[Tensor, Tensor],
        weights: Sequence[Tensor | None],
    ) -> None:
        """Runs the block.

        Args:
            hidden: ``[N, H]``; what attention and MLP find is added to it.
            index: The block's place in the cache.
            plan: Where the tokens stand and what they see.
            rotation: Cosines and signed sines ``[N, 1, D]``.
            weights: ``[M, R]`` of each projection.
        """
        qkv = self._qkv(self._attention_norm(hidden), weights[0])
        queries, keys, values = self._turned(qkv.contiguous(), *rotation)
        found = plan.attend(index, queries, keys, values, self._scale)
        hidden.add_(self._o(found, weights[1]))
        gate_up = self._gate_up(self._mlp_norm(hidden), weights[2])
        inner = self._act(gate_up[:, : self._n_inner]) * gate_up[:, self._n_inner :]
        hidden.add_(self._down(inner, weights[3]))

    def _turned(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries ``[N, heads, D]``, keys and values ``[N, kv_heads, D]``, rotated."""
        heads = qkv.view(qkv.shape[0], -1, self._head_size)
        n_heads, n_turned = self._n_heads, self._n_heads + self._kv_heads
        turned = heads[:, :n_turned]
        if self._q_norm is not None and self._k_norm is not None:
            queries, keys = self._q_norm(turned[:, :n_heads]), self._k_norm(turned[:, n_heads:])
            turned = torch.cat([queries, keys], dim=1)
        swapped = turned.roll(self._head_size // 2, -1)
        turned = torch.addcmul(turned * cos, swapped, sin)
        return turned[:, :n_heads], turned[:, n_heads:], heads[:, n_turned:]


def _blocks(model: XLoraModel) -> list[Any]:
    backbone = model.base_model.model
    return list(backbone.layers[: backbone.config.num_hidden_layers])


def _linears(block: Any) -> list[Any]:
    return [getattr(block.self_attn, name) for name in _ATTENTION_LINEARS] + [
        getattr(block.mlp, name) for name in _MLP_LINEARS
    ]


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what a module computes when it is called."""
    own = vars(module)  # PyTorch has no other way to ask
    hooks = [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
    # transformers leaves hooks behind that do nothing unless its own forward asks them to.
    return any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks)


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
