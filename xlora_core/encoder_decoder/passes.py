"""Scaling pass and main pass over an encoder-decoder, each side with its own scalings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from xlora_core.config import RoutingKnobs
from xlora_core.encoder_decoder.base import (
    has_target,
    is_encoder_decoder,
    of_encoder,
    run_encoder,
    run_without_head,
)
from xlora_core.encoder_decoder.output import XLoraEncoderOutput
from xlora_core.encoder_decoder.sides import DecoderSides, TwoSidedScalings, find_sides
from xlora_core.errors import ModelError
from xlora_core.layers import ModuleScalings, TokenScalings
from xlora_core.passes import HEAD_ARGUMENTS, ScalingPassOutput, XLoraPasses, accepted
from xlora_core.scalings_log import LogEntry, ScalingsLog


class XLoraEncoderDecoder(XLoraPasses):
    """What ``XLoraModel`` does when its base model is an encoder-decoder.

    The source is encoded first, by both passes; the target is decoded on what came out. With a
    decoder-only base model nothing here has an effect.
    """

    is_encoder_decoder: bool
    encoder_scalings_log: ScalingsLog
    _edition: int
    _sides: DecoderSides | None

    def _set_up_encoder_decoder(self) -> None:
        """Looks at the base model, once its modules are replaced.

        Raises:
            ModelError: If the decoder cannot be run on an encoder's output; then the base model
                has its own modules back.
        """
        self.encoder_scalings_log = ScalingsLog()
        self.is_encoder_decoder = is_encoder_decoder(self.base_model)
        self._sides = None
        if not self.is_encoder_decoder:
            return
        try:
            self._decoder_sides()
        except ModelError:
            for path, layer in self._layers.items():
                self.base_model.set_submodule(path, layer.base_layer)
            raise

    def _decoder_sides(self) -> DecoderSides:
        """Returns the side of every adapted module, found anew where modules were replaced."""
        sides = self._sides
        if sides is None or sides.layers != self._layers:
            self._sides = sides = find_sides(self.base_model, self._layers, self.active_scalings)
        return sides

    # ---------------------------------------------------------------- the log

    def get_latest_encoder_scalings(self) -> Tensor | None:
        """Returns ``[B, S, L, K]`` of the last source that was encoded, or None.

        As ``get_latest_scalings`` has them, which are the target's. A generation encodes its
        source once, before the rows are repeated for beams.
        """
        return self.encoder_scalings_log.latest()

    def get_encoder_scalings_log(self) -> list[Tensor]:
        """Returns one tensor ``[B, S, L, K]`` per source encoded while logging was enabled."""
        return self.encoder_scalings_log.tensors()

    def enable_scalings_logging(self) -> None:
        """Starts to keep the scalings of every forward call, and of every source."""
        super().enable_scalings_logging()
        self.encoder_scalings_log.enabled = True

    def disable_scalings_logging(self) -> None:
        """Stops logging; what was logged stays."""
        super().disable_scalings_logging()
        self.encoder_scalings_log.enabled = False

    def clear_scalings_log(self) -> None:
        """Forgets what was logged, and the latest scalings of both sides."""
        super().clear_scalings_log()
        self.encoder_scalings_log.clear()

    # ---------------------------------------------------------------- the source

    def get_encoder(self, modality: str | None = None) -> Any:
        """Returns the encoder as Hugging Face calls it: both passes, with routed scalings."""
        if not self.is_encoder_decoder or modality is not None:
            return self.base_model.get_encoder(modality=modality)
        return _TwoPassEncoder(self)

    def encode(self, *, knobs: RoutingKnobs | None = None, **inputs: Any) -> XLoraEncoderOutput:
        """Reads a source text with both passes.

        Give the result to ``forward`` or ``generate`` as ``encoder_outputs``, with the same
        ``attention_mask``; a plain encoder's output lacks what the scaling pass needs.

        Args:
            knobs: Knobs for the source's tokens; None takes the model's.
            inputs: ``input_ids`` ``[B, S]`` or ``inputs_embeds`` ``[B, S, H]``,
                ``attention_mask`` ``[B, S]``; further arguments of the base model's encoder.

        Raises:
            ModelError: If the base model is no encoder-decoder, or after ``merge_and_unload``.
            ConfigError: If the knobs do not fit the model, see ``check_knobs``.
        """
        self._check_not_merged()
        if not self.is_encoder_decoder:
            raise ModelError(
                f"{type(self.base_model).__name__} is no encoder-decoder, it has no source to "
                "encode",
                hint="call the model itself",
            )
        if self.active_scalings.disabled:
            self.encoder_scalings_log.add_nothing()
            return XLoraEncoderOutput(**self._encode(inputs, None))
        knobs = self.check_knobs(knobs or self.default_knobs)
        hidden = self._scaling_source(knobs, inputs)
        # Outside the scaling pass's no_grad: this is where the classifier learns.
        router_logits = self.classifier(hidden.detach())
        self.encoder_scalings_log.add(LogEntry(self._logged_rows(router_logits, knobs)))
        scalings = self.route(router_logits, knobs)
        return XLoraEncoderOutput(
            **self._encode(inputs, TokenScalings(scalings, inputs.get("attention_mask"))),
            scaling_hidden_state=hidden,
            router_logits=router_logits,
            scalings=scalings,
            edition=self._edition,
        )

    def _encode(self, inputs: Mapping[str, Any], scalings: ModuleScalings | None) -> dict[str, Any]:
        """Returns the encoder's output under given scalings, field by field."""
        with self._held(scalings):
            output = run_encoder(self.base_model, inputs)
        fields = ("last_hidden_state", "hidden_states", "attentions")
        return {name: getattr(output, name, None) for name in fields}

    @torch.no_grad()
    def _scaling_source(self, knobs: RoutingKnobs | None, inputs: Mapping[str, Any]) -> Tensor:
        """Returns the encoder's last hidden state ``[B, S, H]`` in the scaling pass."""
        with self.active_scalings.hold(self.scaling_pass_scalings(knobs)):
            hidden: Tensor = run_encoder(
                self.base_model, {k: v for k, v in inputs.items() if k not in HEAD_ARGUMENTS}
            ).last_hidden_state
        return hidden

    # ---------------------------------------------------------------- source and target

    def _with_source(
        self, inputs: dict[str, Any], labels: Tensor | None, knobs: RoutingKnobs
    ) -> dict[str, Any]:
        """Returns a forward call's inputs with the decoder's own, and the source encoded."""
        if not self.is_encoder_decoder:
            return inputs
        inputs = self._with_decoder_inputs(inputs, labels)
        source = inputs.get("encoder_outputs")
        if source is None:
            source = self.encode(knobs=knobs, **of_encoder(inputs))
        self._check_source(source)
        return inputs | {"encoder_outputs": source}

    def _with_decoder_inputs(
        self, inputs: Mapping[str, Any], labels: Tensor | None
    ) -> dict[str, Any]:
        """Returns the inputs with the decoder's, which the base model makes of the labels."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if labels is None or has_target(inputs):
            return inputs
        shift = getattr(self.base_model, "prepare_decoder_input_ids_from_labels", None)
        # Some models do it in their forward alone, the scaling pass then needs the labels too.
        made = {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}
        return inputs | made

    def _check_source(self, source: object) -> None:
        if not isinstance(source, XLoraEncoderOutput):
            raise ModelError(
                f"encoder_outputs must be an XLoraEncoderOutput, got {type(source).__name__}",
                hint="make it with model.encode or model.get_encoder(), which run both passes",
            )
        if (source.scalings is None) != self.active_scalings.disabled:
            then, now = ("off", "on") if source.scalings is None else ("on", "off")
            raise ModelError(
                f"encoder_outputs were made with the adapters switched {then}, now they are {now}",
                hint="encode the source again",
            )
        if source.edition not in (None, self._edition):
            raise ModelError(
                "the model's adapters were edited since encoder_outputs were made",
                hint="encode the source again",
            )

    @torch.no_grad()
    def _scaling_hidden(
        self, knobs: RoutingKnobs | None, inputs: dict[str, Any], with_lm_logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        if not self.is_encoder_decoder:
            return super()._scaling_hidden(knobs, inputs, with_lm_logits)
        self._check_not_merged()
        source = inputs["encoder_outputs"].scaling_hidden_state
        with_target = has_target(inputs)
        dropped = HEAD_ARGUMENTS if with_target else HEAD_ARGUMENTS - {"labels"}
        inputs = {k: v for k, v in inputs.items() if v is not None and k not in dropped} | {
            "encoder_outputs": BaseModelOutput(last_hidden_state=source),
            "return_dict": True,
        }
        with self.active_scalings.hold(self.scaling_pass_scalings(knobs)):
            # Without the decoder's inputs only the whole model knows how to make them.
            if with_target and not with_lm_logits:
                headless = run_without_head(self.base_model, inputs)
                if headless is not None:
                    return headless.last_hidden_state, None
            output = self.base_model(**accepted(self.base_model, inputs), output_hidden_states=True)
        lm_logits = output.logits[:, -1:] if with_lm_logits else None
        return output.decoder_hidden_states[-1], lm_logits

    # ---------------------------------------------------------------- each pass on its own

    @torch.no_grad()
    def scaling_pass(
        self, *, knobs: RoutingKnobs | None = None, with_lm_logits: bool = False, **inputs: Any
    ) -> ScalingPassOutput:
        """Runs the scaling pass and the classifier, without gradient.

        With an encoder-decoder ``router_logits`` are the target's, and
        ``encoder_router_logits`` the source's. All else is as in ``XLoraPasses.scaling_pass``.

        Args:
            knobs: As there.
            with_lm_logits: As there.
            inputs: As there; an encoder-decoder's as ``forward`` has them, ``labels`` included.
        """
        if not self.is_encoder_decoder:
            return super().scaling_pass(knobs=knobs, with_lm_logits=with_lm_logits, **inputs)
        self._check_not_merged()
        inputs = self._with_decoder_inputs(inputs, inputs.get("labels"))
        source = inputs.get("encoder_outputs")
        if source is None:
            hidden = self._scaling_source(knobs, of_encoder(inputs))
            source = XLoraEncoderOutput(scaling_hidden_state=hidden)
        else:
            self._check_source(source)
        result = super().scaling_pass(
            knobs=knobs, with_lm_logits=with_lm_logits, **inputs | {"encoder_outputs": source}
        )
        logits = self.classifier(source.scaling_hidden_state)
        return replace(result, encoder_router_logits=logits)

    # Any: arguments often come as one dict of many types.
    def main_pass(
        self, *, scalings: Tensor | None, encoder_scalings: Any = None, **inputs: Any
    ) -> Any:
        """Runs the base model with given effective scalings.

        Args:
            scalings: As in ``XLoraPasses.main_pass``; an encoder-decoder's are the target's.
                None runs it without adapters on either side.
            encoder_scalings: For encoder-decoders: the source's, ``[B, S, L, K]``, or fewer
                dimensions as for ``scalings``. None takes those of ``encoder_outputs``, or else
                ``scalings``, if those are the same for all tokens.
            inputs: Arguments of the base model's forward.

        Raises:
            ModelError: If the scalings' shape does not fit, those of the source are missing, or
                after ``merge_and_unload``.
        """
        if not self.is_encoder_decoder:
            return super().main_pass(scalings=scalings, **inputs)
        self._check_not_merged()
        inputs = self._with_decoder_inputs(inputs, inputs.get("labels"))
        source = inputs.pop("encoder_outputs", None)
        held = None
        if scalings is not None:
            if encoder_scalings is None:
                encoder_scalings = _scalings_of_source(source, scalings)
            held = self._two_sided(scalings, encoder_scalings, source, inputs)
        if source is None:
            encoded = self._encode(of_encoder(inputs), held and held.source)
            source = XLoraEncoderOutput(**encoded)
        if isinstance(source, XLoraEncoderOutput):
            source = source.main()
        return self._run_base(held, inputs | {"encoder_outputs": source})

    def _two_sided(
        self, target: Tensor, source: Tensor, encoded: Any, inputs: Mapping[str, Any]
    ) -> TwoSidedScalings:
        source_tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if encoded is not None:
            source_tokens = encoded[0]
        target_tokens = inputs.get("decoder_input_ids", inputs.get("decoder_inputs_embeds"))
        return TwoSidedScalings(
            self._decoder_sides(),
            source=TokenScalings(
                self._of_tokens(source, source_tokens), inputs.get("attention_mask")
            ),
            target=TokenScalings(
                self._of_tokens(target, target_tokens), inputs.get("decoder_attention_mask")
            ),
        )


class _TwoPassEncoder:
    """An X-LoRA model's encoder for Hugging Face code, which calls it by keyword."""

    def __init__(self, model: XLoraEncoderDecoder) -> None:
        self._model = model
        self.config = model.base_model.get_encoder().config

    def forward(self, **kwargs: Any) -> XLoraEncoderOutput:
        """Returns ``XLoraEncoderDecoder.encode`` of the arguments."""
        return self._model.encode(**kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> XLoraEncoderOutput:
        """Returns ``forward`` of the arguments; one without a name is ``input_ids``."""
        return self.forward(
            **dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs
        )


def _scalings_of_source(source: Any, scalings: Tensor) -> Tensor:
    """Returns the source's scalings where the caller of ``main_pass`` named none."""
    of_source = getattr(source, "scalings", None)
    if isinstance(of_source, Tensor):
        return of_source
    if scalings.ndim < 4 or scalings.shape[:2].numel() == 1:
        return scalings
    raise ModelError(
        "main_pass got one set of scalings per target token, but none for the source's tokens",
        hint="give encoder_scalings, or encoder_outputs made by model.encode",
    )
