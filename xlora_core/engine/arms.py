"""One arm of a request at work: its caches, and how it reads tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xlora_core.config import Arm, RoutingKnobs
from xlora_core.engine.runner import check_router_logits
from xlora_core.kv_cache import DualCache

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

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
            from the scaling pass, so only where there is one, and ``scaling_pass_value`` is 0.
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
        inputs = {
            "input_ids": self._input_ids(token_ids),
            "past_key_values": self._cache.main,
            "logits_to_keep": 1,
        }
        if self._routed and self._model.is_routed_per_layer:
            gated = self._model.gated_pass(knobs=knobs, **inputs)
            return Reading(
                logits=gated.output.logits[0, -1],
                base_logits=None,
                router_logits=check_router_logits(gated.router_logits[0].to("cpu")),
            )
        if self._routed:
            return self._read_two_passes(inputs, knobs)
        output = self._model.main_pass(scalings=self._scalings, **inputs)
        logits = output.logits[0, -1]
        base_logits = logits if self._is_base and self._with_base_logits else None
        return Reading(logits=logits, base_logits=base_logits, router_logits=None)

    def _read_two_passes(self, inputs: Mapping[str, Any], knobs: RoutingKnobs) -> Reading:
        is_base = self._model.config_xlora.scaling_pass_value == 0
        scaling = self._model.scaling_pass(
            input_ids=inputs["input_ids"],
            past_key_values=self._router_cache,
            knobs=knobs,
            with_lm_logits=self._with_base_logits and is_base,
        )
        router_logits = check_router_logits(scaling.router_logits[0].to("cpu"))
        scalings = self._model.route(scaling.router_logits, knobs)
        output = self._model.main_pass(scalings=scalings, **inputs)
        return Reading(
            logits=output.logits[0, -1],
            base_logits=None if scaling.lm_logits is None else scaling.lm_logits[0, -1],
            router_logits=router_logits,
        )

    @property
    def _router_cache(self) -> Cache:
        """The cache of the pass that makes the router logits."""
        return self._cache.scaling if isinstance(self._cache, DualCache) else self._cache.main

    def read_router(self, token_id: int, knobs: RoutingKnobs) -> Tensor | None:
        """Returns the router logits ``[1, L or 1, K]`` of a token after which nothing follows.

        None for an arm that is not routed.
        """
        if not self._routed:
            return None
        router_logits = self._model.read_router(
            input_ids=self._input_ids([token_id]),
            past_key_values=self._router_cache,
            logits_to_keep=1,
            knobs=knobs,
        )
        return check_router_logits(router_logits[0].to("cpu"))

    def _input_ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(token_ids)], dtype=torch.long, device=self._model.device)


def constant_scalings(arm: Arm, adapter_names: Sequence[str]) -> list[float] | None:
    """Returns the K scalings that an arm holds for every token; None for base and routed."""
    if arm.kind == "merged":
        return [1 / len(adapter_names)] * len(adapter_names)
    if arm.kind == "expert":
        return [float(name == arm.adapter) for name in adapter_names]
    return None
