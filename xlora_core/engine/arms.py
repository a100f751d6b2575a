"""One arm of a request at work: its caches, and how it reads tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xlora_core.config import Arm, RoutingKnobs
from xlora_core.errors import EngineError

if TYPE_CHECKING:
    from xlora_core.model import XLoraModel


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What an arm knows after it has read n tokens.

    Attributes:
        logits: ``[V]``, the arm's logits after the last of them.
        base_logits: ``[V]``, the base model's; None where they are not known.
        router_logits: ``[n, L or 1, K]`` on the CPU; None for an arm that is not routed.
    """

    logits: Tensor
    base_logits: Tensor | None
    router_logits: Tensor | None


class ArmDecoder:
    """Reads tokens one arm's way, with the arm's own KV caches.

    A change of knobs concerns the tokens read from then on. With a non-zero
    ``scaling_pass_value`` top-k and global weight also reach the scaling pass; the cached
    scaling pass of earlier tokens stays as it was.

    Args:
        model: The model; its only state used here is weights and config.
        arm: Which way.
        with_base_logits: Whether a routed arm also asks for the base model's logits. They come
            from the scaling pass, so only while ``scaling_pass_value`` is 0.
    """

    def __init__(self, model: XLoraModel, arm: Arm, *, with_base_logits: bool) -> None:
        self._model = model
        self._cache = model.new_cache()
        self._routed = arm.kind == "routed"
        self._is_base = arm.kind == "base"
        self._with_base_logits = with_base_logits
        scalings = constant_scalings(arm, model.adapter_names)
        self._scalings = (
            None
            if scalings is None
            else torch.tensor(scalings, dtype=torch.float32, device=model.device)
        )

    def read(self, token_ids: Sequence[int], knobs: RoutingKnobs) -> Reading:
        """Reads the next tokens.

        Args:
            token_ids: n >= 1 ids.
            knobs: In force for these tokens; only a routed arm uses them.
        """
        ids = self._input_ids(token_ids)
        scalings, router_logits, base_logits = self._scalings, None, None
        if self._routed:
            with_lm_logits = (
                self._with_base_logits and self._model.config_xlora.scaling_pass_value == 0
            )
            scaling = self._model.scaling_pass(
                input_ids=ids,
                past_key_values=self._cache.scaling,
                knobs=knobs,
                with_lm_logits=with_lm_logits,
            )
            if scaling.lm_logits is not None:
                base_logits = scaling.lm_logits[0, -1]
            scalings = self._model.route(scaling.router_logits, knobs)
            router_logits = _checked_rows(scaling.router_logits)
        output = self._model.main_pass(
            scalings=scalings, input_ids=ids, past_key_values=self._cache.main, logits_to_keep=1
        )
        logits = output.logits[0, -1]
        if self._is_base and self._with_base_logits:
            base_logits = logits
        return Reading(logits=logits, base_logits=base_logits, router_logits=router_logits)

    def read_router(self, token_id: int, knobs: RoutingKnobs) -> Tensor | None:
        """Returns the router logits ``[1, L or 1, K]`` of a token after which nothing follows.

        None for an arm that is not routed.
        """
        if not self._routed:
            return None
        scaling = self._model.scaling_pass(
            input_ids=self._input_ids([token_id]), past_key_values=self._cache.scaling, knobs=knobs
        )
        return _checked_rows(scaling.router_logits)

    def release(self) -> None:
        """Frees the KV caches; the arm reads nothing any more."""
        self._cache = self._model.new_cache()

    def _input_ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(token_ids)], dtype=torch.long, device=self._model.device)


def constant_scalings(arm: Arm, adapter_names: Sequence[str]) -> list[float] | None:
    """Returns the K scalings that an arm holds for every token; None for base and routed."""
    if arm.kind == "merged":
        return [1 / len(adapter_names)] * len(adapter_names)
    if arm.kind == "expert":
        return [float(name == arm.adapter) for name in adapter_names]
    return None


def _checked_rows(router_logits: Tensor) -> Tensor:
    """``[1, n, L or 1, K]`` -> ``[n, L or 1, K]`` on the CPU, refusing NaN and infinity."""
    rows = router_logits[0].to("cpu")
    if not torch.isfinite(rows).all():
        raise EngineError(
            "the router's logits are not finite (NaN or infinity)",
            hint="the classifier is damaged or its training diverged; take an earlier checkpoint",
        )
    return rows
