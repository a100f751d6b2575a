"""The mean mixture of a recorded run, or of texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from xlora_core.config import RoutingKnobs
from xlora_core.engine.identity import adapter_fingerprints
from xlora_core.errors import ConfigError, ModelError
from xlora_core.freezing.evaluation_mode import evaluation_mode
from xlora_core.freezing.mixture import FrozenMixture
from xlora_core.freezing.texts import TokenChoice, check_choice, chosen, length_sorted_batches
from xlora_core.model import XLoraModel
from xlora_core.recording import Run
from xlora_core.training.data import Example


def freeze_run(
    run: Run, arm: int = 0, *, tokens: TokenChoice = "response", knobs: RoutingKnobs | None = None
) -> FrozenMixture:
    """Returns the mean effective scalings of a recorded run, per module. Needs no model.

    A token's scalings are those with which the model read it, as in ``run.bucketed("segment")``.
    Where gates route per layer, other knobs than those of the run are exact for the first module
    only, see ``Run.scalings``.

    Args:
        run: The run.
        arm: Index of the arm.
        tokens: Which tokens to average over.
        knobs: For all tokens, instead of those in force at each token.

    Raises:
        ConfigError: If there is no such arm, no such (kind of) token, or top-k is larger than K.
    """
    check_choice(tokens)
    track = run.track(arm)
    rows = {
        "response": slice(track.n_prompt, None),
        "prompt": slice(track.n_prompt),
        "all": slice(None),
    }[tokens]
    scalings = run.scalings(arm, knobs, effective=True)[rows]
    if len(scalings) == 0:
        raise ConfigError(
            f"arm {arm} of the run has no {_name(tokens)} whose scalings are known",
            hint='choose other tokens: "response", "prompt" or "all"',
        )
    header = run.header
    label = run.arm_labels[arm]
    return FrozenMixture(
        adapter_names=header.adapter_names,
        layer_names=header.layer_names,
        weights=torch.from_numpy(scalings.mean(axis=0, dtype=np.float64)),
        n_tokens=len(scalings),
        source=f"run {header.run_id}, arm {arm} ({label}), {len(scalings)} {_name(tokens)}",
        adapter_hashes=header.adapter_hashes,
    )


@torch.no_grad()
def freeze_rows(
    model: XLoraModel,
    examples: Sequence[Example],
    *,
    tokens: TokenChoice = "response",
    knobs: RoutingKnobs | None = None,
    name: str = "",
    tokens_per_batch: int = 4096,
) -> FrozenMixture:
    """Returns the mean effective scalings over given texts, per module.

    Every token weighs the same, in a long row as in a short one. Only the pass that the router
    needs is run, in evaluation mode.

    Args:
        model: The model.
        examples: From ``token_rows``.
        tokens: Which tokens to average over; the response is what is labelled.
        knobs: Instead of the model's own.
        name: What the texts are called.
        tokens_per_batch: Most positions of one forward call.

    Raises:
        ModelError: If the model is an encoder-decoder.
        ConfigError: If there is no such (kind of) token, or top-k is larger than K.
    """
    if model.is_encoder_decoder:
        raise ModelError(
            f"{type(model.base_model).__name__} reads a source and a target, a text is one of both",
            hint="average model.route(...) of its scaling pass yourself, and pass the weights",
        )
    knobs = model.check_knobs(knobs or model.default_knobs)
    n_layers, n_adapters = len(model.lora_layer_names), len(model.adapter_names)
    total = torch.zeros(n_layers, n_adapters, dtype=torch.float64)
    n_tokens = 0
    with evaluation_mode(model):
        for batch in length_sorted_batches(examples, tokens_per_batch):
            router_logits = model.read_router(
                knobs=knobs,
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                use_cache=False,
            )
            scalings = model.route(router_logits, knobs).cpu()  # [B, T, L or 1, K]
            kept = scalings[chosen(batch, tokens)].double()
            total += kept.sum(dim=0)
            n_tokens += len(kept)
    if n_tokens == 0:
        raise ConfigError(
            f"the texts have no {_name(tokens)}",
            hint='choose other tokens: "response", "prompt" or "all"',
        )
    return FrozenMixture(
        adapter_names=model.adapter_names,
        layer_names=model.lora_layer_names,
        # As in a run: an adapter without weights in a module has no effect there.
        weights=total / n_tokens * model.present.cpu(),
        n_tokens=n_tokens,
        source=f"{name or 'texts'}, {len(examples)} rows, {n_tokens} {_name(tokens)}",
        adapter_hashes=adapter_fingerprints(model),
    )


def _name(tokens: TokenChoice) -> str:
    return "tokens" if tokens == "all" else f"{tokens} tokens"
