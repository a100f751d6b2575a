"""The KV caches of an X-LoRA model, which Hugging Face's ``generate`` treats as one.

The scalings of a token depend on earlier tokens only, so scaling pass and main pass can both
be cached exactly. Everything that moves rows or drops tokens is done to both, and to the entry of
the scalings log that belongs to them. A per-layer router has one pass, so one cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, EncoderDecoderCache

from xlora_core.errors import ModelError
from xlora_core.scalings_log import LogEntry


class RoutedCache(Cache):
    """The caches of all passes over the same tokens.

    Attributes:
        main: Keys and values of the main pass.
        logged: The last entry of the scalings log that belongs to these tokens.
    """

    def __init__(self, *passes: DynamicCache | EncoderDecoderCache) -> None:
        self.main = passes[0]
        self._passes = passes
        self.logged: LogEntry | None = None
        self._edition: int | None = None
        self._without_adapters = False
        self._is_half_read = False
        own = self.main
        own = own.self_attention_cache if isinstance(own, EncoderDecoderCache) else own
        super().__init__(layers=own.layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={self.get_seq_length()})"

    @property
    def is_compileable(self) -> bool:
        """False: the caches grow, and ``generate`` must not compile around them."""
        return False

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuses: keys and values belong to the cache of one pass.

        Raises:
            TypeError: Always; a plain model was given all caches at once.
        """
        raise TypeError(
            f"a {type(self).__name__} serves an XLoraModel; give a plain model cache.main"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of cached tokens."""
        return int(self.main.get_seq_length(layer_idx))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Holds while a pass fills the cache; if it fails, the cache is refused from then on."""
        self._is_half_read = True
        yield
        self._is_half_read = False

    def check_in_step(self) -> None:
        """Raises unless all passes have read the same tokens, in all their layers.

        Raises:
            ModelError: If one has not; an earlier call failed half way.
        """
        if self._is_half_read:
            raise ModelError(
                f"an earlier call with this {type(self).__name__} failed half way, its layers "
                "hold different tokens",
                hint="start again with model.new_cache()",
            )
        lengths = [cache.get_seq_length() for cache in self._passes]
        if len(set(lengths)) > 1:
            raise ModelError(
                f"the two caches of this DualCache hold {lengths[0]} and {lengths[1]} tokens, "
                "expected as many in both; an earlier call with it failed half way",
                hint="start again with model.new_cache()",
            )

    def check_goes_on(self, edition: int | None) -> None:
        """Raises unless the next tokens can be read by the mixture that read those before.

        Args:
            edition: How often the model's adapters were edited so far; None while they are
                switched off.

        Raises:
            ModelError: If the adapters were edited, or switched off or on, since the cache was
                filled, or if an earlier call failed half way.
        """
        if edition is None:
            if self.get_seq_length() and not self._without_adapters:
                raise ModelError(
                    "this cache was filled while the adapters were on; its keys and values are "
                    "not the base model's",
                    hint="start again with model.new_cache()",
                )
            self._without_adapters = True
            return
        if self.get_seq_length() and self._without_adapters:
            raise ModelError(
                "this cache was filled while the adapters were switched off; its keys and values "
                "are the base model's",
                hint="start again with model.new_cache()",
            )
        self.check_in_step()
        if not self.get_seq_length():
            self._edition, self._without_adapters = edition, False
        elif self._edition not in (None, edition):
            raise ModelError(
                "the model's adapters were edited since this cache was filled; its keys and "
                "values are those of another mixture",
                hint="start again with model.new_cache()",
            )

    def reset(self) -> None:
        """Forgets all tokens."""
        for cache in self._passes:
            cache.reset()  # type: ignore[no-untyped-call]  # untyped in transformers
        self.logged = None
        self._is_half_read = False

    def activate_past_recording(self) -> None:
        """Makes layers with a window keep what a later ``crop`` would need."""
        for cache in self._passes:
            cache.activate_past_recording()  # type: ignore[no-untyped-call]  # untyped there

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Moves the rows to the beams ``beam_idx`` ``[B]``."""
        for cache in self._passes:
            cache.reorder_cache(beam_idx)
        if self.logged is not None:
            self.logged = self.logged.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens; the count is negative, as Hugging Face has it."""
        for cache in self._passes:
            cache.crop(tokens_to_remove)
        if self.logged is not None:
            rows = self.logged.tensor()
            self.logged = LogEntry(rows[:, : self.get_seq_length()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        for cache in self._passes:
            cache.batch_repeat_interleave(repeats)
        if self.logged is not None:
            n_rows = self.logged.rows.shape[0]
            self.logged = self.logged.select(torch.arange(n_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices``."""
        for cache in self._passes:
            cache.batch_select_indices(indices)
        if self.logged is not None:
            self.logged = self.logged.select(indices)


class DualCache(RoutedCache):
    """The caches of scaling pass and main pass.

    Attributes:
        scaling: Keys and values of the scaling pass.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.scaling = _of_pass(config)
        super().__init__(_of_pass(config), self.scaling)


class GatedCache(RoutedCache):
    """The cache of a model that its layers' gates route, in the main pass alone."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(_of_pass(config))


def _of_pass(config: PretrainedConfig) -> DynamicCache | EncoderDecoderCache:
    """Returns an empty cache as a base model of this config takes it."""
    if not config.is_encoder_decoder:
        return DynamicCache(config=config)
    decoder = config.get_text_config(decoder=True)
    # A decoder's sliding window is over its own tokens: cross-attention sees all of the source.
    return EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache())
