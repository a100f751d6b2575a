"""The X-LoRA model: scaling pass, classifier, main pass, over any Hugging Face model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from xlora_core.adapters import LoraAdapter, exact_dtype, read_adapter
from xlora_core.checkpoint import (
    Checkpoint,
    base_identity,
    check_fits,
    read_checkpoint,
    write_checkpoint,
)
from xlora_core.classifier import XLoraClassifier
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.editing import EditGuard, XLoraEditing
from xlora_core.encoder_decoder import XLoraEncoderDecoder, check_base
from xlora_core.errors import AdapterError, CheckpointError, ConfigError, ModelError
from xlora_core.gates import LayerGates
from xlora_core.generation import XLoraGeneration
from xlora_core.gradient_checkpointing import carry_scalings_into_checkpoints
from xlora_core.kv_cache import DualCache, RoutedCache
from xlora_core.layers import ActiveScalings, XLoraLayer, compute_device
from xlora_core.replacing import replace_adapted_modules
from xlora_core.saved_modules import as_saved_module
from xlora_core.scalings_log import ScalingsLog
from xlora_core.unloading import XLoraUnloading

_logger = logging.getLogger(__name__)


class XLoraModel(XLoraGeneration, XLoraEncoderDecoder, XLoraEditing, XLoraUnloading):
    """A frozen model, K LoRA experts on it, and the router that mixes them.

    With a classifier ``forward`` runs two passes: the scaling pass (adapters at
    ``scaling_pass_value``) gives the classifier a hidden state per token, the main pass runs with
    the scalings it returns. With ``router="per_layer"`` there is the main pass only, and a gate in
    every adapted module. Passes are re-entrant: nothing of a call stays on the model but the log,
    so several threads may call it at once.

    Make one with ``from_base`` or ``from_pretrained``. Attributes that the class does not have
    itself (``dtype``, ``generation_config``, ...) are the base model's.

    Args:
        base_model: A Hugging Face model; its adapted modules are replaced in place.
        config: The X-LoRA config.
        adapters: The experts in the router's output order.

    Source: arXiv 2402.07148; numbers as PEFT 0.21.2.
    """

    def __init__(
        self, base_model: PreTrainedModel, config: XLoraConfig, adapters: Sequence[LoraAdapter]
    ) -> None:
        super().__init__()
        if not adapters:
            raise AdapterError(
                "an X-LoRA model needs at least one adapter, got none",
                hint='name them in the config: XLoraConfig(adapters={"math": "path/to/lora"})',
            )
        if not isinstance(base_model, PreTrainedModel):
            raise ModelError(
                f"the base model is a {type(base_model).__name__}, expected one of transformers'",
                hint="load it with AutoModelForCausalLM, or another class of that family",
            )
        self.adapter_names = [adapter.name for adapter in adapters]
        if len(set(self.adapter_names)) < len(adapters):
            raise AdapterError(
                f"adapter names must differ, got {', '.join(map(repr, self.adapter_names))}"
            )
        self._config_xlora = _with_hidden_size(config, base_model)
        check_base(base_model, self._config_xlora)
        # Before anything is replaced: a model that cannot be made leaves its base as it was.
        self.default_knobs.check_names(
            self.adapter_names, sorted({path for adapter in adapters for path in adapter.paths})
        )
        frozen = list(base_model.parameters())
        self.active_scalings = ActiveScalings()
        self._layers = replace_adapted_modules(
            base_model, adapters, self.active_scalings, trainable=config.use_trainable_adapters
        )
        for parameter in frozen:
            parameter.requires_grad_(False)
        self.base_model = base_model
        self._head_is_adapted = isinstance(base_model.get_output_embeddings(), XLoraLayer)
        self.lora_layer_names = list(self._layers)
        self._adapter_configs = [(dict(a.config), a.dtype, set(a.saved_modules)) for a in adapters]
        dtype = torch.promote_types(base_model.dtype, torch.float32)
        if self.is_routed_per_layer:
            self.gates = LayerGates(self.lora_layers, len(adapters), dtype=dtype)
        else:
            self.classifier = XLoraClassifier(
                self._config_xlora,
                n_lora_layers=len(self._layers),
                n_adapters=len(adapters),
                dtype=dtype,
                device=self.device,
            )
        self.scalings_log = ScalingsLog()
        self._merged = False
        self._set_up_encoder_decoder()
        self.edit_guard = EditGuard()
        self._edition = 0
        self.train(base_model.training)

    # ---------------------------------------------------------------- making and keeping one

    @classmethod
    def from_base(cls, hf_model: PreTrainedModel, config: XLoraConfig) -> XLoraModel:
        """Returns a model with the adapters of ``config`` and a freshly initialised classifier.

        Raises:
            AdapterError: If there is no adapter, or one cannot be read or does not fit.
            ConfigError: If ``hidden_size`` is not the model's.
        """
        adapters = [read_adapter(name, path) for name, path in config.adapters.items()]
        return cls(hf_model, config, adapters)

    @classmethod
    def from_pretrained(
        cls,
        hf_model: PreTrainedModel,
        folder: str | Path,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        ordering: str | Path | None = None,
    ) -> XLoraModel:
        """Returns the model of a checkpoint folder.

        Args:
            hf_model: The base model the checkpoint was trained on.
            folder: As ``save_pretrained``, PEFT or the original ``xlora`` package wrote it.
            adapters: Adapter name -> another folder to read that expert from.
            ordering: mistral.rs's ordering file, for an original checkpoint whose classifier
                lists the modules in another order than the base model.

        Raises:
            CheckpointError: If the folder is damaged, or belongs to another base model.
            AdapterError: If an expert cannot be read or does not fit.
        """
        checkpoint = read_checkpoint(folder, adapters, ordering=ordering)
        checkpoint = check_fits(folder, checkpoint, hf_model)
        for note in checkpoint.notes:
            _logger.warning("%s: %s", folder, note)
        model = cls(hf_model, checkpoint.config, checkpoint.adapters)
        model.router.load_state_dict(
            {name.removeprefix("gates."): t for name, t in checkpoint.classifier.items()}
        )
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        bundle: bool = True,
        relative: bool = False,
        safe_serialization: bool = True,
    ) -> None:
        """Writes a checkpoint: router, experts, names, module order.

        Args:
            folder: A new or empty folder, or a checkpoint to replace.
            bundle: Copy the experts into it, so that it needs nothing else. False stores only
                where they were read, and a hash of each.
            relative: Without ``bundle``: store where they are seen from the checkpoint, so that
                it and they can be moved together.
            safe_serialization: PEFT's argument; False would be a pickle and is refused.

        Raises:
            CheckpointError: If the folder holds something else, or cannot be written; if an
                expert to be referenced was trained, or changed on disk, since it was read; or
                if a pickle is asked for.
        """
        self._check_not_merged()
        if not safe_serialization:
            raise CheckpointError(
                "safe_serialization=False asks for a pickle; pickles can run code when they are "
                "read and are never written",
                hint="leave it out: checkpoints are safetensors files",
            )
        write_checkpoint(
            folder,
            Checkpoint(
                config=self._config_xlora,
                classifier=self.router.state_dict(
                    prefix="gates." if self.is_routed_per_layer else ""
                ),
                adapters=self._current_adapters(),
                layer_names=self.lora_layer_names,
                base=base_identity(self.base_model.config),
            ),
            bundle=bundle,
            relative=relative,
        )

    def _current_adapters(self) -> list[LoraAdapter]:
        """Returns the experts as they are now, trained further or not."""
        experts = {path: layer.experts() for path, layer in self._layers.items()}
        trained = self._config_xlora.use_trainable_adapters
        current = []
        for k, name in enumerate(self.adapter_names):
            config, dtype, saved = self._adapter_configs[k]
            modules = {p: e[k] for p, e in experts.items() if k in e and p not in saved}
            adapter = LoraAdapter(
                name=name,
                config=config,
                modules=modules,
                dtype=exact_dtype(modules.values(), torch.float32 if trained else dtype),
                saved_modules={path: as_saved_module(self._layers[path], k) for path in saved},
            )
            current.append(adapter)
        return current

    # ---------------------------------------------------------------- what it is

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            if name in ("classifier", "gates"):  # some base models have a classifier of their own
                raise AttributeError(
                    f"this X-LoRA model has no {name}, its router is "
                    f"{self._config_xlora.router!r}; model.router is whichever it has"
                ) from None
            return getattr(self.base_model, name)

    @property
    def device(self) -> torch.device:
        """Where the model expects its inputs; also for weights that rest elsewhere."""
        return compute_device(self.base_model.get_input_embeddings())

    @property
    def present(self) -> Tensor:
        """``[L, K]`` bool: whether an adapter has weights in a module."""
        present = torch.zeros(len(self._layers), len(self.adapter_names), dtype=torch.bool)
        for index, layer in enumerate(self._layers.values()):
            present[index, layer.adapter_indices] = True
        return present

    @property
    def context_length(self) -> int:
        """Most tokens the base model can read, prompt and answer together."""
        text = self.base_model.config.get_text_config()
        return int(getattr(text, "max_position_embeddings", None) or 2**31)

    # ---------------------------------------------------------------- both passes

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RoutedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        *,
        knobs: RoutingKnobs | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Runs both passes, or the one that a per-layer router needs.

        Args:
            input_ids: ``[B, T]`` int64; or ``inputs_embeds`` ``[B, T, H]``.
            attention_mask: ``[B, T_past + T]``, 0 for padding.
            position_ids: ``[B, T]``.
            past_key_values: From ``new_cache`` or an earlier output.
            inputs_embeds: Instead of ``input_ids``.
            labels: ``[B, T]``, -100 where no loss is wanted.
            use_cache: Return the caches; None follows the base model's config.
            logits_to_keep: As in Hugging Face models.
            knobs: Knobs of this call alone; None takes the model's.
            return_dict: False returns a tuple.
            kwargs: Further arguments of the base model's forward. An encoder-decoder's
                ``encoder_outputs`` come from ``encode``.

        Returns:
            The base model's output; ``past_key_values`` is one of ``new_cache``.

        Raises:
            ModelError: For another kind of cache, one whose last call failed half way or that was
                filled under other adapters or none, caching under gradient checkpointing in
                training, or after ``merge_and_unload``.
            ConfigError: If the knobs do not fit the model, see ``check_knobs``.
        """
        if past_key_values is not None:
            self.check_cache(past_key_values)
        knobs = self.check_knobs(knobs or self.default_knobs)
        if use_cache is None:
            # BART warns of a cache beside labels: who gives them wants a loss, not the next token.
            for_loss = self.training or (self.is_encoder_decoder and labels is not None)
            use_cache = not for_loss and self._caches_by_default()
        if use_cache and self.training and self.base_model.is_activation_checkpointing:
            # The layers would drop the cache, and the next token see none of the text before it.
            raise ModelError(
                "gradient checkpointing in training mode keeps no cache",
                hint="call model.eval() before generating, or pass use_cache=False",
            )
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        disabled = self.active_scalings.disabled
        if past_key_values is not None:
            past_key_values.check_goes_on(None if disabled else self._edition)
        inputs = kwargs | {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
        }
        inputs = self._with_source(inputs, labels, knobs)
        main = inputs | {
            "past_key_values": past_key_values.main if past_key_values is not None else None,
            "labels": labels,
            "logits_to_keep": logits_to_keep,
        }
        if disabled:
            self.scalings_log.add_nothing()
            output = self.main_pass(scalings=None, **main)
        elif self.is_routed_per_layer:
            with nullcontext() if past_key_values is None else past_key_values.reading():
                gated = self.gated_pass(knobs=knobs, **main)
            self._log(gated.router_logits, knobs, past_key_values)
            output = gated.output
        else:
            cache = past_key_values.scaling if isinstance(past_key_values, DualCache) else None
            hidden, _ = self._scaling_hidden(knobs, inputs | {"past_key_values": cache}, False)
            # Outside the scaling pass's no_grad: this is where the classifier learns.
            router_logits = self.classifier(hidden.detach())
            self._log(router_logits, knobs, past_key_values)
            output = self.main_pass(scalings=self.route(router_logits, knobs), **main)
        if past_key_values is not None:
            output.past_key_values = past_key_values
        return output.to_tuple() if return_dict is False else output

    def _caches_by_default(self) -> bool:
        return self.can_generate() and bool(getattr(self.base_model.config, "use_cache", False))

    # ---------------------------------------------------------------- training

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turns gradient checkpointing on; unlike in PEFT, the classifier still learns."""
        self.base_model.activation_checkpointing_enable(*args, **kwargs)
        carry_scalings_into_checkpoints(self.base_model, self.active_scalings)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Turns gradient checkpointing on, under transformers' older name for it."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)


def _with_hidden_size(config: XLoraConfig, base_model: PreTrainedModel) -> XLoraConfig:
    text = base_model.config.get_text_config()
    # The last hidden state; in some OPT models it is narrower than the others.
    actual = getattr(text, "word_embed_proj_dim", None) or getattr(text, "hidden_size", None)
    if not isinstance(actual, int):
        raise ModelError(
            f"the config of {type(base_model).__name__} names no hidden_size",
            hint="X-LoRA needs a transformer with one hidden size",
        )
    if config.hidden_size is None:
        return replace(config, hidden_size=actual)
    if config.hidden_size != actual:
        raise ConfigError(
            f"hidden_size is {config.hidden_size}, {type(base_model).__name__} has {actual}",
            hint="leave hidden_size out to take it from the model",
        )
    return config
