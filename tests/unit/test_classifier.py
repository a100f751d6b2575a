"""The classifier's layout, its outputs' order, and its precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xlora_core.classifier import XLoraClassifier
from xlora_core.config import XLoraConfig

H, L, K = 5, 4, 3


def classifier(
    *, dtype: torch.dtype = torch.float64, seed: int = 0, **config: object
) -> XLoraClassifier:
    torch.manual_seed(seed)
    settings = {"hidden_size": H, "xlora_size": 7, "layerwise_scalings": True} | config
    return XLoraClassifier(XLoraConfig(**settings), n_lora_layers=L, n_adapters=K, dtype=dtype)


def hidden(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 6, H, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("depth", "dropout", "expected"),
    [
        (1, 0.2, "0: 5 -> 12"),
        (2, 0.2, "0: 5 -> 7, ReLU, Dropout 0.2, 3: 7 -> 12"),
        (2, 0.0, "0: 5 -> 7, ReLU, 2: 7 -> 12"),
        (
            4,
            0.1,
            (
                "0: 5 -> 7, ReLU, Dropout 0.1, 3: 7 -> 7, ReLU, Dropout 0.1, "
                "6: 7 -> 7, ReLU, Dropout 0.1, 9: 7 -> 12"
            ),
        ),
    ],
)
def test_layers_and_their_indices(depth: int, dropout: float, expected: str) -> None:
    model = classifier(xlora_depth=depth, xlora_dropout_p=dropout)
    found = []
    for index, layer in enumerate(model.layers):
        if isinstance(layer, nn.Linear):
            assert layer.bias is not None
            found.append(f"{index}: {layer.in_features} -> {layer.out_features}")
        elif isinstance(layer, nn.Dropout):
            found.append(f"Dropout {layer.p}")
        else:
            found.append(type(layer).__name__)
    assert ", ".join(found) == expected


def test_output_index_is_module_times_k_plus_adapter() -> None:
    model = classifier()
    flat = nn.functional.linear(hidden(), model.layers[0].weight, model.layers[0].bias)
    logits = model(hidden())
    assert logits.shape == (2, 6, L, K)
    for module in range(L):
        for adapter in range(K):
            assert torch.equal(logits[..., module, adapter], flat[..., module * K + adapter])


def test_shared_scalings_have_one_row() -> None:
    model = classifier(layerwise_scalings=False)
    assert model.layers[0].out_features == K
    assert model(hidden()).shape == (2, 6, 1, K)


def test_a_deep_classifier_by_hand() -> None:
    model = classifier(xlora_depth=3).eval()
    first, second, last = (layer for layer in model.layers if isinstance(layer, nn.Linear))
    x = (hidden() @ first.weight.T + first.bias).clamp(min=0)
    x = (x @ second.weight.T + second.bias).clamp(min=0)
    expected = (x @ last.weight.T + last.bias).unflatten(-1, (L, K))
    torch.testing.assert_close(model(hidden()), expected, atol=1e-13, rtol=0)


def test_dropout_acts_in_training_only() -> None:
    model = classifier(xlora_depth=2, xlora_dropout_p=0.5).eval()
    assert torch.equal(model(hidden()), model(hidden()))
    model.train()
    assert not torch.equal(model(hidden()), model(hidden()))


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_it_computes_in_float32_whatever_the_hidden_state_or_the_cast(cast: str) -> None:
    model = classifier(dtype=torch.float32)
    exact = model(hidden(torch.float32))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    getattr(model, cast)()
    assert model.dtype == torch.float32
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(hidden(torch.float32)), exact)
    rounded = hidden(torch.float32).bfloat16()
    assert torch.equal(model(rounded), model(rounded.float()))
    assert model(rounded).dtype == torch.float32


def test_it_computes_in_float32_under_autocast() -> None:
    model = classifier(dtype=torch.float32)
    exact = model(hidden(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
        assert torch.equal(model(hidden(torch.float32)), exact)


def test_a_cast_to_float64_is_followed() -> None:
    assert classifier(dtype=torch.float32).double().dtype == torch.float64


def test_hidden_size_is_needed() -> None:
    with pytest.raises(ValueError, match="needs config.hidden_size"):
        classifier(hidden_size=None)
