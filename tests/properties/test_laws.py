"""The laws of X-LoRA on every architecture, in float64, near-exact.

Logits are of size 5 to 30 here; ``NEAR`` leaves room for the order of additions only.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.laws import NEAR, T, base_logits, positions, run
from tests.tiny_models import tiny_base, tiny_prompt, tiny_xlora, write_experts
from xlora_core.config import RoutingKnobs
from xlora_core.model import XLoraModel

pytestmark = pytest.mark.usefixtures("without_gradient")


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> XLoraModel:
    return tiny_xlora(tmp_path_factory.mktemp(family), family, dtype=torch.float64)


def test_the_adapters_matter_and_the_router_routes(model: XLoraModel, family: str) -> None:
    """What the laws below compare must not be equal anyway."""
    logits, scalings = run(model, tiny_prompt(length=T))
    assert (logits - base_logits(family, tiny_prompt(length=T))).abs().max() > 1
    assert scalings.std(dim=1).mean() > 0.02  # differs from token to token
    assert scalings.std(dim=2).mean() > 0.02  # and from module to module
    merged, _ = run(_with_zero_classifier(model), tiny_prompt(length=T))
    assert (logits - merged).abs().max() > 0.1


def _with_zero_classifier(model: XLoraModel) -> XLoraModel:
    uniform = copy.deepcopy(model)
    for parameter in uniform.classifier.parameters():
        parameter.zero_()
    return uniform


@pytest.mark.parametrize("layerwise", [True, False])
def test_one_adapter_under_softmax_is_plain_lora(
    tmp_path: Path, family: str, layerwise: bool
) -> None:
    """Against PEFT's plain LoRA: its X-LoRA cannot load GPT-2, GPT-NeoX and OPT's whole block."""
    model = tiny_xlora(
        tmp_path, family, n_adapters=1, dtype=torch.float64, layerwise_scalings=layerwise
    )
    (folder,) = write_experts(tmp_path, family, 1).values()
    plain = PeftModel.from_pretrained(tiny_base(family, dtype=torch.float64), folder).eval()
    ids = tiny_prompt(length=T)
    logits, scalings = run(model, ids)
    assert torch.equal(scalings, torch.ones_like(scalings))
    torch.testing.assert_close(logits, plain(input_ids=ids).logits, **NEAR)


def test_expert_alone_is_plain_lora(tmp_path: Path, family: str, model: XLoraModel) -> None:
    """One-hot scalings of the main pass choose one of several experts."""
    folders = write_experts(tmp_path, family, 3)
    plain = PeftModel.from_pretrained(tiny_base(family, dtype=torch.float64), folders["2"])
    ids = tiny_prompt(length=T)
    alone = model.main_pass(input_ids=ids, scalings=torch.tensor([0.0, 0.0, 1.0])).logits
    torch.testing.assert_close(alone, plain.eval()(input_ids=ids).logits, **NEAR)


def test_global_weight_0_is_the_base_model(model: XLoraModel, family: str) -> None:
    ids = tiny_prompt(length=T)
    logits, _ = run(model, ids, knobs=RoutingKnobs(global_weight=0.0))
    assert torch.equal(logits, base_logits(family, ids))
    assert torch.equal(
        model.main_pass(input_ids=ids, scalings=None).logits, base_logits(family, ids)
    )


def test_all_scalings_alike_are_the_uniformly_merged_model(
    tmp_path: Path, family: str, model: XLoraModel
) -> None:
    ids = tiny_prompt(length=T)
    logits, scalings = run(_with_zero_classifier(model), ids)
    torch.testing.assert_close(scalings, torch.full_like(scalings, 1 / 3), **NEAR)
    merged = tiny_xlora(tmp_path, family, dtype=torch.float64).merge_and_unload()
    torch.testing.assert_close(logits, merged(input_ids=ids).logits, **NEAR)
    constant = model.main_pass(input_ids=ids, scalings=torch.ones(3).double() / 3)
    torch.testing.assert_close(constant.logits, logits, **NEAR)


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
    assert not torch.equal(other, ids)
    for changed in (ids[:, :5], other):
        changed_logits, changed_scalings = run(model, changed)
        torch.testing.assert_close(changed_scalings[:, :5], scalings[:, :5], **NEAR)
        torch.testing.assert_close(changed_logits[:, :5], logits[:, :5], **NEAR)


@pytest.mark.parametrize("sizes", [(T,), (1,) * T, (4, 1, 3, 1)], ids=["whole", "single", "mixed"])
def test_cached_is_uncached(model: XLoraModel, sizes: tuple[int, ...]) -> None:
    ids = tiny_prompt(length=T)
    logits, scalings = run(model, ids)
    cache = model.new_cache()
    blocks = [
        model(input_ids=chunk, past_key_values=cache).logits for chunk in ids.split(sizes, dim=1)
    ]
    torch.testing.assert_close(torch.cat(blocks, dim=1), logits, **NEAR)
    cached_scalings = model.get_latest_scalings()
    assert cached_scalings is not None
    torch.testing.assert_close(cached_scalings, scalings, **NEAR)
    assert cache.get_seq_length() == T


def test_left_padding_changes_nothing(model: XLoraModel) -> None:
    ids = tiny_prompt(length=T)
    logits, scalings = run(model, ids)
    pad = torch.tensor([[0, 0, 0, 0], [7, 8, 9, 10]])  # whatever stands there
    padded = torch.cat([pad, ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    padded_logits, padded_scalings = run(
        model, padded, attention_mask=mask, position_ids=positions(mask)
    )
    torch.testing.assert_close(padded_logits[:, 4:], logits, **NEAR)
    torch.testing.assert_close(padded_scalings[:, 4:], scalings, **NEAR)


def test_a_batch_is_its_rows_alone(model: XLoraModel) -> None:
    lengths = (T, 4, 6)
    ids = tiny_prompt(batch=3, length=T)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, T - length :] = 1
    logits, scalings = run(model, ids, attention_mask=mask, position_ids=positions(mask))
    for row, length in enumerate(lengths):
        alone, alone_scalings = run(model, ids[row : row + 1, T - length :])
        torch.testing.assert_close(logits[row : row + 1, T - length :], alone, **NEAR)
        torch.testing.assert_close(scalings[row : row + 1, T - length :], alone_scalings, **NEAR)


def test_inputs_embeds_are_their_ids(model: XLoraModel) -> None:
    ids = tiny_prompt(length=T)
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(
        model(inputs_embeds=embeds).logits, model(input_ids=ids).logits, **NEAR
    )


def test_the_two_ways_to_the_hidden_state_agree(model: XLoraModel) -> None:
    """With the language model's logits the pass runs through the whole model, else not."""
    ids = tiny_prompt(length=T)
    short = model.scaling_pass(input_ids=ids)
    long = model.scaling_pass(input_ids=ids, with_lm_logits=True)
    assert short.lm_logits is None
    assert torch.equal(short.router_logits, long.router_logits)
    base = model.main_pass(input_ids=ids, scalings=None).logits
    assert long.lm_logits is not None
    torch.testing.assert_close(long.lm_logits, base[:, -1:], **NEAR)
