"""A classifier as a chain of linear layers, which is what all three layouts store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from xlora_core.config import XLoraConfig
from xlora_core.errors import CheckpointError


class LinearLayer(NamedTuple):
    """One linear layer.

    Attributes:
        weight: ``[out, in]``.
        bias: ``[out]``.
    """

    weight: Tensor
    bias: Tensor


def linear_indices(config: XLoraConfig) -> list[int]:
    """Returns the indices of the linear layers in the classifier's ``layers``.

    ReLU and dropout count, and dropout modules exist only for ``xlora_dropout_p > 0``.

    Source: PEFT 0.21.2, ``XLoraClassifier``.

    Example:
        >>> linear_indices(XLoraConfig(xlora_depth=3, xlora_dropout_p=0.0))
        [0, 2, 4]
    """
    step = 3 if config.xlora_dropout_p > 0 else 2
    return [i * step for i in range(config.xlora_depth)]


def check_depth(path: Path, config: XLoraConfig, *, most: int) -> None:
    """Raises unless the config's depth is one that a file of ``most`` layers may have.

    It comes first: a doctored depth must not make anything large.

    Raises:
        CheckpointError: If it is deeper.
    """
    if config.xlora_depth > most:
        raise CheckpointError(
            f"{path}: xlora_depth is {config.xlora_depth}, the file holds fewer layers",
            hint="the classifier belongs to another config, or the file was damaged",
        )


def tensors_of(chain: Sequence[LinearLayer], config: XLoraConfig) -> dict[str, Tensor]:
    """Returns a chain under the classifier's own names, ``layers.<i>.weight`` and ``.bias``."""
    tensors = {}
    for index, layer in zip(linear_indices(config), chain, strict=True):
        tensors[f"layers.{index}.weight"] = layer.weight
        tensors[f"layers.{index}.bias"] = layer.bias
    return tensors


def chain_of(tensors: Mapping[str, Tensor], config: XLoraConfig) -> list[LinearLayer]:
    """Returns the chain that a classifier's tensors, by their own names, make up."""
    return [
        LinearLayer(tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"])
        for i in linear_indices(config)
    ]


def check_chain(
    path: Path, names: Sequence[str], chain: Sequence[LinearLayer], config: XLoraConfig
) -> None:
    """Raises unless every layer has the shape that the config gives it.

    How many modules the last layer serves is not known without the experts: its rows must be a
    multiple of the number of adapters; without ``layerwise_scalings``, that number.

    Args:
        path: The file, for the message.
        names: What the file calls each layer.
        chain: The layers.
        config: With ``hidden_size``.

    Raises:
        CheckpointError: Listing every tensor of another shape.
    """
    faults = []
    n_adapters = len(config.adapters)
    width = config.hidden_size
    for position, (name, layer) in enumerate(zip(names, chain, strict=True)):
        is_last = position == len(chain) - 1
        rows = list(layer.weight.shape[:1])
        if is_last:
            fits = rows and rows[0] > 0 and rows[0] % n_adapters == 0
            fits = fits and (config.layerwise_scalings or rows[0] == n_adapters)
            wanted = f"modules x {n_adapters}" if config.layerwise_scalings else f"{n_adapters}"
        else:
            fits = rows == [config.xlora_size]
            wanted = f"{config.xlora_size}"
        if not fits or list(layer.weight.shape[1:]) != [width]:
            faults.append(
                f"tensor {name}.weight must be [{wanted}, {width}], found "
                f"{list(layer.weight.shape)}"
            )
        elif list(layer.bias.shape) != rows:
            faults.append(f"tensor {name}.bias must be {rows}, found {list(layer.bias.shape)}")
        width = config.xlora_size
    if faults:
        raise CheckpointError(
            f"{path}: " + "\n".join(faults),
            hint="the classifier belongs to another config, or the file was damaged",
        )


def folded(chain: Sequence[LinearLayer]) -> LinearLayer:
    """Returns the one linear layer that equals a chain without activations between.

    ``W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)``, computed and kept in float64, so the only
    difference to the chain is the rounding of the chain itself.
    """
    weight, bias = (tensor.to(torch.float64) for tensor in chain[0])
    for layer in chain[1:]:
        next_weight = layer.weight.to(torch.float64)
        weight = next_weight @ weight
        bias = next_weight @ bias + layer.bias.to(torch.float64)
    return LinearLayer(weight, bias)


def in_module_order(
    tensors: Mapping[str, Tensor],
    config: XLoraConfig,
    *,
    stored: Sequence[str],
    wanted: Sequence[str],
) -> dict[str, Tensor]:
    """Returns a classifier's tensors with its outputs in another order of modules.

    Args:
        tensors: The classifier; output row = module * K + adapter.
        config: Its config.
        stored: Module paths in the order of the rows.
        wanted: The same paths in the order that the rows are to have.
    """
    if not config.layerwise_scalings or list(stored) == list(wanted):
        return dict(tensors)
    place = {path: index for index, path in enumerate(stored)}
    order = torch.tensor([place[path] for path in wanted])
    last = f"layers.{linear_indices(config)[-1]}"
    weight, bias = tensors[f"{last}.weight"], tensors[f"{last}.bias"]
    by_module = weight.reshape(len(stored), -1, weight.shape[1])
    return dict(tensors) | {
        f"{last}.weight": by_module[order].reshape(weight.shape),
        f"{last}.bias": bias.reshape(len(stored), -1)[order].reshape(bias.shape),
    }
