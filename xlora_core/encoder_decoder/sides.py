"""Whose tokens a module of the decoder reads: the source's, or the target's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from xlora_core.encoder_decoder.base import encoder_width
from xlora_core.errors import ModelError
from xlora_core.layers import ActiveScalings, TokenScalings, XLoraLayer, compute_device

# Sizes of the trial: no two of them, nor any product of them, are alike.
_BATCH, _SOURCE, _TARGET = 2, 5, 3


class Side(Enum):
    """One of the two texts that an encoder-decoder reads."""

    SOURCE = "source"
    TARGET = "target"


_SIDE_OF_SHAPE = {
    (_BATCH, _SOURCE): Side.SOURCE,
    (_BATCH * _SOURCE,): Side.SOURCE,
    (_BATCH, _TARGET): Side.TARGET,
    (_BATCH * _TARGET,): Side.TARGET,
    (_BATCH,): Side.TARGET,  # one vector per text: a head's
}


@dataclass(frozen=True)
class DecoderSides:
    """The side of every adapted module while the decoder runs.

    Attributes:
        layers: Module path -> module, as they were when the sides were found.
        of_layer: For each of them its side; None where the trial did not show it.
    """

    layers: dict[str, XLoraLayer]
    of_layer: tuple[Side | None, ...]

    def side(self, layer: XLoraLayer) -> Side:
        """Returns the side of a module.

        Raises:
            ModelError: If the trial did not show it.
        """
        side = self.of_layer[layer.layer_index]
        if side is None:
            path = list(self.layers)[layer.layer_index]
            raise ModelError(
                f"adapted module {path} runs in the decoder, but did not in a trial when the model "
                "was made, or read neither all source tokens nor all target tokens there; so it "
                "is unknown whose scalings it follows",
                hint="leave it out of the adapters' target_modules",
            )
        return side


class TwoSidedScalings:
    """The scalings of a decoder: each module gets those of the tokens that it reads.

    Args:
        sides: Which tokens those are.
        source: The source's scalings.
        target: The target's.

    Attributes:
        source: As given.
        target: As given.
    """

    def __init__(self, sides: DecoderSides, *, source: TokenScalings, target: TokenScalings):
        self._sides = sides
        self.source = source
        self.target = target

    def of(self, layer: XLoraLayer, x: Tensor) -> Tensor:
        """Returns ``[*leading, K]``, or ``[K]`` if all tokens share it.

        Raises:
            ModelError: If the module's side is unknown, or ``x`` holds other tokens than it has.
        """
        source = self._sides.side(layer) is Side.SOURCE
        return (self.source if source else self.target).of(layer, x)

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the source's scalings and the target's."""
        return (*self.source.tensors(), *self.target.tensors())

    def with_tensors(self, tensors: Sequence[Tensor]) -> TwoSidedScalings:
        """Returns the same over other tensors."""
        source, target = tensors
        return TwoSidedScalings(
            self._sides,
            source=self.source.with_tensors((source,)),
            target=self.target.with_tensors((target,)),
        )


class _TokenShapes:
    """No scalings: notes the shape of the tokens that each module sees."""

    def __init__(self) -> None:
        self.seen: defaultdict[int, set[tuple[int, ...]]] = defaultdict(set)

    def of(self, layer: XLoraLayer, x: Tensor) -> None:
        """Returns None, which runs the base layer alone."""
        self.seen[layer.layer_index].add(tuple(layer.token_shape(x)))

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns nothing: no gradient comes back."""
        return ()

    def with_tensors(self, tensors: Sequence[Tensor]) -> _TokenShapes:
        """Returns itself."""
        return self


# Any: what transformers declares on its models hides their methods from a type checker.
def find_sides(
    base_model: Any, layers: Mapping[str, XLoraLayer], active: ActiveScalings
) -> DecoderSides:
    """Finds the side of every adapted module by one tiny run of the decoder.

    A run shows it for any architecture, and before a source and a target of one length could
    make it a guess. What lies outside the model's backbone is a head and follows the target.

    Args:
        base_model: A Hugging Face encoder-decoder; left as it was.
        layers: Its adapted modules.
        active: The scalings they read.

    Raises:
        ModelError: If the decoder cannot be run on an encoder's output.
    """
    backbone = base_model.base_model
    shapes = _TokenShapes()
    training = [module for module in base_model.modules() if module.training]
    base_model.eval()
    try:
        with torch.no_grad(), active.hold(shapes):
            backbone(**_trial_inputs(base_model))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ModelError(
            f"the decoder of {type(base_model).__name__} cannot be run on an encoder's output: {e}",
            hint="X-LoRA needs an encoder-decoder that takes encoder_outputs and decoder_input_ids",
        ) from e
    finally:
        for module in training:
            module.training = True
    inside = set(backbone.modules())
    sides = tuple(_side(layer, inside, shapes) for layer in layers.values())
    return DecoderSides(dict(layers), sides)


def _trial_inputs(base_model: Any) -> dict[str, Any]:
    # Not the model's own idea of its device: weights may rest elsewhere until their layer runs.
    device = compute_device(base_model.get_input_embeddings())
    hidden = torch.zeros(
        _BATCH, _SOURCE, encoder_width(base_model), dtype=base_model.dtype, device=device
    )
    return {
        "encoder_outputs": BaseModelOutput(last_hidden_state=hidden),
        "attention_mask": torch.ones(_BATCH, _SOURCE, dtype=torch.int64, device=device),
        "decoder_input_ids": torch.zeros(_BATCH, _TARGET, dtype=torch.int64, device=device),
        "use_cache": False,
    }


def _side(layer: XLoraLayer, backbone: set[nn.Module], shapes: _TokenShapes) -> Side | None:
    if layer not in backbone:
        return Side.TARGET
    sides = {_SIDE_OF_SHAPE.get(shape) for shape in shapes.seen[layer.layer_index]}
    return sides.pop() if len(sides) == 1 else None
