"""Which model made a run: names, hashes and versions for the run's header."""

from __future__ import annotations

import hashlib
import platform
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xlora_core.config import SamplingParams
from xlora_core.recording import RunHeader

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel

# Values looked at per tensor of the base model: reading all of a large model would take longer
# than answering a prompt.
_N_SAMPLES = 64


class ModelIdentity:
    """What runs say of the model that made them.

    Args:
        model: The model; its weights are looked at once, here.
        model_id: Its name for people; the base model's path if empty.
    """

    def __init__(self, model: XLoraModel, model_id: str = "") -> None:
        self._model = model
        self._model_id = model_id or str(getattr(model.config, "name_or_path", ""))
        self._base_hash = base_fingerprint(model)
        self._adapter_hashes = adapter_fingerprints(model)

    def header(self, prompt_text: str, sampling: SamplingParams) -> RunHeader:
        """Returns the header of a new run."""
        model, config = self._model, self._model.config_xlora
        return RunHeader(
            run_id=uuid.uuid4().hex,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            adapter_names=list(model.adapter_names),
            layer_names=list(model.lora_layer_names),
            present=model.present.tolist(),
            enable_softmax=config.enable_softmax,
            enable_softmax_topk=config.enable_softmax_topk,
            layerwise=config.layerwise_scalings or config.router == "per_layer",
            scaling_pass_value=config.scaling_pass_value,
            router=config.router,
            model_id=self._model_id,
            base_hash=self._base_hash,
            adapter_hashes=self._adapter_hashes,
            sampling=sampling,
            prompt_text=prompt_text,
            versions=versions(),
        )


def base_fingerprint(model: XLoraModel) -> str:
    """Returns 16 hex digits that differ between base models of different weights.

    A sample of every tensor goes in, together with names, shapes and dtypes; it tells models
    apart, it is no protection against forgery.
    """
    of_experts = {
        id(parameter)
        for layer in model.lora_layers
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_bias)
    }
    return _digest(
        (name, _values(model.base_model, name, parameter))
        for name, parameter in model.base_model.named_parameters()
        if id(parameter) not in of_experts
    )


def adapter_fingerprints(model: XLoraModel) -> dict[str, str]:
    """Returns adapter name -> 16 hex digits over a sample of its weights."""
    experts = [
        (path, layer.experts())
        for path, layer in zip(model.lora_layer_names, model.lora_layers, strict=True)
    ]
    return {
        name: _digest(
            (f"{path}.{part}", tensor)
            for path, weights in experts
            if k in weights
            for part in ("lora_A", "lora_B", "bias")
            if (tensor := getattr(weights[k], part)) is not None
        )
        for k, name in enumerate(model.adapter_names)
    }


def versions() -> dict[str, str]:
    """Returns the versions of what computed a run."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
    }


def _values(base_model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Returns a parameter's values, also if they rest in memory or on disk beside the model.

    Source: accelerate keeps such weights on ``meta``, and their values in the hook's map.
    """
    path, _, own_name = name.rpartition(".")
    hook = getattr(base_model.get_submodule(path), "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if parameter.is_meta and getattr(part, "weights_map", None) is not None:
            values: Tensor = part.weights_map[own_name]
            return values
    return parameter


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.shape[0] // _N_SAMPLES)
        digest.update(flat[::stride].to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]
