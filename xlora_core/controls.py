"""The model's controls, under PEFT's names: defaults of the knobs, and the scalings log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.layers import ActiveScalings, XLoraLayer
from xlora_core.scalings_log import ScalingsLog
from xlora_core.steering import AdapterSteering


class XLoraControls(AdapterSteering):
    """Setters and log access of ``XLoraModel``.

    A setter changes the default that calls without knobs of their own run with, and the config
    that is saved. A call that brings ``RoutingKnobs`` is not affected.
    """

    _config_xlora: XLoraConfig
    _layers: dict[str, XLoraLayer]
    active_scalings: ActiveScalings
    adapter_names: list[str]
    scalings_log: ScalingsLog

    @property
    def lora_layers(self) -> list[XLoraLayer]:
        """The L adapted modules in order."""
        return list(self._layers.values())

    @property
    def config_xlora(self) -> XLoraConfig:
        """The X-LoRA config with every setter's change in it."""
        return self._config_xlora

    @property
    def default_knobs(self) -> RoutingKnobs:
        """The knobs of a call that brings none."""
        return RoutingKnobs.from_config(self._config_xlora)

    def get_latest_scalings(self) -> Tensor | None:
        """Returns ``[B, T, L, K]`` of the last forward call, cached tokens included.

        None before the first call, after one with the adapters off, and when the log was cleared.
        Before top-k and global weight, as PEFT logs them. With several threads the last call
        may be another thread's: ask ``scaling_pass`` for what belongs to one call.
        """
        return self.scalings_log.latest()

    def enable_scalings_logging(self) -> None:
        """Starts to keep the scalings of every forward call."""
        self.scalings_log.enabled = True

    def disable_scalings_logging(self) -> None:
        """Stops logging; what was logged stays."""
        self.scalings_log.enabled = False

    def clear_scalings_log(self) -> None:
        """Forgets what was logged, and the latest scalings."""
        self.scalings_log.clear()

    def get_scalings_log(self) -> list[Tensor]:
        """Returns one tensor ``[B, T, L, K]`` per forward call.

        A cached generation gives what PEFT's uncached one does: T grows by one a step.
        """
        return self.scalings_log.tensors()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Returns sequence length T -> (positions in the log, tensors ``[B, T, L, K]``)."""
        return self.scalings_log.bucketed()

    def _set(self, **changes: Any) -> None:
        self._config_xlora = replace(self._config_xlora, **changes)

    def set_topk_lora(self, value: int | None) -> None:
        """Keeps the k largest scalings per token and module; None keeps all.

        Raises:
            ConfigError: If ``value`` is outside 1..K; names K.
        """
        self._set(top_k_lora=value)

    def get_topk_lora(self) -> int | None:
        """Returns how many scalings per token and module are kept; None is all."""
        return self._config_xlora.top_k_lora

    def set_softmax(
        self, *, enable_softmax: bool | None = None, enable_softmax_topk: bool | None = None
    ) -> None:
        """Chooses the softmax: over all adapters, over those that top-k keeps, or none.

        Args:
            enable_softmax: Softmax of router logits / temperature; None leaves it as it is.
            enable_softmax_topk: Softmax of the kept router logits; None leaves it as it is.

        Raises:
            ConfigError: If both would be on.
        """
        changes = {"enable_softmax": enable_softmax, "enable_softmax_topk": enable_softmax_topk}
        self._set(**{name: value for name, value in changes.items() if value is not None})

    def set_global_scaling_weight(self, weight: float) -> None:
        """Sets the factor g on every scaling."""
        self._set(global_scaling_weight=weight)

    def get_global_scaling_weight(self) -> float:
        """Returns the factor g on every scaling."""
        return self._config_xlora.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Sets the adapters' constant in the scaling pass; None is 1/K."""
        self._set(scaling_pass_value=1 / len(self.adapter_names) if value is None else value)

    def set_softmax_temperature(self, temperature: float) -> None:
        """Sets the divisor of the router logits, > 0.

        Raises:
            ConfigError: If it is not finite and > 0.
        """
        self._set(softmax_temperature=temperature)

    def set_use_trainable_adapters(self, value: bool) -> None:
        """Lets the experts learn together with the router, or freezes them.

        Experts that learn are float32 at least, also under a narrower base model.
        """
        self._set(use_trainable_adapters=value)
        for layer in self.lora_layers:
            for parameter in layer.parameters(recurse=False):
                if value:
                    wide = torch.promote_types(parameter.dtype, torch.float32)
                    parameter.data = parameter.data.to(wide)
                parameter.requires_grad_(value)

    def get_use_trainable_adapters(self) -> bool:
        """Returns whether the experts learn together with the router."""
        return self._config_xlora.use_trainable_adapters

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Switches the adapters off for the length of a ``with`` block: the base model alone.

        In this thread only; what other threads run meanwhile is not affected. Nothing is logged.
        A cache filled inside the block cannot be gone on with outside, nor one of outside inside.
        """
        with self.active_scalings.disable():
            yield

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Returns how many parameters learn, and how many there are in all."""
        assert isinstance(self, nn.Module)  # the model this is mixed into
        counts = [(_n_weights(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, learns in counts if learns), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters learn, in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201  # that is what PEFT's method of this name is for
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )


def _n_weights(parameter: nn.Parameter) -> int:
    """Returns how many weights a parameter holds, packed or not.

    Source: PEFT 0.21.2, ``get_nb_trainable_parameters``.
    """
    packed = type(parameter).__name__ == "Params4bit"  # of bitsandbytes: two weights in a byte
    return parameter.numel() * (2 * parameter.element_size() if packed else 1)
