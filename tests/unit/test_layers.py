"""Stacked experts against a loop over them, for Linear and Conv1D."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from xlora_core.adapters import LoraWeights
from xlora_core.errors import ConfigError, ModelError
from xlora_core.layers import (
    ActiveScalings,
    TokenScalings,
    XLoraLinear,
)

IN, OUT, K = 6, 5, 4
B, T = 2, 3
RANKS = {0: 1, 2: 4, 3: 2}  # adapter 1 is absent
SCALINGS_OF_LORA = {0: 2.0, 2: 1 / 3, 3: -0.5}


def experts(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[int, LoraWeights]:
    rng = torch.Generator().manual_seed(seed)
    return {
        k: LoraWeights(
            lora_A=torch.randn(r, IN, generator=rng, dtype=torch.float64).to(dtype),
            lora_B=torch.randn(OUT, r, generator=rng, dtype=torch.float64).to(dtype),
            lora_scaling=SCALINGS_OF_LORA[k],
        )
        for k, r in RANKS.items()
    }


def base(kind: str, dtype: torch.dtype = torch.float64, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(1)
    if kind == "Conv1D":
        layer = Conv1D(OUT, IN)
        nn.init.normal_(layer.bias)
        return layer.to(dtype)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def adapted(
    kind: str = "Linear",
    *,
    dtype: torch.dtype = torch.float64,
    layer_index: int = 1,
    weights: Mapping[int, LoraWeights] | None = None,
    dropouts: Mapping[int, float] | None = None,
    stack_dtype: torch.dtype | None = None,
    trainable: bool = False,
) -> XLoraLinear:
    return XLoraLinear(
        base(kind, dtype),
        layer_index=layer_index,
        n_adapters=K,
        experts=experts() if weights is None else weights,
        dropouts=dropouts or {},
        active=ActiveScalings(),
        dtype=stack_dtype or dtype,
        trainable=trainable,
    ).eval()


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(B, T, IN, generator=rng, dtype=torch.float64).to(dtype)


def scalings(n_layers: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(6)
    return torch.randn(B, T, n_layers, K, generator=rng, dtype=torch.float64)


def by_hand(layer: XLoraLinear, x: Tensor, s: Tensor) -> Tensor:
    """The mixture token by token and expert by expert; ``s`` ``[B, T, K]``."""
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    weight = weight.T if isinstance(layer.base_layer, Conv1D) else weight
    y = torch.empty(B, T, OUT, dtype=x.dtype)
    for b in range(B):
        for t in range(T):
            y[b, t] = weight @ x[b, t] + bias
            for k, expert in experts().items():
                delta = expert.lora_B @ (expert.lora_A @ x[b, t])
                y[b, t] += s[b, t, k] * SCALINGS_OF_LORA[k] * delta
    return y


# ---------------------------------------------------------------- the mixture


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize(("n_layers", "row"), [(3, 1), (1, 0)], ids=["layerwise", "shared"])
def test_stacked_experts_are_the_loop(kind: str, n_layers: int, row: int) -> None:
    layer, x, s = adapted(kind), inputs(), scalings(n_layers)
    with layer.active.hold(s):
        y = layer(x)
    torch.testing.assert_close(y, by_hand(layer, x, s[:, :, row]), atol=1e-13, rtol=1e-12)
    assert (y - layer.base_layer(x)).abs().max() > 1


def test_an_absent_adapters_scaling_is_without_effect() -> None:
    layer, x, s = adapted(), inputs(), scalings()
    with layer.active.hold(s):
        before = layer(x)
    s[..., 1] = 1e6
    with layer.active.hold(s):
        assert torch.equal(layer(x), before)


def test_without_scalings_it_is_the_base_layer() -> None:
    layer, x = adapted(), inputs()
    assert torch.equal(layer(x), layer.base_layer(x))
    with layer.active.hold(torch.zeros(B, T, 3, K, dtype=torch.float64)):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_one_set_of_scalings_serves_all_tokens() -> None:
    layer, x, s = adapted(), inputs(), scalings()[:1, :1]
    with layer.active.hold(s):
        y = layer(x)
    with layer.active.hold(s.expand(B, T, -1, -1)):
        torch.testing.assert_close(y, layer(x), atol=1e-14, rtol=0)


def test_flattened_tokens_find_their_scalings() -> None:
    """OPT flattens ``[B, T, H]`` to ``[B * T, H]`` before its feed-forward part."""
    layer, x, s = adapted(), inputs(), scalings()
    with layer.active.hold(s):
        torch.testing.assert_close(
            layer(x.flatten(0, 1)), layer(x).flatten(0, 1), atol=1e-14, rtol=0
        )


@pytest.mark.parametrize("shape", [(B, T + 1), (T, B), (B * T + 1,), (1, B * T)])
def test_other_tokens_than_the_scalings_are_refused(shape: tuple[int, ...]) -> None:
    layer = adapted()
    with layer.active.hold(scalings()), pytest.raises(ModelError) as caught:
        layer(torch.zeros(*shape, IN, dtype=torch.float64))
    assert caught.value.message == (
        f"adapted module number 1 got input of shape {[*shape, IN]}, "
        f"expected [{B}, {T}] tokens as in input_ids"
    )


def test_holding_restores_what_was_held_also_after_an_error() -> None:
    active = ActiveScalings()
    first, second = (TokenScalings(torch.full((1, 1, 1, K), v)) for v in (1.0, 0.0))
    with active.hold(first):
        with contextlib.suppress(KeyError), active.hold(second):
            assert active.value is second
            raise KeyError
        assert active.value is first
    assert active.value is None


def test_each_thread_has_its_own_scalings() -> None:
    active = ActiveScalings()
    seen: list[object] = []
    with active.hold(torch.ones(1, 1, 1, K)):
        thread = threading.Thread(target=lambda: seen.append(active.value))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_deep_copy_shares_one_new_object_of_scalings() -> None:
    model = nn.ModuleList([adapted(), adapted()])
    model[1].active = model[0].active
    copied = copy.deepcopy(model)
    assert copied[0].active is copied[1].active
    assert copied[0].active is not model[0].active


# ---------------------------------------------------------------- dtypes


def test_bf16_base_gives_bf16_out_with_bf16_experts() -> None:
    layer = adapted(dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
    assert layer.lora_scaling.dtype == torch.float32
    exact = adapted()
    with torch.no_grad():
        exact.base_layer.weight.copy_(layer.base_layer.weight)
        exact.base_layer.bias.copy_(layer.base_layer.bias)
        exact.lora_A.copy_(layer.lora_A)
        exact.lora_B.copy_(layer.lora_B)
    x = inputs(torch.bfloat16)
    with layer.active.hold(scalings().float()), exact.active.hold(scalings()):
        y, true = layer(x), exact(x.double())
    assert y.dtype == torch.bfloat16
    # Four roundings of 2**-9 each, on sums of up to 6 products.
    torch.testing.assert_close(y.double(), true, atol=0.03 * true.abs().max().item(), rtol=0)


def test_trainable_experts_stay_float32_under_a_bf16_base() -> None:
    layer = adapted(dtype=torch.bfloat16, stack_dtype=torch.float32, trainable=True)
    assert layer.lora_A.dtype == torch.float32
    assert layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad
    with layer.active.hold(scalings().float()):
        assert layer(inputs(torch.bfloat16)).dtype == torch.bfloat16


def test_casting_the_layer_does_not_round_lora_scaling() -> None:
    layer = adapted(dtype=torch.float32)
    third = torch.tensor(1 / 3)
    assert layer.to(torch.bfloat16).lora_A.dtype == torch.bfloat16
    assert layer.lora_scaling.dtype == torch.float32
    assert layer.lora_scaling[1] == third
    assert layer.double().lora_scaling.dtype == torch.float64


# ---------------------------------------------------------------- dropout


def test_dropout_acts_in_training_only() -> None:
    layer, x = adapted(dropouts={0: 0.5, 2: 0.5, 3: 0.5}), inputs()
    plain = adapted()
    with layer.active.hold(scalings()), plain.active.hold(scalings()):
        assert torch.equal(layer(x), plain(x))
        layer.train()
        assert not torch.allclose(layer(x), plain(x))
        assert not torch.equal(layer(x), layer(x))


def test_dropout_keeps_the_mean() -> None:
    layer, x, s = adapted(dropouts={0: 0.5, 2: 0.3, 3: 0.1}), inputs()[:1, :1], scalings()[:1, :1]
    n = 20_000
    with layer.active.hold(s):
        exact = layer(x)
        torch.manual_seed(0)
        many = layer.train()(x.expand(1, n, -1))
    error = many.std(dim=1) / n**0.5
    assert ((many.mean(dim=1) - exact[0]).abs() < 5 * error).all()


def test_only_the_adapters_with_dropout_have_it() -> None:
    layer, x, s = adapted(dropouts={2: 0.9}), inputs(), scalings()
    s[..., 2] = 0
    with layer.active.hold(s):
        exact = layer(x)
        torch.testing.assert_close(layer.train()(x), exact, atol=1e-13, rtol=0)


def test_every_expert_has_its_own_mask() -> None:
    """Two equal experts with opposite scalings cancel, unless their masks differ."""
    expert = experts()[2]
    layer = adapted(weights={0: expert, 1: expert}, dropouts={0: 0.5, 1: 0.5})
    s = torch.zeros(B, T, 3, K, dtype=torch.float64)
    s[..., 0], s[..., 1] = 1, -1
    x = inputs()
    with layer.active.hold(s):
        torch.testing.assert_close(layer(x), layer.base_layer(x), atol=1e-14, rtol=0)
        assert (layer.train()(x) - layer.base_layer(x)).abs().max() > 0.1


# ---------------------------------------------------------------- merging one layer


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("weights", [None, [0.5, 9.0, -1.0, 0.25]])
def test_merging_bakes_a_constant_mixture_in(kind: str, weights: list[float] | None) -> None:
    layer, x = adapted(kind), inputs()
    before = copy.deepcopy(layer.state_dict())
    merged = layer.merge_to_original_layer(weights)
    assert type(merged) is type(layer.base_layer)
    constant = torch.tensor(weights or [1 / K] * K, dtype=torch.float64).expand(B, T, 1, K)
    with layer.active.hold(constant):
        torch.testing.assert_close(merged(x), layer(x), atol=1e-13, rtol=1e-12)
    assert merged.weight is not layer.base_layer.weight
    assert not merged.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_merging_a_layer_without_bias_and_in_bf16() -> None:
    layer = XLoraLinear(
        base("Linear", torch.bfloat16, bias=False),
        layer_index=0,
        n_adapters=K,
        experts=experts(),
        dropouts={},
        active=ActiveScalings(),
        dtype=torch.bfloat16,
    )
    merged = layer.merge_to_original_layer()
    assert merged.bias is None
    assert merged.weight.dtype == torch.bfloat16
    # Added in float32 and rounded once.
    exact = layer.base_layer.weight.float() + layer.delta_weight(torch.full((K,), 1 / K))
    assert layer.delta_weight(torch.full((K,), 1 / K)).dtype == torch.float32
    assert torch.equal(merged.weight, exact.bfloat16())


@pytest.mark.parametrize("weights", [[1.0], [[1.0] * K], [1.0, 1.0, float("nan"), 1.0]])
def test_merge_weights_must_be_one_finite_number_each(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="one finite number for each of 4 adapters, got shape"):
        adapted().merge_to_original_layer(weights)
    with pytest.raises(ConfigError, match="merge weights must be numbers"):
        adapted().merge_to_original_layer(["a", "b", "c", "d"])


def test_experts_come_back_as_they_went_in() -> None:
    for k, expert in adapted().experts().items():
        assert torch.equal(expert.lora_A, experts()[k].lora_A)
        assert torch.equal(expert.lora_B, experts()[k].lora_B)
        assert expert.lora_scaling == SCALINGS_OF_LORA[k]
    assert list(adapted().experts()) == [0, 2, 3]


def test_it_passes_for_the_layer_it_replaced() -> None:
    layer = adapted()
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert (layer.in_features, layer.out_features) == (IN, OUT)
