"""Routers for another list of adapters and modules, made beside the one that is edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from xlora_core.classifier import XLoraClassifier
from xlora_core.editing.rows import Moves, Newcomer, moved_rows
from xlora_core.gate import Gate
from xlora_core.gates import LayerGates
from xlora_core.layers import XLoraLayer


def moved_head(
    classifier: XLoraClassifier,
    modules: Sequence[int | None],
    adapters: Sequence[int | None],
    newcomer: Newcomer,
) -> nn.Linear:
    """Returns a classifier's last layer with every row at its new place.

    Args:
        classifier: Not changed.
        modules: Where each module with rows of its own comes from; ``[0]`` where one set of rows
            serves all.
        adapters: Where each adapter comes from.
        newcomer: How the rows of a new adapter begin.
    """
    head = classifier.layers[classifier.head]
    assert isinstance(head, nn.Linear)  # narrows nn.Sequential's loose item type
    moves = Moves(modules=modules, adapters=adapters, n_adapters=classifier.n_adapters)
    # On meta: an initialisation would draw from the random numbers of whoever edits.
    moved = nn.Linear(head.in_features, len(modules) * len(adapters), device="meta")
    _set_rows(moved, head, moves, newcomer)
    return moved.train(head.training)


def moved_gates(
    gates: Mapping[str, Gate],
    layers: Mapping[str, XLoraLayer],
    adapters: Sequence[int | None],
    newcomer: Newcomer,
) -> LayerGates:
    """Returns the gates of other adapted modules, with every row at its new place.

    Args:
        gates: Module path -> its gate, as they are now; not changed.
        layers: Module path -> adapted module from now on.
        adapters: Where each adapter comes from.
        newcomer: How the rows of a new adapter begin.
    """
    like = next(iter(gates.values()))
    moves = Moves(modules=[0], adapters=adapters, n_adapters=like.out_features)
    moved = LayerGates(list(layers.values()), len(adapters), dtype=like.weight.dtype)
    for gate, (path, layer) in zip(moved, layers.items(), strict=True):
        assert isinstance(gate, Gate)  # narrows nn.ModuleList's loose item type
        before = gates.get(path)
        if before is None:  # as a gate begins, with the adapters of before
            before = Gate(layer.gate_features, like.out_features, dtype=gate.weight.dtype)
            before.to(gate.weight.device).requires_grad_(like.weight.requires_grad)
        _set_rows(gate, before, moves, newcomer)
    return moved.train(like.training)


def _set_rows(linear: nn.Linear, source: nn.Linear, moves: Moves, newcomer: Newcomer) -> None:
    weight, bias = moved_rows(source.weight, source.bias, moves, newcomer)
    linear.weight = nn.Parameter(weight, requires_grad=source.weight.requires_grad)
    linear.bias = nn.Parameter(bias, requires_grad=source.bias.requires_grad)
