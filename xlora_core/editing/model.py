"""Editing methods of ``XLoraModel``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from xlora_core.adapters import LoraAdapter, read_adapter
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.config.overrides import renamed_overrides
from xlora_core.editing.guard import EditGuard
from xlora_core.editing.layers import Source, check_finite, put_in_place, rebuilt_layers
from xlora_core.editing.router import moved_gates, moved_head
from xlora_core.editing.rows import Newcomer, newcomer_for
from xlora_core.errors import AdapterError, ConfigError
from xlora_core.gates import LayerGates
from xlora_core.layers import XLoraLayer
from xlora_core.passes import XLoraPasses

if TYPE_CHECKING:
    from xlora_core.gate import Gate

DEFAULT_SHARE = 0.01
_NOBODY = Newcomer(follows=False, bias=0.0)


class XLoraEditing(XLoraPasses):
    """Adds, removes, renames and reorders adapters of ``XLoraModel``; the router's rows follow.

    Every pair of module and adapter that stays keeps its router logit. An edit is checked as a
    whole before anything changes, so one that fails leaves the model as it was. Every edit but a
    rename

    - makes new parameters of the experts and of the router's last layer: make the optimizer anew;
    - clears the scalings log, whose entries have one column per adapter of before;
    - ends the caches of before: going on with one raises ``ModelError``.

    Nobody may call the model in another thread meanwhile; one that an ``Engine`` runs refuses.
    """

    edit_guard: EditGuard
    _edition: int
    _adapter_configs: list[tuple[dict[str, Any], torch.dtype, set[str]]]

    # ---------------------------------------------------------------- the edits

    def add_adapter(
        self,
        name: str,
        adapter: str | Path | LoraAdapter,
        *,
        position: int | None = None,
        share: float = DEFAULT_SHARE,
    ) -> None:
        """Adds an adapter. It hardly acts at first: the router has yet to learn when to use it.

        Its router logit begins as the mean of the other adapters' in the module plus a constant,
        so that it takes at most ``share`` of any token's scalings there. Modules that no other
        adapter has weights in become adapted ones; the others are absent there.

        Args:
            name: Its name from here on.
            adapter: A LoRA folder, or an adapter that was read already.
            position: Its number among the adapters; None is the end.
            share: In (0, 1), the most it takes of a token's scalings at first. Without a softmax
                it is its scaling.

        Raises:
            AdapterError: If the name is taken, or the adapter cannot be read or does not fit.
            ConfigError: If the name is empty, or position or share is out of range.
            ModelError: If an engine runs the model, or after ``merge_and_unload``.
        """
        self._check_editable()
        n_before = len(self.adapter_names)
        position = n_before if position is None else position
        if isinstance(position, bool) or position not in range(n_before + 1):
            raise ConfigError(
                f"position must be None or a whole number from 0 to {n_before} (the number of "
                f"adapters), got {position!r}"
            )
        newcomer = newcomer_for(self._config_xlora, share, n_before)
        self._check_is_free(name)
        if isinstance(adapter, LoraAdapter):
            new, folder = replace(adapter, name=name), ""
            check_finite(new)
        elif isinstance(adapter, str | Path):
            new, folder = read_adapter(name, adapter), str(adapter)
        else:
            raise AdapterError(
                f"an adapter must be a LoRA folder or a LoraAdapter, got {type(adapter).__name__}",
                hint="train and save it first; then give the folder that holds adapter_config.json",
            )
        sources: list[Source] = list(range(n_before))
        sources.insert(position, new)
        self._rearrange(sources, newcomer, folder)

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter; the softmax shares its mass out among the others.

        Modules that only it had weights in become plain base layers again. Overrides of it go
        with it.

        Raises:
            AdapterError: If there is no such adapter, or no other.
            ConfigError: If ``top_k_lora``, or an override of another adapter, would not fit any
                more.
            ModelError: If an engine runs the model, or after ``merge_and_unload``.
        """
        self._check_editable()
        removed = self._number(name)
        if len(self.adapter_names) == 1:
            raise AdapterError(
                f"{name!r} is the only adapter, an X-LoRA model needs at least one",
                hint="add another one first; for the base model alone: model.disable_adapter()",
            )
        self._rearrange([k for k in range(len(self.adapter_names)) if k != removed])

    def rename_adapter(self, old: str, new: str) -> None:
        """Gives an adapter another name. Nothing else changes, in no parameter, log or cache.

        Raises:
            AdapterError: If there is no adapter ``old``, or ``new`` is taken.
            ConfigError: If ``new`` is empty.
            ModelError: If an engine runs the model, or after ``merge_and_unload``.
        """
        self._check_editable()
        renamed = self._number(old)
        if new == old:
            return
        self._check_is_free(new)
        names = [new if k == renamed else name for k, name in enumerate(self.adapter_names)]
        self._config_xlora = self._config_with(names, self.adapter_names)
        self.adapter_names = names

    def reorder_adapters(self, names: Sequence[str]) -> None:
        """Puts the adapters in another order; each keeps its logits, so the outputs stay.

        Args:
            names: All adapters' names in the new order.

        Raises:
            AdapterError: If they are not the names of all adapters, once each.
            ModelError: If an engine runs the model, or after ``merge_and_unload``.
        """
        self._check_editable()
        self._check_names_all(names)
        if list(names) != self.adapter_names:
            self._rearrange([self.adapter_names.index(name) for name in names])

    # ---------------------------------------------------------------- PEFT's names

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter, under PEFT's name for it; see ``remove_adapter``."""
        self.remove_adapter(adapter_name)

    def load_adapter(self, folder: str | Path, adapter_name: str) -> None:
        """Adds an adapter, with PEFT's order of arguments; see ``add_adapter``."""
        self.add_adapter(adapter_name, folder)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Accepts what is the case already: all adapters are active, in whatever order.

        In PEFT this chooses the active adapters, and an X-LoRA's router goes on to drive them by
        position: a subset, or another order, gives them each other's scalings. Here a scaling
        belongs to a name, and a choice has methods of its own.

        Args:
            adapter_name: The names of all adapters.

        Raises:
            AdapterError: For anything but all names.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        try:
            self._check_names_all(names)
        except AdapterError as error:
            raise AdapterError(
                f"the adapters of an X-LoRA model are active together, a choice of them cannot be "
                f"set: {error.message}",
                hint="to switch one off: model.mute_adapter(name); to do without it for good: "
                "model.remove_adapter(name); to change the order: model.reorder_adapters(names)",
            ) from None

    # ---------------------------------------------------------------- what they share

    def _check_editable(self) -> None:
        self._check_not_merged()
        self.edit_guard.check()

    def _number(self, name: str) -> int:
        if name not in self.adapter_names:
            raise AdapterError(f"there is no adapter {name!r}", hint=self._hint_names())
        return self.adapter_names.index(name)

    def _hint_names(self) -> str:
        return f"the adapters are {', '.join(self.adapter_names)}"

    def _check_is_free(self, name: str) -> None:
        if name in self.adapter_names:
            raise AdapterError(
                f"there is an adapter {name!r} already",
                hint="choose another name, or rename or remove that one first",
            )

    def _check_names_all(self, names: Sequence[str]) -> None:
        if isinstance(names, str):
            names = [names]
        faults = [f"there is no adapter {n!r}" for n in names if n not in self.adapter_names]
        faults += [f"{n!r} is missing" for n in self.adapter_names if n not in names]
        faults += [f"{n!r} comes {count} times" for n, count in Counter(names).items() if count > 1]
        if faults:
            raise AdapterError(
                f"all adapters must be named, once each: {', '.join(faults)}",
                hint=self._hint_names(),
            )

    def _config_with(
        self, names: Sequence[str], old_names: Sequence[str | None], folder: str = ""
    ) -> XLoraConfig:
        """Returns the config for other adapters.

        Args:
            names: Of all adapters from now on, in order.
            old_names: Of each of them before; None for one that is new.
            folder: Of a new one; empty for one that came from no folder.

        Raises:
            ConfigError: If a name is empty, or ``top_k_lora`` is larger than the number of
                adapters.
        """
        config = self._config_xlora
        if config.top_k_lora is not None and config.top_k_lora > len(names):
            raise ConfigError(
                f"top_k_lora is {config.top_k_lora}, but only {len(names)} adapters would be left",
                hint=f"lower it first: model.set_topk_lora({len(names)}), or None for all",
            )
        folders = [folder if old is None else config.adapters.get(old, "") for old in old_names]
        renamed = {old: new for old, new in zip(old_names, names, strict=True) if old is not None}
        return replace(
            config,
            adapters=dict(zip(names, folders, strict=True)),
            adapter_overrides=renamed_overrides(tuple(config.adapter_overrides), renamed),
        )

    def _rearrange(
        self,
        sources: Sequence[Source],
        newcomer: Newcomer = _NOBODY,
        folder: str = "",
    ) -> None:
        """Makes the model one of other adapters.

        Args:
            sources: Where each adapter comes from, in the new order.
            newcomer: How the router's rows of a new adapter begin.
            folder: Where a new adapter was read.
        """
        old_names = [None if isinstance(s, LoraAdapter) else self.adapter_names[s] for s in sources]
        names = [s.name if isinstance(s, LoraAdapter) else self.adapter_names[s] for s in sources]
        config = self._config_with(names, old_names, folder)
        layers = rebuilt_layers(
            self.base_model,
            self._layers,
            sources,
            active=self.active_scalings,
            trainable=config.use_trainable_adapters,
        )
        self._check_overrides(config, names, list(layers))
        router = self._edited_router(sources, layers, newcomer)
        # From here on nothing fails: everything new exists, and is put in the place of the old.
        put_in_place(self.base_model, self._layers, layers)
        if isinstance(router, LayerGates):
            self.gates = router
        else:
            self.classifier.layers[self.classifier.head] = router
            self.classifier.n_adapters = len(names)
            self.classifier.n_routed_layers = router.out_features // len(names)
        self._adapter_configs = [
            (dict(s.config), s.dtype, set(s.saved_modules))
            if isinstance(s, LoraAdapter)
            else self._adapter_configs[s]
            for s in sources
        ]
        self._config_xlora = config
        self._layers = layers
        self.adapter_names = names
        self.lora_layer_names = list(layers)
        self._head_is_adapted = isinstance(self.base_model.get_output_embeddings(), XLoraLayer)
        self._edition += 1
        self.clear_scalings_log()

    def _check_overrides(
        self, config: XLoraConfig, names: Sequence[str], layer_names: Sequence[str]
    ) -> None:
        try:
            RoutingKnobs.from_config(config).check_names(names, layer_names)
        except ConfigError as error:
            raise ConfigError(
                error.faults,
                hint="these modules would carry no experts any more; take the override back first: "
                "model.clear_adapter_overrides(name)",
            ) from None

    def _edited_router(
        self, sources: Sequence[Source], layers: Mapping[str, XLoraLayer], newcomer: Newcomer
    ) -> nn.Linear | LayerGates:
        """Returns the last layer of the classifier, or the gates, with rows at their new places."""
        adapters = [None if isinstance(source, LoraAdapter) else source for source in sources]
        if self.is_routed_per_layer:
            gates = dict(zip(self.lora_layer_names, self.gates, strict=True))
            return moved_gates(cast("dict[str, Gate]", gates), layers, adapters, newcomer)
        modules: list[int | None] = [0]
        if self._config_xlora.layerwise_scalings:
            before = {path: number for number, path in enumerate(self.lora_layer_names)}
            modules = [before.get(path) for path in layers]
        return moved_head(self.classifier, modules, adapters, newcomer)
