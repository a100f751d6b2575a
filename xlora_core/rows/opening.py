"""Chooses how a model's rows are read, and refuses models whose numbers would change."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from transformers.modeling_utils import PreTrainedModel

from xlora_core.errors import ModelError
from xlora_core.layers import XLoraLayer
from xlora_core.model import XLoraModel
from xlora_core.rows.cache import RowCache
from xlora_core.rows.llama import LlamaRows
from xlora_core.rows.masks import ExplicitMasks, PaddingMasks
from xlora_core.rows.modules import ModuleRows, cached_shapes
from xlora_core.rows.probe import Probe
from xlora_core.rows.reader import RowReader

_logger = logging.getLogger(__name__)


def open_rows(model: XLoraModel, *, packed: bool = False) -> RowReader | None:
    """Returns what reads a model's rows, or None if its texts must be read one by one.

    What is returned has shown to give the model's own logits, for a few tokens read in every way
    there is. Why there is nothing to return is said in the log.

    Args:
        model: The model, in evaluation mode; it is only called.
        packed: Whether there is memory for a second copy of its matrices, laid out for speed.
    """
    try:
        _check_kind(model)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            return _first_right(model, packed=packed)
    except Exception as error:
        # Whatever an unknown architecture runs into, one text alone may still work.
        _logger.warning("texts do not share runs over this model's weights: %s", _said(error))
        return None


def _check_kind(model: XLoraModel) -> None:
    """Raises ModelError for models that rows cannot serve, and would not all be found out."""
    base_model: PreTrainedModel = model.base_model
    if model.is_routed_per_layer:
        raise ModelError("every layer of it routes for itself, there is no scaling pass to share")
    if base_model.config.is_encoder_decoder:
        raise ModelError("it is an encoder-decoder")
    if base_model.base_model is base_model or base_model.get_output_embeddings() is None:
        raise ModelError("it has no language model's head apart from its backbone")
    if isinstance(base_model.get_output_embeddings(), XLoraLayer):
        raise ModelError("its head has adapters, so logits depend on the scalings of each token")
    if model.training:
        raise ModelError("it is in training mode, where dropout makes every run another one")


def _first_right(model: XLoraModel, *, packed: bool) -> RowReader:
    """Returns the fastest reader that gives the model's own numbers."""
    empty = cached_shapes(model)
    probe = Probe(model, empty)
    faults = []
    for name, make in _readers(model, empty, packed=packed):
        try:
            reader = make()
            probe.check(reader)
        except Exception as error:
            # Tried on a model it may not be made for: whatever happens, the next one is tried.
            faults.append(f"{name}: {_said(error)}")
            continue
        for fault in faults:
            _logger.info("rows are read by %s; not by %s", name, fault)
        return reader
    raise ModelError("; ".join(faults))


def _readers(
    model: XLoraModel, empty: RowCache, *, packed: bool
) -> list[tuple[str, Callable[[], RowReader]]]:
    """Returns name and maker of each reader, the fastest first."""
    backbone = model.base_model.base_model
    of_modules: list[tuple[str, Callable[[], RowReader]]] = [
        (
            "the model's modules with explicit masks",
            lambda: ModuleRows(model, empty, ExplicitMasks(backbone)),
        ),
        (
            "the model's modules with padding masks",
            lambda: ModuleRows(model, empty, PaddingMasks(backbone)),
        ),
    ]
    of_blocks = ("a step of our own for Llama's blocks", lambda: LlamaRows(model, packed=packed))
    return [of_blocks, *of_modules]


def _said(error: Exception) -> str:
    if isinstance(error, ModelError):
        return error.message
    return f"{type(error).__name__}: {error}"
