"""The parts of a Hugging Face encoder-decoder, and which arguments each takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from xlora_core.config import XLoraConfig
from xlora_core.errors import ConfigError, ModelError
from xlora_core.passes import accepted

# Arguments of an encoder-decoder's forward that are none of its encoder's.
# Source: transformers 5.23, ``_prepare_text_encoder_decoder_kwargs_for_generation``.
_NOT_THE_ENCODERS = (
    "cross_attn",
    "decoder_",
    "encoder_outputs",
    "labels",
    "logits_to_keep",
    "past_key_values",
    "use_cache",
)
# Name in the whole model -> name in its decoder alone.
_OF_DECODER = {
    "attention_mask": "encoder_attention_mask",
    "decoder_attention_mask": "attention_mask",
    "decoder_input_ids": "input_ids",
    "decoder_inputs_embeds": "inputs_embeds",
}


# Any, here and below: what transformers declares on its models hides their methods from a type
# checker.
def is_encoder_decoder(base_model: Any) -> bool:
    """Returns whether a model reads a source and writes a target."""
    # The encoder of such a model, taken alone, keeps the config of the whole.
    forward = inspect.signature(type(base_model).forward).parameters
    return bool(base_model.config.is_encoder_decoder) and "decoder_input_ids" in forward


def check_base(base_model: Any, config: XLoraConfig) -> None:
    """Raises if X-LoRA cannot route an encoder-decoder; every other model passes.

    Args:
        base_model: As it is loaded.
        config: ``hidden_size`` is the decoder's.

    Raises:
        ModelError: If encoder and decoder differ in width.
        ConfigError: If the router is per layer.
    """
    if not is_encoder_decoder(base_model):
        return
    name, width = type(base_model).__name__, encoder_width(base_model)
    if width != config.hidden_size:
        raise ModelError(
            f"the encoder of {name} is {width} wide, its decoder {config.hidden_size}; the "
            "classifier reads both, so they must agree",
            hint="X-LoRA needs an encoder and a decoder with one hidden size",
        )
    if config.router == "per_layer":
        raise ConfigError(
            f"router is 'per_layer', but {name} is an encoder-decoder",
            hint="use router='classifier'; per-layer gates serve decoders and encoders",
        )


def encoder_width(base_model: Any) -> int:
    """Returns H, the size of the encoder's last hidden state."""
    return int(base_model.get_encoder().config.get_text_config().hidden_size)


def has_target(inputs: Mapping[str, Any]) -> bool:
    """Returns whether the decoder's own inputs are among a model's arguments."""
    names = ("decoder_input_ids", "decoder_inputs_embeds")
    return any(inputs.get(name) is not None for name in names)


def of_encoder(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a model's arguments that its encoder takes."""
    return {k: v for k, v in inputs.items() if not k.startswith(_NOT_THE_ENCODERS)}


def run_encoder(base_model: Any, inputs: Mapping[str, Any]) -> Any:
    """Returns the encoder's output; arguments that it does not know are left out."""
    encoder = base_model.get_encoder()
    parameters = inspect.signature(encoder.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    taken = {
        name: value
        for name, value in inputs.items()
        if value is not None and (takes_any or name in parameters)
    }
    return encoder(**taken | {"return_dict": True})


def run_without_head(base_model: Any, inputs: Mapping[str, Any]) -> Any:
    """Returns the output of what lies below the head; None where only the whole model can run.

    Args:
        base_model: BART and its like have a backbone; T5 and its like have not, there the decoder
            is called as the model calls it.
        inputs: Arguments of the whole model, ``encoder_outputs`` and the decoder's own included.
    """
    backbone = base_model.base_model
    if backbone is not base_model:
        return backbone(**accepted(backbone, dict(inputs)))
    decoder = base_model.get_decoder()
    if not _is_bare_decoder(decoder, base_model):
        return None
    source = {"encoder_outputs", "input_ids", "inputs_embeds"}
    taken = {_OF_DECODER.get(k, k): v for k, v in inputs.items() if k not in source}
    return decoder(**taken, encoder_hidden_states=inputs["encoder_outputs"].last_hidden_state)


def _is_bare_decoder(decoder: Any, base_model: nn.Module) -> bool:
    """Returns whether it is the model's stack of decoder layers, without a head of its own."""
    if decoder is base_model or decoder.get_output_embeddings() is not None:
        return False
    return "encoder_hidden_states" in inspect.signature(decoder.forward).parameters
