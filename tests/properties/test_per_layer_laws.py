"""The laws of X-LoRA hold for a per-layer router, on every architecture, in float64, near-exact."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from tests.gated_models import gated_xlora
from tests.laws import NEAR, T, base_logits, positions, run
from tests.tiny_models import (
    VOCAB_SIZE,
    families,
    tiny_base,
    tiny_prompt,
    write_experts,
    write_lora,
)
from xlora_core.config import RoutingKnobs, XLoraConfig
from xlora_core.model import XLoraModel

pytestmark = pytest.mark.usefixtures("without_gradient")


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return gated_xlora(tmp_path_factory.mktemp(family), family, dtype=torch.float64)


def with_zero_gates(model: XLoraModel) -> XLoraModel:
    uniform = copy.deepcopy(model)
    for parameter in uniform.gates.parameters():
        parameter.zero_()
    return uniform


def test_the_adapters_matter_and_the_gates_route(model: XLoraModel, family: str) -> None:
    """What the laws below compare must not be equal anyway."""
    ids = tiny_prompt(length=T)
    logits, scalings = run(model, ids)
    assert (logits - base_logits(family, ids)).abs().max() > 1
    assert scalings.std(dim=1).mean() > 0.1  # differs from token to token
    assert scalings.std(dim=2).mean() > 0.1  # and from module to module
    assert (logits - run(with_zero_gates(model), ids)[0]).abs().max() > 0.1


def test_zero_gates_are_the_uniformly_merged_model(
    tmp_path: Path, family: str, model: XLoraModel
) -> None:
    ids = tiny_prompt(length=T)
    logits, scalings = run(with_zero_gates(model), ids)
    torch.testing.assert_close(scalings, torch.full_like(scalings, 1 / 3), **NEAR)
    merged = gated_xlora(tmp_path, family, dtype=torch.float64).merge_and_unload()
    torch.testing.assert_close(logits, merged(input_ids=ids).logits, **NEAR)


def test_one_adapter_is_plain_lora(tmp_path: Path, family: str) -> None:
    model = gated_xlora(tmp_path, family, n_adapters=1, dtype=torch.float64)
    (folder,) = write_experts(tmp_path, family, 1).values()
    plain = PeftModel.from_pretrained(tiny_base(family, dtype=torch.float64), folder).eval()
    ids = tiny_prompt(length=T)
    logits, scalings = run(model, ids)
    assert torch.equal(scalings, torch.ones_like(scalings))
    torch.testing.assert_close(logits, plain(input_ids=ids).logits, **NEAR)


def test_experts_that_are_alike_are_plain_lora(tmp_path: Path, family: str) -> None:
    """Whatever the gates say, their weights sum to 1."""
    base = tiny_base(family, dtype=torch.float64)
    folder = write_lora(tmp_path / "expert", base, families()[family].targets, seed=5)
    plain = PeftModel.from_pretrained(tiny_base(family, dtype=torch.float64), folder).eval()
    config = XLoraConfig(adapters={n: str(folder) for n in "abc"}, router="per_layer")
    model = XLoraModel.from_base(base, config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.gates.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    ids = tiny_prompt(length=T)
    logits, scalings = run(model, ids)
    assert scalings.std(dim=-1).mean() > 0.1
    torch.testing.assert_close(logits, plain(input_ids=ids).logits, **NEAR)


def test_global_weight_0_is_the_base_model(model: XLoraModel, family: str) -> None:
    ids = tiny_prompt(length=T)
    logits, _ = run(model, ids, knobs=RoutingKnobs(global_weight=0.0))
    assert torch.equal(logits, base_logits(family, ids))


def test_top_k_of_all_is_dense(model: XLoraModel) -> None:
    ids = tiny_prompt(length=T)
    dense, _ = run(model, ids)
    assert torch.equal(run(model, ids, knobs=RoutingKnobs(top_k=3))[0], dense)
    assert (run(model, ids, knobs=RoutingKnobs(top_k=2))[0] - dense).abs().max() > 1e-3


def test_scalings_of_a_token_do_not_depend_on_later_tokens(model: XLoraModel) -> None:
    ids = tiny_prompt(length=T)
    logits, scalings = run(model, ids)
    other = ids.clone()
    other[:, 5:] = tiny_prompt(length=T, seed=1)[:, 5:]
    for changed in (ids[:, :5], other):
        changed_logits, changed_scalings = run(model, changed)
        torch.testing.assert_close(changed_scalings[:, :5], scalings[:, :5], **NEAR)
        torch.testing.assert_close(changed_logits[:, :5], logits[:, :5], **NEAR)


def test_left_padding_changes_nothing(model: XLoraModel) -> None:
    ids = tiny_prompt(length=T)
    logits, scalings = run(model, ids)
    padded = torch.cat([torch.tensor([[0, 0, 0, 0], [7, 8, 9, 10]]), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    padded_logits, padded_scalings = run(
        model, padded, attention_mask=mask, position_ids=positions(mask)
    )
    torch.testing.assert_close(padded_logits[:, 4:], logits, **NEAR)
    torch.testing.assert_close(padded_scalings[:, 4:], scalings, **NEAR)


def test_inputs_embeds_are_their_ids(model: XLoraModel) -> None:
    ids = tiny_prompt(length=T)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        model(inputs_embeds=embeds).logits, model(input_ids=ids).logits, **NEAR
    )


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_cut_into_blocks_and_any_batch(model: XLoraModel, data: st.DataObject) -> None:
    """Cached is uncached, a batch is its rows alone, under any knobs."""
    batch = data.draw(st.integers(1, 3), label="batch")
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), label="blocks")
    knobs = RoutingKnobs(
        top_k=data.draw(st.sampled_from([None, 1, 2, 3]), label="top_k"),
        temperature=data.draw(st.floats(0.05, 20), label="temperature"),
        global_weight=data.draw(st.floats(-2, 2), label="global_weight"),
    )
    token = st.integers(3, VOCAB_SIZE - 1)
    ids = torch.tensor(
        data.draw(
            st.lists(
                st.lists(token, min_size=sum(sizes), max_size=sum(sizes)),
                min_size=batch,
                max_size=batch,
            ),
            label="ids",
        )
    )
    logits, scalings = run(model, ids, knobs=knobs)
    torch.testing.assert_close(scalings.sum(-1), torch.ones_like(scalings[..., 0]), **NEAR)
    cache = model.new_cache()
    blocks = [
        model(input_ids=part, past_key_values=cache, knobs=knobs).logits
        for part in ids.split(sizes, dim=1)
    ]
    torch.testing.assert_close(torch.cat(blocks, dim=1), logits, **NEAR)
    torch.testing.assert_close(model.get_latest_scalings(), scalings, **NEAR)
    for row in range(batch):
        alone, alone_scalings = run(model, ids[row : row + 1], knobs=knobs)
        torch.testing.assert_close(alone, logits[row : row + 1], **NEAR)
        torch.testing.assert_close(alone_scalings, scalings[row : row + 1], **NEAR)
