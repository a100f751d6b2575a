"""The two passes: what they take, what they give, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_lora
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.errors import ModelError
from xlora_core.model import XLoraModel

NEAR = {"atol": 1e-10, "rtol": 0}


@pytest.fixture
def model(tmp_path: Path) -> XLoraModel:
    return tiny_xlora(tmp_path, dtype=torch.float64)


def test_forward_is_the_two_passes(model: XLoraModel) -> None:
    ids, knobs = tiny_prompt(), RoutingKnobs(top_k=1, temperature=0.5, global_weight=0.8)
    with torch.no_grad():
        whole = model(input_ids=ids, knobs=knobs).logits
        scalings = model.route(model.scaling_pass(input_ids=ids).router_logits, knobs)
        assert torch.equal(model.main_pass(input_ids=ids, scalings=scalings).logits, whole)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {"layerwise_scalings": False},
        {"scaling_pass_value": 0.3},
        {"scaling_pass_value": 0.3, "top_k_lora": 2, "xlora_depth": 2},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
        {"enable_softmax": False},
    ],
)
def test_cached_is_uncached_under_every_routing(tmp_path: Path, config: dict[str, object]) -> None:
    model = tiny_xlora(tmp_path, dtype=torch.float64, **config)
    ids = tiny_prompt()
    whole = model(input_ids=ids, use_cache=False).logits
    cache = model.new_cache()
    parts = [model(input_ids=i, past_key_values=cache).logits for i in ids.split((3, 1, 5), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **NEAR)


@torch.no_grad()
def test_scalings_of_every_shape_mean_the_same(model: XLoraModel) -> None:
    ids, L, K = tiny_prompt(), len(model.lora_layer_names), 3
    table = torch.rand(L, K, dtype=torch.float64)
    full = table.expand(2, 9, L, K)
    expected = model.main_pass(input_ids=ids, scalings=full).logits
    for same in (table, table[None, None], full[:1], full[:, :1]):
        logits = model.main_pass(input_ids=ids, scalings=same).logits
        torch.testing.assert_close(logits, expected, **NEAR)
    one = torch.tensor([0.1, 0.5, -0.2])
    expected = model.main_pass(input_ids=ids, scalings=one.double().expand(2, 9, L, K)).logits
    for same in (one.double(), one.double().expand(2, 9, 1, K), one.double().expand(1, 9, L, K)):
        logits = model.main_pass(input_ids=ids, scalings=same).logits
        torch.testing.assert_close(logits, expected, **NEAR)


@torch.no_grad()
def test_rows_may_have_their_own_constant_scalings(model: XLoraModel) -> None:
    ids = tiny_prompt()
    rows = torch.tensor([[0.0, 0, 0], [0, 1, 0]], dtype=torch.float64)[:, None, None]
    together = model.main_pass(input_ids=ids, scalings=rows).logits
    base = model.main_pass(input_ids=ids[:1], scalings=None).logits
    torch.testing.assert_close(together[:1], base, **NEAR)
    expert = model.main_pass(input_ids=ids[1:], scalings=rows[1, 0, 0]).logits
    torch.testing.assert_close(together[1:], expert, **NEAR)


@pytest.mark.parametrize(
    "shape", [(4,), (14, 2), (2, 8, 1, 3), (3, 9, 1, 3), (2, 9, 5, 3), (9, 14, 3)]
)
def test_scalings_of_a_shape_that_does_not_fit(model: XLoraModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        model.main_pass(input_ids=tiny_prompt(), scalings=torch.zeros(shape))
    assert caught.value.message == f"scalings have shape {list(shape)}, expected [2, 9, 14, 3]"


@torch.no_grad()
def test_logits_to_keep_also_with_an_adapted_head(tmp_path: Path, model: XLoraModel) -> None:
    base = tiny_base(dtype=torch.float64)
    folder = write_lora(tmp_path / "head", base, ("lm_head", "q_proj"))
    with_head = XLoraModel.from_base(base, XLoraConfig(adapters={"a": str(folder)}))
    ids = tiny_prompt()
    for each in (model, with_head):
        whole = each(input_ids=ids).logits
        for keep, kept in ((1, whole[:, -1:]), (torch.tensor([2, 5]), whole[:, [2, 5]])):
            logits = each(input_ids=ids, logits_to_keep=keep).logits
            torch.testing.assert_close(logits, kept, **NEAR)
        assert each(input_ids=ids, logits_to_keep=0).logits.shape == whole.shape
    tokens = with_head.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    uncached = with_head.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(tokens, uncached)


@torch.no_grad()
def test_outputs_that_were_asked_for(model: XLoraModel) -> None:
    ids = tiny_prompt()
    output = model(input_ids=ids, output_hidden_states=True, labels=ids)
    assert len(output.hidden_states) == 3
    logits, labels = output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    torch.testing.assert_close(output.loss.float(), loss)
    plain = model(input_ids=ids, return_dict=False, use_cache=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], output.logits)


@torch.no_grad()
def test_use_cache_decides_whether_caches_come_back(model: XLoraModel) -> None:
    ids = tiny_prompt()
    assert model(input_ids=ids).past_key_values.get_seq_length() == 9
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    assert model.train()(input_ids=ids).past_key_values is None
    model.eval().config.use_cache = False
    assert model(input_ids=ids).past_key_values is None


@torch.no_grad()
def test_a_bf16_model_routes_in_float32(tmp_path: Path) -> None:
    model, ids = tiny_xlora(tmp_path, dtype=torch.bfloat16), tiny_prompt()
    assert {p.dtype for p in model.base_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.classifier.parameters()} == {torch.float32}
    assert model.scaling_pass(input_ids=ids).router_logits.dtype == torch.float32
    assert model(input_ids=ids).logits.dtype == torch.bfloat16
    cast = tiny_xlora(tmp_path).to(torch.bfloat16)
    assert torch.equal(cast(input_ids=ids).logits, model(input_ids=ids).logits)
