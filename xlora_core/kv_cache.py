"""Two KV caches that Hugging Face's ``generate`` treats as one.

The scalings of a token depend on earlier tokens only, so scaling pass and main pass can both
be cached exactly. Everything that moves rows or drops tokens is done to both.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache

from xlora_core.errors import ModelError
from xlora_core.scalings_log import LogEntry


class DualCache(Cache):
    """The caches of both passes over the same tokens.

    Attributes:
        main: Keys and values of the main pass.
        scaling: Keys and values of the scaling pass.
        logged: The last entry of the scalings log that belongs to these tokens.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.main = DynamicCache(config=config)
        self.scaling = DynamicCache(config=config)
        self.logged: LogEntry | None = None
        super().__init__(layers=self.main.layers)

    def __repr__(self) -> str:
        return f"DualCache(tokens={self.get_seq_length()})"

    @property
    def is_compileable(self) -> bool:
        """False: both caches grow, and ``generate`` must not compile around them."""
        return False

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuses: keys and values belong to one of the two caches.

        Raises:
            TypeError: Always; a plain model was given both caches at once.
        """
        raise TypeError("a DualCache serves an XLoraModel; give a plain model cache.main")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of cached tokens."""
        return int(self.main.get_seq_length(layer_idx))

    def check_in_step(self) -> None:
        """Raises unless both passes have read the same tokens.

        Raises:
            ModelError: If one has not; a call failed between them.
        """
        main, scaling = self.main.get_seq_length(), self.scaling.get_seq_length()
        if main != scaling:
            raise ModelError(
                f"the two caches of this DualCache hold {main} and {scaling} tokens, expected as "
                "many in both; an earlier call with it failed half way",
                hint="start again with model.new_cache()",
            )

    def reset(self) -> None:
        """Forgets all tokens."""
        self.main.reset()
        self.scaling.reset()
        self.logged = None

    def activate_past_recording(self) -> None:
        """Makes layers with a window keep what a later ``crop`` would need."""
        self.main.activate_past_recording()
        self.scaling.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Moves the rows to the beams ``beam_idx`` ``[B]``."""
        self.main.reorder_cache(beam_idx)
        self.scaling.reorder_cache(beam_idx)
        if self.logged is not None:
            self.logged = self.logged.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last tokens; the count is negative, as Hugging Face has it."""
        self.main.crop(tokens_to_remove)
        self.scaling.crop(tokens_to_remove)
        if self.logged is not None:
            rows = self.logged.tensor()
            self.logged = LogEntry(rows[:, : self.get_seq_length()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        self.main.batch_repeat_interleave(repeats)
        self.scaling.batch_repeat_interleave(repeats)
        if self.logged is not None:
            n_rows = self.logged.rows.shape[0]
            self.logged = self.logged.select(torch.arange(n_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices``."""
        self.main.batch_select_indices(indices)
        self.scaling.batch_select_indices(indices)
        if self.logged is not None:
            self.logged = self.logged.select(indices)
