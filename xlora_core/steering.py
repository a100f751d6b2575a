"""Steering single adapters: the setters of ``XLoraModel`` that pin, mute and rescale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xlora_core.config import AdapterOverride, RoutingKnobs, XLoraConfig
from xlora_core.config.overrides import with_override
from xlora_core.errors import ConfigError


class AdapterSteering:
    """Overrides of single adapters, for every call that brings no knobs of its own.

    Like the other setters these change the config that is saved. See ``AdapterOverride`` for
    what an override does and how modules are named.
    """

    _config_xlora: XLoraConfig
    adapter_names: list[str]
    lora_layer_names: list[str]

    def check_knobs(self, knobs: RoutingKnobs) -> RoutingKnobs:
        """Returns the knobs if they fit this model.

        Raises:
            ConfigError: If ``top_k`` is larger than the number of adapters (names both), or an
                override names an adapter or modules that the model does not have.
        """
        return knobs.check_names(self.adapter_names, self.lora_layer_names)

    def pin_adapter(
        self, name: str, value: float, modules: str | Sequence[str] | None = None
    ) -> None:
        """Holds an adapter's scaling at a value, whatever the router and top-k say.

        Args:
            name: The adapter.
            value: Its scaling, before the global weight.
            modules: Module paths or patterns such as ``"*.q_proj"``; None: all modules.

        Raises:
            ConfigError: For an unknown adapter, a pattern that no adapted module matches, or a
                value that is not finite.
        """
        self._override(AdapterOverride.pin(name, value, modules))

    def mute_adapter(self, name: str, modules: str | Sequence[str] | None = None) -> None:
        """Switches an adapter off; the others keep their scalings.

        Args:
            name: The adapter.
            modules: As in ``pin_adapter``.

        Raises:
            ConfigError: As ``pin_adapter``.
        """
        self._override(AdapterOverride.mute(name, modules))

    def rescale_adapter(
        self, name: str, factor: float, modules: str | Sequence[str] | None = None
    ) -> None:
        """Multiplies an adapter's scalings by a factor; the others keep theirs.

        Args:
            name: The adapter.
            factor: 1 changes nothing.
            modules: As in ``pin_adapter``.

        Raises:
            ConfigError: As ``pin_adapter``.
        """
        self._override(AdapterOverride.scale(name, factor, modules))

    def clear_adapter_overrides(self, name: str | None = None) -> None:
        """Gives an adapter back to the router; None: all adapters.

        Raises:
            ConfigError: For an unknown adapter.
        """
        if name is not None and name not in self.adapter_names:
            raise ConfigError(
                f"there is no adapter {name!r} in this model",
                hint=f"its adapters are {', '.join(self.adapter_names)}",
            )
        kept = [o for o in self.get_adapter_overrides() if name is not None and o.adapter != name]
        self._config_xlora = replace(self._config_xlora, adapter_overrides=kept)

    def get_adapter_overrides(self) -> tuple[AdapterOverride, ...]:
        """Returns the overrides; of two for the same adapter and module the later one holds."""
        return tuple(self._config_xlora.adapter_overrides)

    def _override(self, override: AdapterOverride) -> None:
        overrides = with_override(self.get_adapter_overrides(), override)
        self.check_knobs(RoutingKnobs(overrides=[override]))
        self._config_xlora = replace(self._config_xlora, adapter_overrides=overrides)
