"""What an engine serves: which models, which arms, and what ends an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xlora_core.config import Arm
from xlora_core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel


def check_serves(model: XLoraModel) -> None:
    """Checks that an engine can serve a model.

    Raises:
        ModelError: If the base model is an encoder-decoder, or writes no text.
    """
    name = type(model.base_model).__name__
    if model.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder, the engine serves decoder-only models",
            hint="call model.generate",
        )
    if not model.can_generate():
        raise ModelError(
            f"{name} writes no text, the engine serves models that generate",
            hint="call the model itself",
        )


def checked_arms(model: XLoraModel, arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """Returns a request's arms; a routed one without knobs gets the model's.

    Raises:
        ConfigError: If there is no arm, an expert is unknown, or knobs do not fit the model.
    """
    names = model.adapter_names
    if not arms:
        raise ConfigError("a request needs at least one arm", hint="for example Arm.routed()")
    checked = []
    for arm in arms:
        if arm.kind == "expert" and arm.adapter not in names:
            raise ConfigError(
                f"there is no expert {arm.adapter!r} in this model",
                hint=f"its experts are {', '.join(names)}",
            )
        if arm.kind == "routed":
            knobs = model.check_knobs(arm.knobs or model.default_knobs)
            checked.append(replace(arm, knobs=knobs))
        else:
            checked.append(arm)
    return tuple(checked)


def stop_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that end an answer, from the first place that names any.

    The order is Hugging Face's: generation config, model config; then the tokenizer.
    """
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def positions_follow_length(model: Any) -> bool:
    """Whether rotary positions depend on how long the text is that is read in one call.

    A prompt read in parts would then be another one than Hugging Face reads, which reads it whole.
    """
    config = model.config.get_text_config().to_dict()
    return any(
        "dynamic" in kind or kind == "longrope"
        for kind in _rope_types(config.get("rope_parameters"))
    )


def _rope_types(parameters: object) -> Iterator[str]:
    """Yields the rotary embeddings' types; some models have one per layer type."""
    if isinstance(parameters, dict):
        for name, value in parameters.items():
            if name == "rope_type":
                yield str(value)
            yield from _rope_types(value)
