"""What a forward call's gates leave behind: router logits in the shape of its tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.errors import ModelError
from xlora_core.gates import GateScalings, LayerGates

IN, K = 4, 3
IDS = torch.zeros(2, 5, dtype=torch.long)


def layer(index: int) -> Any:
    """A stand-in for an adapted module whose gate reads its input as it is."""
    base = torch.nn.Linear(IN, IN)
    return SimpleNamespace(
        layer_index=index, gate_features=IN, gate_input=lambda x: x, base_layer=base
    )


def scalings(n_layers: int = 1) -> GateScalings:
    gates = LayerGates([layer(index) for index in range(n_layers)], K)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return GateScalings(
        gates,
        XLoraConfig(),
        RoutingKnobs(),
        layer_names=[f"layer.{index}" for index in range(n_layers)],
        adapter_names=["a", "b", "c"],
    )


def logits(held: GateScalings, x: Tensor, index: int = 0) -> Tensor:
    of_layer: Tensor = held._gates[index](x)
    return of_layer


@pytest.mark.parametrize(
    ("leading", "as_tokens"),
    [
        ((2, 5), lambda said: said),
        ((10,), lambda said: said.reshape(2, 5, K)),  # blocks that flatten their tokens
        ((1, 5), lambda said: said.expand(2, 5, K)),  # positions, the same for all texts
        ((2,), lambda said: said[:, None].expand(2, 5, K)),  # a pooler
        ((2, 7), lambda said: said.mean(dim=1, keepdim=True).expand(2, 5, K)),  # other tokens
        ((2, 3, 3), lambda said: said.flatten(1, 2).mean(1)[:, None].expand(2, 5, K)),
    ],
    ids=["tokens", "flattened", "positions", "one a text", "other tokens", "other tokens in rows"],
)
def test_every_modules_logits_stand_at_the_tokens(leading: tuple[int, ...], as_tokens: Any) -> None:
    held = scalings()
    x = torch.randn(*leading, IN)
    routed = held.of(layer(0), x)
    torch.testing.assert_close(routed, logits(held, x).softmax(-1))
    found = held.router_logits(IDS)
    assert found.shape == (2, 5, 1, K)
    torch.testing.assert_close(found[:, :, 0], as_tokens(logits(held, x)))


def test_a_module_that_did_not_run_has_zeros() -> None:
    held = scalings(3)
    x = torch.randn(2, 5, IN)
    held.of(layer(2), x)
    found = held.router_logits(IDS)
    assert torch.equal(found[:, :, :2], torch.zeros(2, 5, 2, K))
    torch.testing.assert_close(found[:, :, 2], logits(held, x, 2))


def test_a_module_that_ran_twice_has_its_last_run() -> None:
    held = scalings()
    x = torch.randn(2, 5, IN)
    held.of(layer(0), torch.randn(2, 5, IN))
    held.of(layer(0), x)
    torch.testing.assert_close(held.router_logits(IDS)[:, :, 0], logits(held, x))


def test_what_runs_again_in_backward_is_not_recorded() -> None:
    held = scalings()
    x = torch.randn(2, 5, IN)
    held.of(layer(0), x)
    found = held.router_logits(IDS)
    held.of(layer(0), torch.randn(2, 5, IN))
    assert torch.equal(held.router_logits(IDS), found)


def test_a_model_without_tokens_is_counted_by_its_modules() -> None:
    """Images tell their number of patches only inside the model."""
    held = scalings(2)
    held.of(layer(0), torch.randn(2, IN))  # a convolution: one vector per image
    held.of(layer(1), torch.randn(2, 17, IN))
    assert held.router_logits(None).shape == (2, 17, 2, K)
    alone = scalings()
    alone.of(layer(0), torch.randn(2, IN))
    assert alone.router_logits(None).shape == (2, 1, 1, K)


def test_inputs_that_belong_to_no_text_are_refused() -> None:
    held = scalings()
    held.of(layer(0), torch.randn(7, IN))  # as of tokens picked for one expert block
    with pytest.raises(ModelError, match=r"number 0 got \[7\] vectors, .* 2 texts of 5 tokens"):
        held.router_logits(IDS)


def test_checkpointing_is_given_something_that_asks_for_a_gradient() -> None:
    held = scalings()
    (anchor,) = held.tensors()
    assert anchor.requires_grad
    assert held.with_tensors([anchor.detach()]) is held
    with torch.no_grad():
        (anchor,) = scalings().tensors()
    assert not anchor.requires_grad
