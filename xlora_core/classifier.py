"""The X-LoRA classifier: hidden state -> router logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xlora_core.config import XLoraConfig
from xlora_core.precision import Float32OrWider


class XLoraClassifier(Float32OrWider):
    """Turns each token's hidden state into one logit per adapted module and adapter.

    Depth 1 is one linear layer with bias. Depth d is ``Linear(H, size)``, ReLU, dropout,
    ``d - 2`` times [``Linear(size, size)``, ReLU, dropout], ``Linear``. Dropout modules exist
    only for ``xlora_dropout_p > 0``, so the indices in ``layers`` depend on it.

    It computes in float32 (float64 under a float64 model), whatever the base model's dtype:
    rounding in the router changes tokens.

    Args:
        config: ``hidden_size`` must be set.
        n_lora_layers: L, the number of adapted modules.
        n_adapters: K.
        dtype: dtype of the weights.
        device: Where the weights live.

    Source: PEFT 0.21.2, ``XLoraClassifier``; arXiv 2402.07148, section 2.
    """

    def __init__(
        self,
        config: XLoraConfig,
        *,
        n_lora_layers: int,
        n_adapters: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.n_routed_layers = n_lora_layers if config.layerwise_scalings else 1
        self.n_adapters = n_adapters
        n_outputs = self.n_routed_layers * n_adapters
        width = config.hidden_size
        if width is None:
            raise ValueError("the classifier needs config.hidden_size")
        layers: list[nn.Module] = []
        for _ in range(config.xlora_depth - 1):
            layers += [
                nn.Linear(width, config.xlora_size, dtype=dtype, device=device),
                nn.ReLU(),
            ]
            if config.xlora_dropout_p > 0:
                layers.append(nn.Dropout(config.xlora_dropout_p))
            width = config.xlora_size
        self.head = len(layers)
        layers.append(nn.Linear(width, n_outputs, dtype=dtype, device=device))
        self.layers = nn.Sequential(*layers)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights and logits."""
        return next(self.parameters()).dtype

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns the router logits of hidden states.

        Args:
            hidden: ``[B, T, H]``, any floating dtype.

        Returns:
            ``[B, T, L, K]``, or ``[B, T, 1, K]`` when one set of scalings serves all modules.
            Output index = module * K + adapter.
        """
        weights = next(self.parameters())
        # Autocast would run it in half precision.
        with torch.autocast(weights.device.type, enabled=False):
            logits: Tensor = self.layers(hidden.to(device=weights.device, dtype=weights.dtype))
        return logits.reshape(*hidden.shape[:-1], self.n_routed_layers, self.n_adapters)
