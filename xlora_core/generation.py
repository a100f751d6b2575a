"""What Hugging Face's ``generate`` needs to know about an X-LoRA model."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from xlora_core.config import XLoraConfig
from xlora_core.errors import ModelError
from xlora_core.kv_cache import DualCache, GatedCache, RoutedCache


class XLoraGeneration(GenerationMixin):
    """``generate`` over the model's caches: greedy, sampling, beams, streamers, stopping criteria.

    The class it is mixed into provides ``base_model``; everything that depends on the
    architecture is asked of that model.
    """

    # Any: what transformers declares on its models hides their methods from a type checker.
    base_model: Any

    _config_xlora: XLoraConfig

    def new_cache(self) -> RoutedCache:
        """Returns an empty KV cache: of both passes, or of the one that a per-layer router has."""
        return self._cache_class(self.base_model.config)

    def check_cache(self, cache: object) -> RoutedCache:
        """Returns a cache if it is one of ``new_cache``.

        Raises:
            ModelError: If it is another kind.
        """
        if isinstance(cache, self._cache_class):
            return cache
        raise ModelError(
            f"past_key_values must be a {self._cache_class.__name__}, got {type(cache).__name__}",
            hint="make one with model.new_cache()",
        )

    @property
    def _cache_class(self) -> type[DualCache | GatedCache]:
        return GatedCache if self._config_xlora.router == "per_layer" else DualCache

    def can_generate(self) -> bool:
        """Returns whether the base model can."""
        return bool(self.base_model.can_generate())

    def prepare_inputs_for_generation(
        self,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns the base model's inputs for the next step.

        ``generate`` takes these two only from models that name them here.
        """
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if encoder_outputs is not None:
            kwargs["encoder_outputs"] = encoder_outputs
        return dict(self.base_model.prepare_inputs_for_generation(*args, **kwargs))

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Repeats rows for beams, but not those of the caller's own encoder output."""
        if kwargs.get("encoder_outputs") is not None:
            kwargs["encoder_outputs"] = copy.copy(kwargs["encoder_outputs"])
        return super()._expand_inputs_for_generation(  # type: ignore[misc]  # typed for its own models
            *args, **kwargs
        )

    def _supports_logits_to_keep(self) -> bool:
        return bool(self.base_model._supports_logits_to_keep())  # noqa: SLF001  # as generate asks

    def _prepare_cache_for_generation(  # type: ignore[override]  # generate ignores the result
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if given is not None:
            self.check_cache(given)
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ModelError(
                f"cache_implementation={implementation!r} cannot serve the passes of X-LoRA",
                hint="leave cache_implementation out",
            )
        if given is not None:
            # Marks it as one that outlives this call, so that it holds no token too many.
            super()._prepare_cache_for_generation(  # type: ignore[misc]  # typed for its own models
                generation_config, model_kwargs, *args
            )
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()
