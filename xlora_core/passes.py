"""The two passes and the routing between them, each a call of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xlora_core import routing
from xlora_core.classifier import XLoraClassifier
from xlora_core.config import RoutingKnobs
from xlora_core.controls import XLoraControls
from xlora_core.errors import ModelError
from xlora_core.gates import GateScalings, LayerGates
from xlora_core.gradient_checkpointing import carry_scalings_into_checkpoints
from xlora_core.kv_cache import RoutedCache
from xlora_core.layers import ActiveScalings, ModuleScalings, TokenScalings, XLoraLayer
from xlora_core.scalings_log import LogEntry

# Arguments of a causal language model's forward that its backbone has no use for.
HEAD_ARGUMENTS = frozenset(
    {
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    }
)


@dataclass(frozen=True, kw_only=True)
class ScalingPassOutput:
    """What the scaling pass yields.

    Attributes:
        router_logits: ``[B, T, L, K]``, or ``[B, T, 1, K]`` when one set serves all modules;
            float32 (float64 under a float64 model).
        lm_logits: ``[B, 1, V]``, the base model's logits after the last token; None if they
            were not asked for.
        encoder_router_logits: ``[B, S, L or 1, K]``, the source's, with an encoder-decoder;
            ``router_logits`` are the target's then.
    """

    router_logits: Tensor
    lm_logits: Tensor | None = None
    encoder_router_logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class GatedPassOutput:
    """What the one pass of a per-layer router yields.

    Attributes:
        output: The base model's output under the gates' mixture.
        router_logits: ``[B, T, L, K]``, float32 (float64 under a float64 model).
    """

    output: Any
    router_logits: Tensor


class XLoraPasses(XLoraControls, nn.Module):
    """Scaling pass, routing and main pass of ``XLoraModel``, which sets the attributes.

    Re-entrant: nothing of a call stays here, so several threads may call at once.
    """

    # Any: what transformers declares on its models hides their methods from a type checker.
    base_model: Any
    # A model has one of the two routers.
    classifier: XLoraClassifier
    gates: LayerGates
    active_scalings: ActiveScalings
    _layers: dict[str, XLoraLayer]
    _head_is_adapted: bool
    _merged: bool

    @property
    def router(self) -> XLoraClassifier | LayerGates:
        """The module that makes router logits: ``classifier``, or ``gates``."""
        return self.gates if self.is_routed_per_layer else self.classifier

    @property
    def is_routed_per_layer(self) -> bool:
        """Whether every module has its own gate, and there is no scaling pass."""
        return self._config_xlora.router == "per_layer"

    @torch.no_grad()
    def read_router(self, *, knobs: RoutingKnobs | None = None, **inputs: Any) -> Tensor:
        """Returns the router logits of tokens, by whichever pass the router needs for them.

        Without gradient. ``main_pass(scalings=route(read_router(...)))`` is the routed model.

        Args:
            knobs: As for ``scaling_pass`` and ``gated_pass``.
            inputs: As for ``scaling_pass`` and ``gated_pass``; ``past_key_values`` is the cache
                of the pass: ``cache.scaling``, or ``cache.main`` of a per-layer router.

        Returns:
            ``[B, T, L, K]``, or ``[B, T, 1, K]`` when one set serves all modules.
        """
        if self.is_routed_per_layer:
            return self.gated_pass(knobs=knobs, **{"logits_to_keep": 1} | inputs).router_logits
        return self.scaling_pass(knobs=knobs, **inputs).router_logits

    @torch.no_grad()
    def scaling_pass(
        self, *, knobs: RoutingKnobs | None = None, with_lm_logits: bool = False, **inputs: Any
    ) -> ScalingPassOutput:
        """Runs the scaling pass and the classifier, without gradient.

        Args:
            knobs: Matter only for a non-zero ``scaling_pass_value``: PEFT applies top-k and
                global weight to that constant, too. Overrides are never applied to it: they
                concern the main pass, so what the router says does not depend on them.
            with_lm_logits: Also return the language model's logits of the last token. They are
                the base model's when ``scaling_pass_value`` is 0.
            inputs: ``input_ids`` ``[B, T]`` or ``inputs_embeds``, ``attention_mask``,
                ``position_ids``, ``past_key_values`` (one cache, ``cache.scaling``).

        Raises:
            ModelError: If the router is per layer, or after ``merge_and_unload``.
        """
        self._check_router(per_layer=False)
        hidden, lm_logits = self._scaling_hidden(knobs, inputs, with_lm_logits)
        return ScalingPassOutput(router_logits=self.classifier(hidden), lm_logits=lm_logits)

    @torch.no_grad()
    def _scaling_hidden(
        self, knobs: RoutingKnobs | None, inputs: dict[str, Any], with_lm_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        self._check_not_merged()
        inputs = {k: v for k, v in inputs.items() if v is not None and k not in HEAD_ARGUMENTS}
        inputs["return_dict"] = True
        backbone = self.base_model.base_model
        with self.active_scalings.hold(self.scaling_pass_scalings(knobs)):
            if not with_lm_logits and backbone is not self.base_model:
                hidden = backbone(**accepted(backbone, inputs)).last_hidden_state
                return hidden, None
            output = self.base_model(
                **accepted(self.base_model, inputs | {"logits_to_keep": 1}),
                output_hidden_states=True,
            )
            return output.hidden_states[-1], output.logits[:, -1:] if with_lm_logits else None

    def scaling_pass_scalings(self, knobs: RoutingKnobs | None = None) -> Tensor | None:
        """Returns what the adapters are held at in the scaling pass.

        Args:
            knobs: Top-k and global weight act on a non-zero ``scaling_pass_value``, as in PEFT.

        Returns:
            ``[1, 1, 1, K]``; None for a value of 0, which is the base model.
        """
        value = self._config_xlora.scaling_pass_value
        if value == 0:
            return None
        knobs = knobs or self.default_knobs
        constant = torch.full(
            (1, 1, 1, len(self.adapter_names)),
            value,
            dtype=self.classifier.dtype,
            device=next(self.classifier.parameters()).device,
        )
        return routing.effective_scalings(
            constant,
            top_k=knobs.top_k,
            enable_softmax_topk=self._config_xlora.enable_softmax_topk,
            global_weight=knobs.global_weight,
        )

    def route(self, router_logits: Tensor, knobs: RoutingKnobs | None = None) -> Tensor:
        """Returns the effective scalings ``[B, T, L or 1, K]`` of router logits."""
        return routing.route(
            router_logits,
            self._config_xlora,
            knobs or self.default_knobs,
            layer_names=self.lora_layer_names,
            adapter_names=self.adapter_names,
        )

    def main_pass(self, *, scalings: Tensor | None, **inputs: Any) -> Any:
        """Runs the base model with given effective scalings.

        Args:
            scalings: ``[B, T, L, K]``, where B, T and L may be 1 to serve all; or ``[K]`` or
                ``[L, K]`` for all tokens; None runs the base model without adapters.
            inputs: Arguments of the base model's forward; ``past_key_values`` is one cache,
                ``cache.main``.

        Returns:
            The base model's output.

        Raises:
            ModelError: If the scalings' shape does not fit, or after ``merge_and_unload``.
        """
        held = None
        if scalings is not None:
            held = TokenScalings(self._of_tokens(scalings, _tokens(inputs)), _text_mask(inputs))
        return self._run_base(held, inputs)

    def gated_pass(self, *, knobs: RoutingKnobs | None = None, **inputs: Any) -> GatedPassOutput:
        """Runs the base model, every adapted module mixed as its own gate says.

        Args:
            knobs: Of this call; None takes the model's.
            inputs: Arguments of the base model's forward; ``past_key_values`` is one cache,
                ``cache.main``.

        Returns:
            Output and router logits. The logits carry a gradient to the gates, but not where
            re-entrant gradient checkpointing ran the module.

        Raises:
            ModelError: If the router is not per layer, or after ``merge_and_unload``.
            ConfigError: If the knobs do not fit the model.
        """
        self._check_router(per_layer=True)
        held = GateScalings(
            self.gates,
            self._config_xlora,
            self.check_knobs(knobs or self.default_knobs),
            layer_names=self.lora_layer_names,
            adapter_names=self.adapter_names,
        )
        output = self._run_base(held, inputs)
        return GatedPassOutput(output=output, router_logits=held.router_logits(_tokens(inputs)))

    def _run_base(self, held: ModuleScalings | None, inputs: Mapping[str, Any]) -> Any:
        self._check_not_merged()
        inputs = {k: v for k, v in inputs.items() if v is not None} | {"return_dict": True}
        # An adapted head must see the tokens that the scalings are for; it is cut afterwards.
        kept = inputs.pop("logits_to_keep", 0) if self._head_is_adapted else 0
        with self._held(held):
            output = self.base_model(**accepted(self.base_model, inputs))
        if self._head_is_adapted:
            kept = kept if isinstance(kept, Tensor) else slice(-kept, None)
            output.logits = output.logits[:, kept]
        return output

    def _held(self, scalings: ModuleScalings | None) -> AbstractContextManager[None]:
        """Sets the scalings of the main pass, also for what checkpointing computes again."""
        if self.training and self.base_model.is_activation_checkpointing:
            carry_scalings_into_checkpoints(self.base_model, self.active_scalings)
        return self.active_scalings.hold(scalings)

    def _of_tokens(self, scalings: Tensor, tokens: Tensor | None) -> Tensor:
        """Returns scalings as ``[B, T, L or 1, K]``, or ``[1, 1, L or 1, K]`` for all tokens."""
        found = tuple(scalings.shape)
        # Images and sounds tell their number of tokens only inside the model.
        of_tokens: tuple[int, ...] = found[:2] if len(found) == 4 else (1, 1)
        if tokens is not None:
            of_tokens = tuple(tokens.shape[:2])
        expected = (*of_tokens, len(self._layers), len(self.adapter_names))
        if len(found) in (1, 2):
            scalings = scalings.reshape(1, 1, -1, found[-1])
        fits = scalings.ndim == 4 and all(
            size in (1, wanted)
            for size, wanted in zip(scalings.shape[:3], expected[:3], strict=True)
        )
        if not fits or found[-1] != expected[-1]:
            raise ModelError(f"scalings have shape {list(found)}, expected {list(expected)}")
        of_all_tokens = scalings.shape[:2].numel() == 1
        return scalings if of_all_tokens else scalings.expand(*expected[:2], -1, -1)

    def _log(self, router_logits: Tensor, knobs: RoutingKnobs, cache: RoutedCache | None) -> None:
        rows = self._logged_rows(router_logits, knobs)
        entry = LogEntry(rows, cache.logged if cache is not None else None)
        if cache is not None:
            cache.logged = entry
        self.scalings_log.add(entry)

    def _logged_rows(self, router_logits: Tensor, knobs: RoutingKnobs) -> Tensor:
        """Returns what the log keeps of router logits: scalings ``[B, T, L, K]``, as in PEFT."""
        return routing.scalings_from_logits(
            router_logits.detach(),
            enable_softmax=self._config_xlora.enable_softmax,
            temperature=knobs.temperature,
        ).expand(-1, -1, len(self._layers), -1)

    def _check_router(self, *, per_layer: bool) -> None:
        if self.is_routed_per_layer != per_layer:
            passes = {True: "gated_pass", False: "scaling_pass"}
            raise ModelError(
                f"this model's router is {self._config_xlora.router!r}, {passes[per_layer]} is for "
                "the other kind",
                hint=f"call {passes[not per_layer]}, or read_router for either kind",
            )

    def _check_not_merged(self) -> None:
        if self._merged:
            raise ModelError(
                "this XLoraModel was merged into its base model and has no experts any more",
                hint="use the model that merge_and_unload returned, or load a fresh one",
            )


def _tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns ``input_ids`` ``[B, T]`` or ``inputs_embeds`` ``[B, T, H]``, if there are any."""
    for name in ("input_ids", "inputs_embeds"):
        tokens = inputs.get(name)
        if isinstance(tokens, Tensor):
            return tokens
    return None


def _text_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns the attention mask ``[B, T]`` if it has one entry per token."""
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def accepted(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the inputs that a module's forward takes; ``generate`` offers more than some do."""
    parameters = _parameters(type(module).forward)
    optional = (
        "attention_mask",
        "logits_to_keep",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    )
    return {k: v for k, v in inputs.items() if k in parameters or k not in optional}


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
