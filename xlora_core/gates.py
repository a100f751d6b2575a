"""The per-layer router: one gate a module, each reading its module's own input in the main pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xlora_core import routing
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.errors import ModelError
from xlora_core.gate import Gate
from xlora_core.layers import XLoraLayer
from xlora_core.layers.experts import compute_device


class LayerGates(nn.ModuleList):
    """One ``Gate`` per adapted module, in the modules' order.

    Args:
        layers: The L adapted modules.
        n_adapters: K.
        dtype: dtype of the gates, float32 or wider.
    """

    def __init__(
        self, layers: Sequence[XLoraLayer], n_adapters: int, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(
            Gate(
                layer.gate_features,
                n_adapters,
                dtype=dtype,
                device=compute_device(layer.base_layer),
            )
            for layer in layers
        )


class GateScalings:
    """The scalings of one forward call, each decided as its module runs.

    Args:
        gates: One per adapted module.
        config: Says which softmax is on.
        knobs: Of this call.
        layer_names: L paths of the adapted modules.
        adapter_names: K names.
    """

    def __init__(
        self,
        gates: LayerGates,
        config: XLoraConfig,
        knobs: RoutingKnobs,
        *,
        layer_names: Sequence[str],
        adapter_names: Sequence[str],
    ) -> None:
        self._gates = gates
        self._config = config
        self._knobs = knobs
        self._names = layer_names, adapter_names
        self._logits: list[Tensor | None] = [None] * len(gates)
        self._is_recording = True
        # Re-entrant checkpointing runs a block again only if one of its inputs asks for a
        # gradient; the first block's may not, though its gates learn.
        self._anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())

    def of(self, layer: XLoraLayer, x: Tensor) -> Tensor:
        """Returns ``[*layer.token_shape(x), K]``, what the module's gate makes of its input."""
        index = layer.layer_index
        logits: Tensor = self._gates[index](layer.gate_input(x))
        if self._is_recording:
            self._logits[index] = logits
        return routing.effective_scalings(
            routing.scalings_from_logits(
                logits,
                enable_softmax=self._config.enable_softmax,
                temperature=self._knobs.temperature,
            ),
            top_k=self._knobs.top_k,
            enable_softmax_topk=self._config.enable_softmax_topk,
            overrides=self._overrides(index, logits),
            global_weight=self._knobs.global_weight,
        )

    def _overrides(self, index: int, logits: Tensor) -> routing.OverrideMatrix | None:
        matrix = routing.override_matrix(
            self._knobs, *self._names, dtype=logits.dtype, device=logits.device
        )
        if matrix is None:
            return None
        row = index if len(matrix.factor) > 1 else 0
        return routing.OverrideMatrix(matrix.factor[row], matrix.pin[row])

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns a tensor that asks for a gradient; the gates are parameters and get theirs."""
        return (self._anchor,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> GateScalings:
        """Returns itself: nothing here was computed before the pass."""
        return self

    def router_logits(self, tokens: Tensor | None) -> Tensor:
        """Ends the recording and returns what the gates said, ``[B, T, L, K]``.

        A module that saw one vector per text (a pooler) has the same row at each of its tokens,
        one that did not run (an embedding beside ``inputs_embeds``) has zeros. One that saw
        several vectors per text, but not one a token, has their mean. One that ran several times
        has its last run.

        Args:
            tokens: ``[B, T]`` or ``[B, T, H]``, what the model read; None if it read no tokens.

        Raises:
            ModelError: If a module's inputs belong to no text.
        """
        self._is_recording = False
        shapes = [logits.shape[:-1] for logits in self._logits if logits is not None]
        if tokens is not None:
            n_texts, n_tokens = tokens.shape[:2]
        else:
            n_texts, n_tokens = next((s for s in shapes if len(s) == 2), (*shapes[0][:1], 1))
        first = next(self._gates.parameters())  # [K, in]
        blank = first.new_zeros(n_texts, n_tokens, len(first))
        return torch.stack(
            [
                blank if logits is None else _at_tokens(index, logits.to(first.device), blank)
                for index, logits in enumerate(self._logits)
            ],
            dim=2,
        )


def _at_tokens(index: int, logits: Tensor, like: Tensor) -> Tensor:
    """``[*leading, K]`` -> ``[B, T, K]``, the shape of ``like``."""
    leading = logits.shape[:-1]
    n_texts, n_tokens = like.shape[:2]
    if leading in ((n_texts, n_tokens), (n_texts * n_tokens,)):
        return logits.reshape(like.shape)
    if leading == (1, n_tokens):  # positions, which all texts share
        return logits.expand_as(like)
    if leading[:1] == (n_texts,):
        of_text = logits if len(leading) == 1 else logits.flatten(1, -2).mean(dim=1)
        return of_text[:, None].expand_as(like)
    raise ModelError(
        f"adapted module number {index} got {list(leading)} vectors, expected some for each of "
        f"{n_texts} texts of {n_tokens} tokens",
        hint="leave it out of the adapters' target_modules",
    )
