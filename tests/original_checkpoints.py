"""Checkpoints as the original ``xlora`` package writes them, without that package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny_models import HIDDEN_SIZE, write_experts

CONFIG = "xlora_config.json"
CLASSIFIER = "xlora_classifier.safetensors"
N_MODULES = 14
WIDTH = 16


class OriginalClassifier(nn.Module):
    """The original's MLP: hidden layers in ``inner``, the last one in ``last``.

    Source: EricLBuehler/xlora, ``xLoRAClassifier``, as described in its file format.
    """

    def __init__(
        self, *, depth: int, n_adapters: int, activations: bool, bias: bool, layerwise: bool
    ) -> None:
        super().__init__()
        self.n_adapters = n_adapters
        n_outputs = (N_MODULES if layerwise else 1) * n_adapters
        widths = [HIDDEN_SIZE, *[WIDTH] * (depth - 1)]
        self.inner = nn.ModuleList()
        for width in widths[:-1]:
            self.inner.append(nn.Linear(width, WIDTH, bias=bias))
            if activations:
                self.inner.extend([nn.ReLU(), nn.Dropout(0.2)])
        self.last = nn.Linear(widths[-1], n_outputs, bias=bias)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, T, H]`` -> router logits ``[B, T, L or 1, K]``."""
        for layer in self.inner:
            hidden = layer(hidden)
        return self.last(hidden).unflatten(-1, (-1, self.n_adapters))


def write_original_checkpoint(
    folder: Path,
    *,
    depth: int = 1,
    n_adapters: int = 3,
    activations: bool = True,
    bias: bool = True,
    layerwise: bool = True,
    config: Mapping[str, object] | None = None,
) -> OriginalClassifier:
    """Writes a checkpoint with experts "0", "1", ...; returns its classifier, in float64.

    Args:
        folder: A new folder.
        depth: Number of linear layers.
        n_adapters: K.
        activations: ``enable_relu_and_dropout``.
        bias: ``use_bias``.
        layerwise: ``layerwise_scalings``.
        config: Further keys of the config; a value of None leaves a key out.
    """
    for name, path in write_experts(folder.parent / "new-experts", n_adapters=n_adapters).items():
        shutil.copytree(path, folder / name)
        file = folder / name / "adapter_model.safetensors"
        # What the original's save leaves in every adapter file.
        stray = {"base_model.internal_xlora_classifier.last.bias": torch.zeros(3)}
        save_file(load_file(file) | stray, file)
    classifier = OriginalClassifier(
        depth=depth, n_adapters=n_adapters, activations=activations, bias=bias, layerwise=layerwise
    )
    save_file(classifier.state_dict(), folder / CLASSIFIER, metadata={"format": "pt"})
    values = {
        "hidden_size": HIDDEN_SIZE,
        "base_model_id": "some/base",
        "adapters": [str(index) for index in range(n_adapters)],
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "layerwise_scalings": layerwise,
        "xlora_depth": depth,
        "xlora_size": WIDTH,
        "enable_relu_and_dropout": activations,
        "use_bias": bias,
        "xlora_dropout_p": 0.2,
        "use_trainable_adapters": False,
        "softmax_temperature": 1,
        "top_k_lora": None,
        "scaling_pass_value": 0,
        "global_scaling_weight": 1,
        **(config or {}),
    }
    left_out = {key for key, value in (config or {}).items() if value is None}
    kept = {key: value for key, value in values.items() if key not in left_out}
    (folder / CONFIG).write_text(json.dumps(kept))
    return classifier.double().eval()
